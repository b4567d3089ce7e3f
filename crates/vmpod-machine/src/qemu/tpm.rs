//! A TPM 2.0 of the machine's own: an `swtpm` process beside QEMU (<https://www.qemu.org/docs/master/specs/tpm.html>).
//!
//! As with shared directories, the two inherit the ends of a connection that was made before either ran: whoever dies, the other ends.
//! But `swtpm` waits for ever where QEMU died before it said its first word. So it has a lock as the machine has one, by which it is
//! found and ended with the machine.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};

use crate::directory::MachineDir;
use crate::hypervisor::HypervisorError;
use crate::lock;
use crate::session;
use crate::spec::Spec;

/// QEMU's descriptor of the connection.
pub(super) const DESCRIPTOR: i32 = 9;
/// The descriptor at which `swtpm` finds its end.
const CONTROL: i32 = 3;
/// What it keeps, in the machine's directory: the guest's keys among it.
const STATE: &str = "tpm";
/// Whoever has it as its standard input is the machine's `swtpm`.
const LOCK: &str = "tpm.lock";
/// What it says.
pub(super) const LOG: &str = "swtpm.log";
const PROGRAM: &str = "swtpm";
const MEND: &str = "a guest with a TPM needs it: `apt-get install swtpm`";

/// Why machines have no TPM here, if so.
pub(super) fn missing() -> Option<String> {
    let run = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output();
    run.err().map(|error| format!("swtpm can't be run ({error}); {MEND}"))
}

/// Ends whatever an earlier start left.
pub(super) async fn clear(dir: &MachineDir, limit: Duration) -> Result<(), HypervisorError> {
    let path = dir.file(LOCK);
    if !path.exists() {
        return Ok(());
    }
    lock::clear_file(&path, limit, || lock::by_standard_input(&path)).await
}

/// The end of a connection that `swtpm` is to have.
pub(super) struct Tpm<'a> {
    dir: &'a MachineDir,
    end: UnixStream,
    lock: File,
}

impl<'a> Tpm<'a> {
    /// Makes the connection of a machine that has a TPM, and QEMU's end of it.
    pub(super) fn open(spec: &Spec, dir: &'a MachineDir) -> Result<Option<(Self, FdMapping)>, HypervisorError> {
        if !spec.tpm {
            return Ok(None);
        }
        let path = dir.file(STATE);
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(HypervisorError::io(format!("can't make {}", path.display())))?;
        let path = dir.file(LOCK);
        let lock = lock::take_from_nobody(&path, || lock::by_standard_input(&path))?;
        let (end, qemus) = UnixStream::pair().map_err(HypervisorError::io("can't make a connection"))?;
        let mapping = FdMapping { parent_fd: OwnedFd::from(qemus), child_fd: DESCRIPTOR };
        Ok(Some((Self { dir, end, lock }, mapping)))
    }

    /// Starts it. It is nobody's to wait for: it ends with QEMU.
    pub(super) fn serve(self) -> Result<(), HypervisorError> {
        self.serve_by(Path::new(PROGRAM))
    }

    fn serve_by(self, program: &Path) -> Result<(), HypervisorError> {
        let mut command = Command::new(program);
        command
            .args(["socket", "--tpm2", "--terminate"])
            .arg(format!("--ctrl=type=unixio,clientfd={CONTROL}"))
            // Relative names: what is in a path could be another option.
            .arg(format!("--tpmstate=dir={STATE},mode=0600"))
            .arg(format!("--log=file={LOG},level=1,truncate"))
            .current_dir(self.dir.path())
            .stdin(Stdio::from(self.lock))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        session::of_its_own(&mut command);
        let mapping = FdMapping { parent_fd: OwnedFd::from(self.end), child_fd: CONTROL };
        command.fd_mappings(vec![mapping]).map_err(|error| HypervisorError::Unsupported(error.to_string()))?;
        // Dropped and not waited for: the runtime takes its exit status when it comes.
        tokio::process::Command::from(command).spawn().map(drop).map_err(|source| HypervisorError::Program {
            program: program.display().to_string(),
            mend: MEND,
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::id::MachineId;
    use crate::spec::tests::spec;

    /// The real one, spoken to as QEMU does: `CMD_GET_CAPABILITY` (1), a 32-bit number, is answered with a result and 64 bits
    /// (swtpm's `tpm_ioctl.h`).
    #[tokio::test]
    async fn it_serves_a_hypervisor_and_is_found_without_one() {
        let root = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(root.path(), &MachineId::parse("a").unwrap());
        dir.make().unwrap();
        let mut spec = spec("a");
        assert!(Tpm::open(&spec, &dir).unwrap().is_none(), "only those have one that ask for it");
        clear(&dir, Duration::from_secs(1)).await.unwrap();
        spec.tpm = true;
        let (tpm, mapping) = Tpm::open(&spec, &dir).unwrap().unwrap();
        let mut qemu = UnixStream::from(mapping.parent_fd);
        tpm.serve().unwrap_or_else(|error| panic!("install swtpm: {error}"));
        qemu.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        qemu.write_all(&1_u32.to_be_bytes()).unwrap();
        let mut answer = [0; 8];
        qemu.read_exact(&mut answer).unwrap();
        assert_ne!(u64::from_be_bytes(answer), 0, "it says what it can");
        // This hypervisor never began to use it, and is gone.
        drop(qemu);
        assert!(matches!(Tpm::open(&spec, &dir), Err(HypervisorError::Occupied { .. })), "there is one already");
        clear(&dir, Duration::from_secs(5)).await.unwrap();
        assert_eq!(lock::by_standard_input(&dir.file(LOCK)), None);
        assert!(Tpm::open(&spec, &dir).unwrap().is_some());
    }

    #[test]
    fn where_it_is_not_there_the_mend_is_told() {
        let root = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(root.path(), &MachineId::parse("a").unwrap());
        dir.make().unwrap();
        let spec = Spec { tpm: true, ..spec("a") };
        let (tpm, _) = Tpm::open(&spec, &dir).unwrap().unwrap();
        let error = tpm.serve_by(Path::new("/no/such/swtpm")).unwrap_err();
        assert!(crate::machine::error_chain(&error).contains("apt-get install swtpm"), "{error}");
    }
}
