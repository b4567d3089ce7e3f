//! Directories of this host in the guest: a `virtiofsd` for each, which speaks vhost-user to QEMU
//! (<https://qemu-project.gitlab.io/virtiofsd/>).
//!
//! None is ever left behind, whoever dies when: QEMU and `virtiofsd` inherit the two ends of a connection that was made before
//! either ran, and nobody else has them. When QEMU is gone, or was never started, `virtiofsd` reads the connection's end and ends;
//! without a `virtiofsd` QEMU doesn't come up. The connection has no name that a later process could take up.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use command_fds::{CommandFdExt, FdMapping};
use rustix::fs::{Mode, OFlags};

use crate::directory::MachineDir;
use crate::hypervisor::HypervisorError;
use crate::lock::remove;
use crate::session;
use crate::spec::{Share, Spec};

/// What the servers say.
pub(super) const LOG: &str = "virtiofsd.log";
/// Where a listening socket has its name for an instant. Relative names keep it under the kernel's 108 bytes.
const SOCKET: &str = "share.sock";
/// The descriptor at which a server finds its socket.
const LISTENS: i32 = 3;

/// QEMU's descriptor of the connection to a share's server, in the order of [`Spec::shares`].
pub(super) fn descriptor(index: usize) -> usize {
    10 + index
}

/// Where distributions have it. Debian 12's is an older program of the same name and options.
const PLACES: [&str; 4] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/bin/virtiofsd"];

/// The program, or why there is none.
pub(super) fn program(named: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(named) = named {
        return if named.exists() { Ok(named.to_owned()) } else { Err(format!("there is no {}", named.display())) };
    }
    PLACES.iter().map(Path::new).find(|path| path.exists()).map(ToOwned::to_owned).ok_or_else(|| {
        "virtiofsd isn't installed: `apt-get install virtiofsd` (Debian 12: qemu-system-common), or name it with --virtiofsd"
            .to_owned()
    })
}

/// Connections that nobody has yet.
pub(super) struct Shares<'a> {
    dir: &'a MachineDir,
    program: PathBuf,
    all: Vec<(&'a Share, UnixListener, UnixStream)>,
}

/// Servers to start, once QEMU has its ends.
pub(super) struct Servers<'a> {
    dir: &'a MachineDir,
    program: PathBuf,
    all: Vec<(&'a Share, UnixListener)>,
}

impl<'a> Shares<'a> {
    /// Makes the connections.
    pub(super) fn open(spec: &'a Spec, dir: &'a MachineDir, named: Option<&Path>) -> Result<Self, HypervisorError> {
        let mut made = Self { dir, program: PathBuf::new(), all: Vec::new() };
        if spec.shares.is_empty() {
            return Ok(made);
        }
        made.program = program(named).map_err(HypervisorError::Unsupported)?;
        for share in &spec.shares {
            check(share)?;
            let path = dir.file(SOCKET);
            remove(&path)?;
            let failed = || HypervisorError::io(format!("can't make the socket {}", path.display()));
            // By the directory's descriptor: its own path may be longer than a socket's name can be.
            let how = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = rustix::fs::open(dir.path(), how, Mode::empty());
            let opened = opened.map_err(|error| failed()(error.into()))?;
            let short = short(&opened, &path);
            let listener = UnixListener::bind(&short).map_err(failed())?;
            let stream = UnixStream::connect(&short).map_err(failed())?;
            remove(&path)?;
            made.all.push((share, listener, stream));
        }
        Ok(made)
    }

    /// What is QEMU's of them, and what is left to be served.
    pub(super) fn connect(self) -> (Servers<'a>, Vec<FdMapping>) {
        let Self { dir, program, all } = self;
        let mut servers = Servers { dir, program, all: Vec::new() };
        let mut mappings = Vec::new();
        for (index, (share, listener, stream)) in all.into_iter().enumerate() {
            let child_fd = i32::try_from(descriptor(index)).unwrap_or(i32::MAX);
            mappings.push(FdMapping { parent_fd: OwnedFd::from(stream), child_fd });
            servers.all.push((share, listener));
        }
        (servers, mappings)
    }
}

