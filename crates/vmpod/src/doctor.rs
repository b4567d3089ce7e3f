//! `vmpod doctor`: what this host can and can't do, and the mend for each.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use tokio::process::Command;
use vmpod_machine::kvm::{self, Kvm};
use vmpod_machine::qemu::Qemu;

mod nat;
mod vz;

use crate::agent::{Host, Hypervisor};
use crate::args::{self, Format};
use crate::home::Home;
use crate::output::{self, Progress, Style};
use crate::ports;
use crate::report::Exit;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    /// What is so.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// It works, and could be better.
    Warning,
    /// Machines can't run like this.
    Broken,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), mend: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, state: State::Warning, found: found.into(), mend: Some(mend.into()) }
    }

    fn broken(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, state: State::Broken, found: found.into(), mend: Some(mend.into()) }
    }
}

/// Looks at everything and tells it; the exit is 1 when something is broken.
pub(crate) async fn run(home: &Home, args: &args::Doctor) -> Result<Exit> {
    let spinner = Progress::spinner("looking");
    let mut checks = match Hypervisor::of(&args.hypervisor)? {
        Hypervisor::Qemu(qemu) => {
            let (check, runs) = check_qemu(&qemu).await;
            spinner.say("looking whether KVM works");
            let kvm = if runs && cfg!(target_os = "linux") {
                Some(check_kvm(&kvm::probe(&qemu, &home.kvm()).await))
            } else {
                None
            };
            std::iter::once(check).chain(kvm).chain([check_shares(&qemu), check_tpm(&qemu)]).collect()
        }
        Hypervisor::Vz(vz) => vz::check(&vz),
    };
    let apple = checks.iter().any(|check: &Check| check.name == vz::CHECK);
    let home_check = check_home(home);
    let has_home = home_check.state != State::Broken;
    checks.push(home_check);
    if has_home {
        checks.push(check_reflink(&home.images()));
    }
    match Host::look(home) {
        Ok(host) => checks.extend([check_disk(&host), check_memory(&host)]),
        Err(error) => checks.push(Check::broken("host", format!("{error:#}"), "see the reason")),
    }
    // A home that can't be read was told above.
    let own = home.holder().ok().flatten().map(|holder| holder.pid);
    checks.push(check_port("api port", args.api_port, "--api-port", own));
    checks.push(check_port("kubelet port", args.kubelet.kubelet_port, "--kubelet-port", own));
    if !apple {
        checks.push(check_loopback());
        checks.extend(nat::check(&args.network.nat_bridge));
    }
    checks.push(check_files(getrlimit(Resource::Nofile).current));
    checks.push(check_docker(&args.docker.docker_host));
    spinner.clear();

    match args.output.output {
        Format::Table => print(&checks)?,
        format => output::list(format, &checks, &[], |_| Vec::new(), |check| check.name.to_owned())?,
    }
    let broken = checks.iter().any(|check| check.state == State::Broken);
    Ok(if broken { Exit::Failed } else { Exit::Done })
}

fn print(checks: &[Check]) -> Result<()> {
    let style = Style::stdout();
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
    let mut lines = Vec::new();
    for check in checks {
        let sign = match check.state {
            State::Ok => style.green("ok     "),
            State::Warning => style.yellow("warning"),
            State::Broken => style.red("broken "),
        };
        lines.push(format!("{sign}  {:width$}  {}\n", check.name, check.found));
        if let Some(mend) = &check.mend {
            lines.push(format!("         {:width$}  {} {mend}\n", "", style.bold("→")));
        }
    }
    output::data(&lines.concat())
}

/// The oldest QEMU that is tried.
const OLDEST_QEMU: (u32, u32) = (7, 2);

async fn check_qemu(qemu: &Qemu) -> (Check, bool) {
    let program = qemu.program.display().to_string();
    let install = if cfg!(target_os = "macos") {
        "`brew install qemu`".to_owned()
    } else {
        let package = if cfg!(target_arch = "aarch64") { "qemu-system-arm" } else { "qemu-system-x86" };
        format!("install it (`apt-get install {package}` on Debian), or name another with --qemu")
    };
    let asked = Command::new(&qemu.program).arg("--version").kill_on_drop(true).output();
    let output = match tokio::time::timeout(Duration::from_secs(5), asked).await {
        Err(_) => return (Check::broken("qemu", format!("{program} says nothing within 5 s"), install), false),
        Ok(Err(error)) => return (Check::broken("qemu", format!("{program} can't be run: {error}"), install), false),
        Ok(Ok(output)) => output,
    };
    let text = String::from_utf8_lossy(&output.stdout);
    match version(&text) {
        None => (Check::broken("qemu", format!("{program} tells no version"), install), false),
        Some(found) if found < OLDEST_QEMU => {
            let told = format!("{program} is {}.{}", found.0, found.1);
            let wanted = format!("upgrade to {}.{} or later", OLDEST_QEMU.0, OLDEST_QEMU.1);
            (Check::warning("qemu", told, wanted), true)
        }
        Some(found) => (Check::ok("qemu", format!("{program} {}.{}", found.0, found.1)), true),
    }
}

