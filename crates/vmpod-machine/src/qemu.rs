//! Machines as QEMU processes.
//!
//! How a process is known to be a machine's, without trusting a process number:
//!
//! * Whoever starts a machine first takes an exclusive `flock` on the file `lock` in its directory, and hands that open
//!   file to QEMU as standard input. The kernel keeps the lock until the last holder is gone. So "is there a process?"
//!   has an exact answer at any time, also when the agent died between taking the lock and QEMU's first instruction, and
//!   a second process can't be started however the first came about.
//! * A process that answers on `qmp.sock` with the machine's UUID is the machine. Its number is then the socket's peer,
//!   and a pidfd taken from it can't come to mean another process.
//! * A holder that doesn't answer is found through `/proc/*/fd/0`, by the lock file's device and inode.
//!
//! What is known of an end that no agent saw: QEMU is told to trace the cause of its own shutdown to `process.log`. No
//! such line means that it was killed or crashed.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use command_fds::CommandFdExt;
use jiff::Timestamp;

use crate::console::Watch;
use crate::directory::MachineDir;
use crate::hypervisor::{Hypervisor, HypervisorError, Process};
use crate::lifecycle::Exit;
use crate::lock::{self, Lock, holder, last_words, remove, take_lock};
use crate::session;
use crate::spec::{Accel, Arch, Boot, Devices, Firmware, GuestOs, Network, Snapshot, Spec};

mod args;
mod process;
mod qmp;
mod shares;
mod snapshot;
mod tpm;

pub use args::args;
use process::QemuProcess;
use qmp::Qmp;

const SOCKET: &str = "qmp.sock";
const LOG: &str = "process.log";
const VARIABLES: &str = "efivars.fd";
const MEND: &str = "install it, or name another with --qemu";

/// The disks that an AHCI controller has ports for, but one for the seed.
const SATA_DISKS: usize = 5;
/// How long a process may take until it answers. A busy host is slow; a broken one is for ever.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a process that is found may take until it answers. It may have been started an instant before the last agent
/// died, on a host that is busy with many others.
const FIND_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 15 });

/// QEMU on this host.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program for guests of this host's architecture; looked up in `PATH` when it is a bare name.
    pub program: PathBuf,
    /// The program that shares directories with guests; the distribution's own when none is named.
    pub virtiofsd: Option<PathBuf>,
}

impl Default for Qemu {
    fn default() -> Self {
        Self { program: PathBuf::from(program_name(Arch::host().unwrap_or(Arch::Amd64))), virtiofsd: None }
    }
}

fn program_name(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "qemu-system-x86_64",
        Arch::Arm64 => "qemu-system-aarch64",
    }
}

impl Qemu {
    /// The program for a guest's architecture.
    fn program(&self, arch: Arch) -> &Path {
        if Arch::host() == Some(arch) { &self.program } else { Path::new(program_name(arch)) }
    }

