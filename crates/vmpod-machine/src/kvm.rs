//! Whether KVM truly works on this host.
//!
//! `/dev/kvm` can be there, open, make a virtual machine, even run a boot sector, and then hang for ever on the first
//! guest that matters: nested virtualization that is half there does so. So the question is put to the machine itself. A
//! ROM of 64 KiB (`kvm/probe.S`) takes a virtual processor from reset through protected mode and paging into long mode,
//! writes some memory, executes what a hypervisor must intercept, and ends QEMU through its debug exit with a known code.
//! That takes under a tenth of a second where KVM works.

use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::directory::{read_json, write_json};
use crate::qemu::Qemu;

/// What a probe of KVM found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kvm {
    /// A small guest ran under it.
    Works,
    /// There is no `/dev/kvm`.
    Absent,
    /// `/dev/kvm` is there and may not be opened by us.
    Denied(String),
    /// A small guest was started and did nothing within the limit.
    Hangs,
    /// The hypervisor refused, with these words.
    Fails(String),
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("KVM works"),
            Self::Absent => f.write_str("this host has no /dev/kvm"),
            Self::Denied(why) => write!(f, "/dev/kvm can't be opened: {why}"),
            Self::Hangs => f.write_str("/dev/kvm is there, and a guest started with it hangs"),
            Self::Fails(why) => write!(f, "a guest started with KVM fails: {why}"),
        }
    }
}

/// How long the probe's guest may take.
const LIMIT: Duration = Duration::from_secs(5);

/// The ROM's beginning, assembled from `kvm/probe.S`.
const ROM: &str = "fab800f08ed82e660f0116e0000f20c00c010f22c066ea1d000f00080066b810008ed88ec08ed0bc00000800bf00000100\
31c0b9000c0000f3abc7050000010003100100c7050010010003200100bf00200100b883000000b9000200008907050000200083c708e2f40f20\
e083c8200f22e0b8000001000f22d8b9800000c00f320d000100000f300f20c00d000000800f22c0ea9a000f001800bf00004000b90000100048\
b85a5a5a5a5a5a5a5af348ab0fa20f31b02ae6f4f4ebfd8db400000000000000000000ffff0000009acf00ffff00000092cf00ffff0000009aaf\
001f00c0000f";
/// The processor's first instruction, 16 bytes before the ROM's end: a jump to its beginning.
const RESET: [u8; 5] = [0xea, 0x00, 0x00, 0x00, 0xf0];
/// `isa-debug-exit` turns the byte 0x2a into this exit code.
const CODE: i32 = (0x2a << 1) | 1;

fn rom() -> Vec<u8> {
    let digits = ROM.as_bytes().iter().filter_map(|digit| char::from(*digit).to_digit(16));
    let digits: Vec<u8> = digits.filter_map(|digit| u8::try_from(digit).ok()).collect();
    let mut rom: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    rom.resize(64 << 10, 0);
    let reset = rom.len() - 16;
    rom[reset..reset + RESET.len()].copy_from_slice(&RESET);
    rom
}

/// An answer, and the boot of the host for which it holds.
#[derive(Serialize, Deserialize)]
struct Cached {
    boot: String,
    program: String,
    kvm: Kvm,
}

/// Finds out, at most once per boot of the host: the answer is kept in the file `cache`.
pub async fn probe(qemu: &Qemu, cache: &Path) -> Kvm {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let program = qemu.program.display().to_string();
    if let Ok(Some(cached)) = read_json::<Cached>(cache)
        && !boot.is_empty()
        && cached.boot == boot
        && cached.program == program
        && lasts(&cached.kvm)
    {
        return cached.kvm;
    }
    let cached = Cached { boot, program, kvm: probe_now(qemu, "kvm", LIMIT).await };
    if lasts(&cached.kvm)
        && let Err(error) = write_json(cache, &cached)
    {
        tracing::debug!(%error, "the KVM probe's answer can't be kept");
    }
    cached.kvm
}

/// Whether an answer holds until the next boot. Permissions change without one, and so does what is installed.
fn lasts(kvm: &Kvm) -> bool {
    matches!(kvm, Kvm::Works | Kvm::Hangs)
}