/// The version in `QEMU emulator version 10.0.2 (Debian …)`.
fn version(text: &str) -> Option<(u32, u32)> {
    let number = text.split_once("version ")?.1;
    let mut parts = number.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn check_kvm(kvm: &Kvm) -> Check {
    let slow =
        |found: String, mend: &str| Check::warning("kvm", format!("{found}; guests run in software, slowly"), mend);
    match kvm {
        Kvm::Works => Check::ok("kvm", kvm.to_string()),
        Kvm::Absent => slow(
            kvm.to_string(),
            "enable virtualisation in the firmware and load the module (`modprobe kvm_intel` or `kvm_amd`); on a virtual machine, enable nesting at its host",
        ),
        Kvm::Denied(_) => {
            slow(kvm.to_string(), "add yourself to its group (`sudo usermod -aG kvm $USER`) and log in again")
        }
        Kvm::Hangs | Kvm::Fails(_) => slow(
            kvm.to_string(),
            "this is usual where virtual machines are nested without support: enable nesting at the outer host, or use another",
        ),
    }
}

fn check_home(home: &Home) -> Check {
    let try_it = || -> Result<()> {
        home.make()?;
        std::fs::create_dir_all(home.images())?;
        let mut file = tempfile::tempfile_in(home.root())?;
        file.write_all(b"?")?;
        Ok(())
    };
    match try_it() {
        Ok(()) => Check::ok("home", home.root().display().to_string()),
        Err(error) => Check::broken(
            "home",
            format!("{} can't be written: {error:#}", home.root().display()),
            "choose a directory that you may write, with --home or VMPOD_HOME",
        ),
    }
}

fn check_reflink(images: &Path) -> Check {
    let try_it = || -> std::io::Result<()> {
        let dir = tempfile::Builder::new().prefix(".doctor-").tempdir_in(images)?;
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&from, vec![7; 8192])?;
        reflink_copy::reflink(&from, &to)
    };
    match try_it() {
        Ok(()) => Check::ok("reflink", "the image store's file system shares blocks between copies"),
        Err(_) => Check::ok(
            "reflink",
            "the image store's file system doesn't share blocks (XFS, Btrfs and APFS do); disks are qcow2 overlays instead",
        ),
    }
}

const GIB: u64 = 1 << 30;

fn check_disk(host: &Host) -> Check {
    let found = format!("{} free of {}", output::bytes(host.disk_free), output::bytes(host.disk_total));
    let mend = "make room, or choose a home on a larger file system; `vmpod image rm` removes images";
    match host.disk_free {
        free if free < GIB => Check::broken("disk", found, mend),
        free if free < 10 * GIB => Check::warning("disk", found, mend),
        _ => Check::ok("disk", found),
    }
}

fn check_memory(host: &Host) -> Check {
    let found = format!("{} free of {}", output::bytes(host.memory_free), output::bytes(host.memory));
    let mend = "end what uses it, or give the machines less";
    match host.memory_free {
        free if free < GIB / 2 => Check::broken("memory", found, mend),
        free if free < 2 * GIB => Check::warning("memory", found, mend),
        _ => Check::ok("memory", found),
    }
}

fn check_port(name: &'static str, port: u16, option: &str, own: Option<u32>) -> Check {
    match TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))) {
        Ok(_) => Check::ok(name, format!("{port} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => match ports::listener(port) {
            Some(listener) if Some(listener.pid) == own => Check::ok(name, format!("{port} is this home's")),
            Some(listener) => Check::warning(
                name,
                format!("{port} is in use by {} (process {})", listener.name, listener.pid),
                format!("stop it, or choose another with {option}"),
            ),
            None => Check::warning(name, format!("{port} is in use"), format!("choose another with {option}")),
        },
        Err(error) => {
            Check::warning(name, format!("{port} can't be had: {error}"), format!("choose another with {option}"))
        }
    }
}

/// Every machine of a user network has an address of its own in 127.64.0.0/10.
fn check_loopback() -> Check {
    match TcpListener::bind((Ipv4Addr::new(127, 64, 0, 1), 0)) {
        Ok(_) => Check::ok("loopback", "every machine can have its own loopback address"),
        Err(error) => Check::broken(
            "loopback",
            format!("127.64.0.1 can't be used: {error}"),
            if cfg!(target_os = "macos") {
                "give the loopback interface the addresses: `sudo ifconfig lo0 alias 127.64.0.1`"
            } else {
                "bring the loopback interface up: `ip link set lo up`"
            },
        ),
    }
}