impl Servers<'_> {
    /// Starts them. They are nobody's to wait for: each ends with QEMU.
    pub(super) fn serve(self) -> Result<(), HypervisorError> {
        for (share, listener) in self.all {
            let path = self.dir.file(LOG);
            let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
            let log = log.map_err(HypervisorError::io(format!("can't open {}", path.display())))?;
            let mut command = Command::new(&self.program);
            command
                .arg(format!("--fd={LISTENS}"))
                .arg("-o")
                .arg(format!("source={}", share.path.display()))
                // Files of others are seen as they are within a second, and mapped files work.
                .args(["-o", "cache=auto", "-o", "sandbox=namespace"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::from(log));
            session::of_its_own(&mut command);
            let mapping = FdMapping { parent_fd: OwnedFd::from(listener), child_fd: LISTENS };
            command.fd_mappings(vec![mapping]).map_err(|error| HypervisorError::Unsupported(error.to_string()))?;
            // Dropped and not waited for: the runtime takes its exit status when it comes.
            tokio::process::Command::from(command).spawn().map(drop).map_err(|source| HypervisorError::Program {
                program: self.program.display().to_string(),
                mend: "install virtiofsd, or name another with --virtiofsd",
                source,
            })?;
        }
        Ok(())
    }
}

/// A name of the socket that is short enough for the kernel, where it has one.
fn short(dir: &OwnedFd, path: &Path) -> PathBuf {
    use std::os::fd::AsRawFd;
    if cfg!(target_os = "linux") {
        PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
    } else {
        path.to_owned()
    }
}

fn check(share: &Share) -> Result<(), HypervisorError> {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let Share { tag, path } = share;
    if tag.is_empty() || tag.len() > 36 || !tag.bytes().all(word) {
        return Err(HypervisorError::Unsupported(format!("{tag:?} can't name a shared directory")));
    }
    // It would be two options to virtiofsd.
    if path.as_os_str().as_encoded_bytes().contains(&b',') {
        return Err(HypervisorError::Unsupported(format!("{} can't be shared: it has a comma", path.display())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;
    use crate::id::MachineId;
    use crate::spec::tests::spec;

    /// Takes one connection, as `virtiofsd` does, and tells when it has ended.
    const SERVER: &str = "#!/usr/bin/env python3
import os, socket, sys
here = os.path.dirname(sys.argv[0])
assert sys.argv[1] == '--fd=3' and f'source={here}/shared' in sys.argv, sys.argv
connection, _ = socket.socket(fileno=3).accept()
open(f'{here}/serves', 'w').close()
while connection.recv(100):
    pass
open(f'{here}/ended', 'w').close()
";

    fn directory(root: &Path) -> MachineDir {
        let dir = MachineDir::new(root, &MachineId::parse("a").unwrap());
        dir.make().unwrap();
        dir
    }

    async fn there(path: &Path) -> bool {
        for _ in 0..200 {
            if path.exists() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        false
    }

    #[tokio::test]
    async fn a_server_ends_with_its_hypervisor_and_without_one() {
        for hypervisor in [true, false] {
            let root = tempfile::tempdir().unwrap();
            let dir = directory(root.path());
            let program = root.path().join("virtiofsd");
            std::fs::write(&program, SERVER).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            let mut spec = spec("a");
            spec.shares = vec![Share { tag: "vmpod".to_owned(), path: root.path().join("shared") }];
            let mut command = Command::new("sleep");
            command.arg("1");
            let (all, mappings) = Shares::open(&spec, &dir, Some(&program)).unwrap().connect();
            command.fd_mappings(mappings).unwrap();
            assert!(!dir.file(SOCKET).exists(), "the connection has no name");
            let (serves, ended) = (root.path().join("serves"), root.path().join("ended"));
            if hypervisor {
                let mut child = command.spawn().unwrap();
                drop(command);
                all.serve().unwrap();
                assert!(there(&serves).await);
                assert!(!ended.exists(), "while its hypervisor runs it serves");
                child.kill().unwrap();
                child.wait().unwrap();
            } else {
                // The agent that would have started one has died.
                all.serve().unwrap();
                drop(command);
            }
            assert!(there(&ended).await, "hypervisor: {hypervisor}");
        }
    }

    #[test]
    fn what_can_not_be_shared_is_told() {
        let root = tempfile::tempdir().unwrap();
        let dir = directory(root.path());
        let refused = |tag: &str, path: &str, program: &str| {
            let mut spec = spec("a");
            spec.shares = vec![Share { tag: tag.to_owned(), path: path.into() }];
            Shares::open(&spec, &dir, Some(Path::new(program))).err().unwrap().to_string()
        };
        assert!(refused("a", "/x", "/no/such/program").contains("there is no /no/such/program"));
        assert!(refused("a,b", "/x", "/bin/sh").contains("can't name a shared directory"));
        assert!(refused("a", "/x,y", "/bin/sh").contains("it has a comma"));
    }
}