async fn probe_now(qemu: &Qemu, accel: &str, limit: Duration) -> Kvm {
    if accel == "kvm" {
        match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Kvm::Absent,
            Err(error) => return Kvm::Denied(error.to_string()),
        }
    }
    if !cfg!(target_arch = "x86_64") {
        // The ROM is for x86 only. Elsewhere nested virtualization is rare, and the device is believed.
        return Kvm::Works;
    }
    let rom_file = match rom_file() {
        Ok(file) => file,
        Err(error) => return Kvm::Fails(format!("the probe's ROM can't be written: {error}")),
    };
    let child = tokio::process::Command::new(&qemu.program)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-m", "32"])
        .args(["-accel", accel, "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"])
        .arg(rom_file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let child = match child {
        Ok(child) => child,
        Err(error) => return Kvm::Fails(format!("{} can't be run: {error}", qemu.program.display())),
    };
    // Dropping the future kills the child.
    match tokio::time::timeout(limit, child.wait_with_output()).await {
        Err(_) => Kvm::Hangs,
        Ok(Ok(output)) if output.status.code() == Some(CODE) => Kvm::Works,
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim().lines().last().unwrap_or_default();
            Kvm::Fails(if said.is_empty() { output.status.to_string() } else { said.to_owned() })
        }
        Ok(Err(error)) => Kvm::Fails(error.to_string()),
    }
}

/// The ROM in a file that is gone with the value.
fn rom_file() -> std::io::Result<RomFile> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let path = std::env::temp_dir().join(format!("vmpod-kvm-probe-{}.rom", uuid::Uuid::new_v4()));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    let rom_file = RomFile(path);
    file.write_all(&rom())?;
    Ok(rom_file)
}

struct RomFile(std::path::PathBuf);

impl RomFile {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RomFile {
    fn drop(&mut self) {
        // What can't be removed is 64 KiB in the temporary directory.
        std::fs::remove_file(&self.0).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rom_is_whole() {
        let rom = rom();
        assert_eq!(rom.len(), 65536);
        assert_eq!((rom[0], rom[228], rom[229]), (0xfa, 0x0f, 0));
        assert_eq!(rom[65520..65525], RESET);
    }

    /// Under emulation the ROM runs on any host, so this shows that a working KVM would be found to work.
    #[tokio::test]
    async fn the_rom_runs() {
        assert_eq!(probe_now(&Qemu::default(), "tcg", Duration::from_mins(1)).await, Kvm::Works);
    }

    #[tokio::test]
    async fn a_program_that_hangs_or_fails_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str| {
            let program = dir.path().join(name);
            std::fs::write(&program, text).unwrap();
            std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            Qemu { program, ..Qemu::default() }
        };
        let hangs = script("hangs", "#!/bin/sh\nexec sleep 60\n");
        assert_eq!(probe_now(&hangs, "tcg", Duration::from_millis(100)).await, Kvm::Hangs);
        let fails = script("fails", "#!/bin/sh\necho 'no such accelerator' >&2\nexit 1\n");
        let why = Kvm::Fails("no such accelerator".to_owned());
        assert_eq!(probe_now(&fails, "tcg", Duration::from_mins(1)).await, why);
    }

    #[tokio::test]
    async fn an_answer_is_kept_for_this_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("kvm.json");
        let qemu = Qemu::default();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let program = qemu.program.display().to_string();
        let kept = Kvm::Hangs;
        write_json(&cache, &Cached { boot: boot.clone(), program: program.clone(), kvm: kept.clone() }).unwrap();
        assert_eq!(probe(&qemu, &cache).await, kept);
        let nothing = Qemu { program: "/nonexistent/qemu".into(), ..Qemu::default() };
        write_json(&cache, &Cached { boot: "another".to_owned(), program, kvm: kept.clone() }).unwrap();
        assert_ne!(probe(&nothing, &cache).await, kept);
        // A program that can't be run may be installed in a moment.
        let (program, kvm) = (nothing.program.display().to_string(), Kvm::Fails("kept".to_owned()));
        write_json(&cache, &Cached { boot, program, kvm: kvm.clone() }).unwrap();
        assert_ne!(probe(&nothing, &cache).await, kvm);
    }
}