const FEW_FILES: u64 = 4096;

/// `None` means no limit.
fn check_files(limit: Option<u64>) -> Check {
    match limit {
        Some(limit) if limit < FEW_FILES => Check::warning(
            "open files",
            format!("at most {limit}"),
            format!("raise the limit: `ulimit -n {FEW_FILES}`, or LimitNOFILE in a unit"),
        ),
        Some(limit) => Check::ok("open files", format!("at most {limit}")),
        None => Check::ok("open files", "no limit"),
    }
}

/// Only guests whose image asks for a TPM need it.
fn check_tpm(qemu: &Qemu) -> Check {
    use vmpod_machine::Hypervisor as _;
    match qemu.no_tpm() {
        None => Check::ok("swtpm", "there: machines can have a TPM, as Windows 11 wants it"),
        Some(_) => Check::warning(
            "swtpm",
            "not found: machines whose image asks for a TPM don't start",
            "`apt-get install swtpm`",
        ),
    }
}

/// Only pods that share a volume between their machine and its containers need it.
fn check_shares(qemu: &Qemu) -> Check {
    use vmpod_machine::Hypervisor as _;
    match qemu.no_shares() {
        None => Check::ok("virtiofsd", "there: machines can share volumes with containers beside them"),
        Some(_) => Check::warning(
            "virtiofsd",
            "not found: pods whose machine shares a volume with a container are refused",
            "`apt-get install virtiofsd` (on Debian 12, qemu-system-common), or name it with --virtiofsd",
        ),
    }
}

/// Only pods with containers beside their machine need it.
fn check_docker(host: &str) -> Check {
    let Some(socket) = host.strip_prefix("unix://").map(Path::new) else {
        return Check::ok("docker", "turned off: pods with sidecars are refused");
    };
    let mend = "`apt-get install docker.io` on Debian, or name its socket with --docker-host";
    if !socket.exists() {
        let found = format!("there is no {}: pods with sidecars are refused", socket.display());
        return Check::warning("docker", found, mend);
    }
    match UnixStream::connect(socket) {
        Ok(_) => Check::ok("docker", format!("{} answers: it runs sidecars", socket.display())),
        Err(error) => {
            let mend = "start Docker, or let this user reach it (`usermod -aG docker USER`)";
            Check::warning("docker", format!("{} can't be reached: {error}", socket.display()), mend)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_virtiofsd_is_told_with_its_mend() {
        let with = |program: &str| check_shares(&Qemu { virtiofsd: Some(program.into()), ..Qemu::default() });
        assert!(matches!(with("/bin/sh").state, State::Ok));
        let missing = with("/no/such/virtiofsd");
        assert!(matches!(missing.state, State::Warning));
        assert!(missing.mend.unwrap().contains("--virtiofsd"));
    }

    #[test]
    fn qemu_tells_its_version() {
        assert_eq!(version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some((10, 0)));
        assert_eq!(version("QEMU emulator version 7.2.19"), Some((7, 2)));
        assert_eq!(version("something else"), None);
    }

    #[tokio::test]
    async fn a_missing_qemu_is_broken_and_has_a_mend() {
        let (check, runs) = check_qemu(&Qemu { program: "/no/such/qemu".into(), ..Qemu::default() }).await;
        assert_eq!((check.state, runs), (State::Broken, false));
        assert!(check.mend.unwrap().contains("--qemu"));
    }

    #[test]
    fn whatever_isnt_ok_has_a_mend() {
        let host =
            |disk_free, memory_free| Host { cpus: 1, memory: 64 * GIB, memory_free, disk_total: 100 * GIB, disk_free };
        let mut checks = Vec::new();
        for free in [0, GIB, 50 * GIB] {
            checks.extend([check_disk(&host(free, 0)), check_memory(&host(0, free))]);
        }
        checks.extend([Kvm::Works, Kvm::Absent, Kvm::Hangs, Kvm::Denied("no".into())].iter().map(check_kvm));
        checks.extend([check_files(Some(1024)), check_files(Some(1 << 20)), check_files(None)]);
        for check in &checks {
            assert_eq!(check.mend.is_some(), check.state != State::Ok, "{check:?}");
        }
        assert!(checks.iter().any(|c| c.state == State::Broken) && checks.iter().any(|c| c.state == State::Warning));
    }

    #[test]
    fn a_port_that_is_taken_names_who_has_it() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let check = check_port("api port", port, "--api-port", None);
        assert_eq!(check.state, State::Warning);
        assert!(check.found.contains(&std::process::id().to_string()), "{}", check.found);
        assert_eq!(check_port("api port", port, "--api-port", Some(std::process::id())).state, State::Ok);
    }
}