    /// The first line of `--version`, for `doctor`.
    pub async fn version(&self) -> Result<String, HypervisorError> {
        let output =
            tokio::process::Command::new(&self.program).arg("--version").stdin(Stdio::null()).output().await.map_err(
                |source| HypervisorError::Program { program: self.program.display().to_string(), mend: MEND, source },
            )?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}

/// Code and variables of a firmware, in the places of the distributions.
fn firmware(arch: Arch, kind: Firmware) -> Option<(&'static str, &'static str)> {
    let places: &[(&str, &str)] = match (arch, kind) {
        (_, Firmware::Bios) => &[],
        (Arch::Amd64, Firmware::Uefi) => &[
            ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
            ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
            ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
        ],
        (Arch::Amd64, Firmware::Secure) => &[
            ("/usr/share/OVMF/OVMF_CODE_4M.ms.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
            ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"),
        ],
        (Arch::Arm64, _) => &[
            ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
            ("/usr/share/edk2/aarch64/QEMU_EFI-silent-pflash.raw", "/usr/share/edk2/aarch64/vars-template-pflash.raw"),
        ],
    };
    places.iter().copied().find(|(code, vars)| Path::new(code).exists() && Path::new(vars).exists())
}

/// The code of a machine's firmware, if it has one, and variables of its own beside it.
fn flash(spec: &Spec, dir: &MachineDir) -> Result<Option<&'static Path>, HypervisorError> {
    let Boot::Firmware(kind @ (Firmware::Uefi | Firmware::Secure)) = spec.boot else { return Ok(None) };
    let (code, variables) = firmware(spec.arch, kind).ok_or_else(|| {
        HypervisorError::Unsupported(
            "no UEFI firmware for this guest is installed: install the package ovmf (or edk2-ovmf, qemu-efi-aarch64)"
                .to_owned(),
        )
    })?;
    let ours = dir.file(VARIABLES);
    std::fs::copy(variables, &ours)
        .map_err(HypervisorError::io(format!("can't copy {variables} to {}", ours.display())))?;
    Ok(Some(Path::new(code)))
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    async fn start(&self, spec: &Spec, dir: &MachineDir) -> Result<Box<dyn Process>, HypervisorError> {
        refuse(spec)?;
        let lock = lock::take_to_start(dir)?;
        remove(&dir.file(SOCKET))?;
        remove(&dir.file("console.sock"))?;
        let code = flash(spec, dir)?;
        let log_path = dir.file(LOG);
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log_path)
            .map_err(HypervisorError::io(format!("can't open {}", log_path.display())))?;
        let log_too = log.try_clone().map_err(HypervisorError::io("can't duplicate a file descriptor"))?;
        let mut watch = Watch::new(&dir.file(SOCKET)).map_err(HypervisorError::io("can't watch the directory"))?;
        let program = self.program(spec.arch);
        let shares = shares::Shares::open(spec, dir, self.virtiofsd.as_deref())?;
        let mut command = std::process::Command::new(program);
        command
            .args(args(spec, code, Path::new("/dev/vhost-net").exists()))
            .current_dir(dir.path())
            .stdin(Stdio::from(lock))
            .stdout(Stdio::from(log_too))
            .stderr(Stdio::from(log));
        session::of_its_own(&mut command);
        let (shares, mut mappings) = shares.connect();
        tpm::clear(dir, FIND_LIMIT).await?;
        let (tpm, more) = tpm::Tpm::open(spec, dir)?.unzip();
        mappings.extend(more);
        if !mappings.is_empty() {
            command.fd_mappings(mappings).map_err(|error| HypervisorError::Unsupported(error.to_string()))?;
        }
        let child = tokio::process::Command::from(command).spawn().map_err(|source| HypervisorError::Program {
            program: program.display().to_string(),
            mend: MEND,
            source,
        })?;
        // Until its directories and its TPM are served it doesn't answer; without them it ends.
        shares.serve()?;
        tpm.map_or(Ok(()), tpm::Tpm::serve)?;
        let mut child = Some(child);
        let answer = tokio::time::timeout(START_LIMIT, async {
            loop {
                if dir.file(SOCKET).exists()
                    && let Ok(qmp) = Qmp::connect(dir, SOCKET).await
                {
                    return Ok(qmp);
                }
                let Some(child) = &mut child else { continue };
                tokio::select! {
                    status = child.wait() => {
                        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                        let words = [shares::LOG, tpm::LOG, LOG].map(|log| last_words(&dir.file(log), if log == LOG { 3 } else { 1 }));
                        let words: Vec<_> = words.into_iter().flatten().collect();
                        let output = if words.is_empty() { status } else { words.join("; ") };
                        return Err(HypervisorError::DiedAtStart { hypervisor: "qemu", output });
                    }
                    changed = watch.changed() => changed.map_err(HypervisorError::io("can't watch the directory"))?,
                    // The socket's name appears an instant before it listens.
                    () = tokio::time::sleep(Duration::from_millis(5)), if dir.file(SOCKET).exists() => {}
                }
            }
        })
        .await;
        let qmp = match answer {
            Ok(Ok(qmp)) => qmp,
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                if let Some(child) = &mut child {
                    child.kill().await.map_err(HypervisorError::io("can't kill a process that doesn't answer"))?;
                }
                return Err(HypervisorError::DiedAtStart {
                    hypervisor: "qemu",
                    output: format!("it didn't answer within {} s and was killed", START_LIMIT.as_secs()),
                });
            }
        };
        if let Err(error) = attach(spec).await {
            if let Some(child) = &mut child {
                child.kill().await.map_err(HypervisorError::io("can't kill a process without a network"))?;
            }
            return Err(error.into());
        }
        if let Err(error) = snapshot::restore(spec, dir, &qmp).await {
            if let Some(child) = &mut child {
                child.kill().await.map_err(HypervisorError::io("can't kill a process that wasn't restored"))?;
            }
            let words = last_words(&dir.file(LOG), 3).map_or_else(String::new, |words| format!(" ({words})"));
            let why = format!("{}{words}", crate::machine::error_chain(&error));
            return Err(HypervisorError::Restore { why });
        }
        Ok(Box::new(QemuProcess::new(spec, dir, qmp, child.take()).await?))
    }

    async fn find(&self, spec: &Spec, dir: &MachineDir) -> Result<Option<Box<dyn Process>>, HypervisorError> {
        let deadline = tokio::time::Instant::now() + FIND_LIMIT;
        loop {
            match take_lock(dir)? {
                Lock::Absent | Lock::Taken(_) => return Ok(None),
                Lock::Held => {}
            }
            // It may be an instant old, and not listening yet.
            let why = match tokio::time::timeout_at(deadline, Qmp::connect(dir, SOCKET)).await {
                Ok(Ok(qmp)) => {
                    // The agent that started it may have died before its interface had its bridge.
                    if let Err(error) = attach(spec).await {
                        let error = crate::machine::error_chain(&error);
                        tracing::warn!(machine = %spec.id, error, "the running machine has no network");
                    }
                    // Or before its guest was itself.
                    snapshot::restore(spec, dir, &qmp).await?;
                    return Ok(Some(Box::new(QemuProcess::new(spec, dir, qmp, None).await?)));
                }
                Ok(Err(error)) => crate::machine::error_chain(&error),
                Err(_) => "no answer on its control socket".to_owned(),
            };
            if tokio::time::Instant::now() >= deadline {
                let holder = holder(dir).map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                return Err(HypervisorError::Unresponsive { why: format!("process {holder} holds it; {why}") });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn no_tpm(&self) -> Option<String> {
        tpm::missing()
    }

    fn no_shares(&self) -> Option<String> {
        shares::program(self.virtiofsd.as_deref()).err()
    }

    async fn snapshots(&self, accel: Accel) -> Option<String> {
        let version = self.version().await.ok()?;
        Some(format!("{version}; {}", processor(accel)))
    }

    async fn autopsy(&self, _spec: &Spec, dir: &MachineDir) -> Result<Option<Exit>, HypervisorError> {
        // QEMU makes the console's file before anything of the guest runs.
        if !dir.console().exists() {
            return Ok(None);
        }
        Ok(Some(process::exit_from_log(&dir.file(LOG), Timestamp::now())))
    }

    async fn destroy(&self, dir: &MachineDir) -> Result<(), HypervisorError> {
        lock::clear(dir, FIND_LIMIT).await?;
        tpm::clear(dir, FIND_LIMIT).await
    }
}

/// Refuses what only Apple's framework does.
fn refuse(spec: &Spec) -> Result<(), HypervisorError> {
    if spec.os == GuestOs::Macos || spec.networks.iter().any(|network| matches!(network, Network::Vmnet { .. })) {
        let why = "macOS guests and Apple's networks need Apple's Virtualization framework: run this machine on a Mac";
        return Err(HypervisorError::Unsupported(why.to_owned()));
    }
    if spec.devices == Devices::Emulated && spec.disks.len() > SATA_DISKS {
        let why = format!(
            "{} disks on emulated devices: the controller has ports for {SATA_DISKS} and the seed",
            spec.disks.len()
        );
        return Err(HypervisorError::Unsupported(why));
    }
    if spec.snapshot.is_some() && spec.tpm {
        let why = "a machine with a TPM has no memory snapshot: what the TPM knows isn't in it";
        return Err(HypervisorError::Unsupported(why.to_owned()));
    }
    if spec.snapshot.is_some() && !spec.shares.is_empty() {
        let why = "a machine that shares directories with its host has no memory snapshot";
        return Err(HypervisorError::Unsupported(why.to_owned()));
    }
    Ok(())
}

/// Gives the machine's interfaces on this host their bridges.
async fn attach(spec: &Spec) -> Result<(), vmpod_network::NetworkError> {
    if spec.snapshot == Some(Snapshot::Make) {
        return Ok(());
    }
    for network in &spec.networks {
        if let Network::Tap { interface, bridge, .. } = network {
            vmpod_network::attach(interface, bridge).await?;
        }
    }
    Ok(())
}

/// The processor that a guest sees, as far as a snapshot depends on it.
fn processor(accel: Accel) -> String {
    if accel == Accel::Tcg {
        // The emulated one depends on QEMU alone.
        return "cpu max".to_owned();
    }
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let wanted = ["model name", "microcode", "flags", "CPU implementer", "CPU part", "Features"];
    let lines = first.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join("; ")
}

/// The command line, for people: what `ps` would show.
#[must_use]
pub fn command_line(program: &Path, arguments: &[OsString]) -> String {
    let quote = |text: &std::ffi::OsStr| crate::guest::shell::quote(&text.to_string_lossy());
    std::iter::once(quote(program.as_os_str()))
        .chain(arguments.iter().map(|argument| quote(argument)))
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests;
