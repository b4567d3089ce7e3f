//! `vmpod service`: this program under systemd or launchd.
//!
//! What is written is decided by pure functions; installing writes it and tells the service manager.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result};
use serde::Serialize;
use tokio::process::Command;

use crate::args::{Manager, Part, Service, ServiceCommand, ServiceInstall, ServiceUninstall};
use crate::home::Home;
use crate::output::{self, talk};
use crate::report::{Exit, Remedy};

/// A service, described whole.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unit {
    part: Part,
    program: PathBuf,
    home: PathBuf,
    arguments: Vec<String>,
}

/// A file of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct File {
    path: PathBuf,
    text: String,
}

/// Installs or uninstalls.
pub(crate) async fn run(home: Home, args: Service) -> Result<Exit> {
    match args.command {
        ServiceCommand::Install(args) => install(&home, args).await,
        ServiceCommand::Uninstall(args) => uninstall(args).await,
    }
}

async fn install(home: &Home, args: ServiceInstall) -> Result<Exit> {
    let manager = args.manager.unwrap_or(Manager::HERE);
    let program = args.program.map_or_else(std::env::current_exe, std::path::absolute);
    let unit = Unit {
        part: args.part,
        program: program.context("can't tell where this program is")?,
        home: home.root().to_owned(),
        arguments: args.arguments,
    };
    let files = files(manager, &unit)?;
    if args.print {
        let texts: Vec<_> = files.iter().map(|file| format!("# {}\n{}", file.path.display(), file.text)).collect();
        output::data(&texts.join("\n"))?;
        return Ok(Exit::Done);
    }
    let root = args.root.as_deref();
    if root.is_none() {
        needs(manager)?;
    }
    for file in &files {
        let path = below(root, &file.path);
        write(&path, &file.text)?;
        talk(&format!("wrote {}", path.display()));
    }
    if root.is_none() {
        if manager == Manager::Launchd {
            // It takes no file for a daemon that it has; one that it hasn't needs no stop.
            for words in stopping(manager, unit.part) {
                drop(tell(&words).await);
            }
        }
        for words in starting(manager, unit.part) {
            tell(&words).await?;
        }
        talk(&format!("{} runs, and starts with the host", name(manager, unit.part)));
    }
    Ok(Exit::Done)
}

async fn uninstall(args: ServiceUninstall) -> Result<Exit> {
    let manager = args.manager.unwrap_or(Manager::HERE);
    let root = args.root.as_deref();
    if root.is_none() {
        needs(manager)?;
        for words in stopping(manager, args.part) {
            // One that doesn't run needs no stop; the files go all the same.
            if let Err(error) = tell(&words).await {
                talk(&format!("{error:#}"));
            }
        }
    }
    let mut any = false;
    for path in paths(manager, args.part) {
        let path = below(root, &path);
        match std::fs::remove_file(&path) {
            Ok(()) => {
                any = true;
                talk(&format!("removed {}", path.display()));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("can't remove {}", path.display())),
        }
    }
    if any && root.is_none() && manager == Manager::Systemd {
        tell(&words(&["systemctl", "daemon-reload"])).await?;
    }
    if !any {
        talk(&format!("{} wasn't installed", name(manager, args.part)));
    }
    Ok(Exit::Done)
}

/// Fails early, and with the way out, where the service manager can't be told anything.
fn needs(manager: Manager) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        let remedy = "run this with sudo, or write the files elsewhere with --root or --print";
        return Err(Remedy::new("services of the host are installed by root", remedy).into());
    }
    // As systemd's own sd_booted(3) asks.
    if manager == Manager::Systemd && !Path::new("/run/systemd/system").is_dir() {
        let remedy = "write the files elsewhere with --root or --print, or start `vmpod up` by what runs services here";
        return Err(Remedy::new("this host doesn't run systemd", remedy).into());
    }
    Ok(())
}

fn part(part: Part) -> &'static str {
    match part {
        Part::Up => "up",
        Part::Node => "node",
        Part::Controller => "controller",
    }
}

/// The service's name.
fn name(manager: Manager, of: Part) -> String {
    match manager {
        Manager::Systemd => format!("vmpod-{}.service", part(of)),
        Manager::Launchd => format!("dev.vmpod.{}", part(of)),
    }
}

/// Where its files are.
fn paths(manager: Manager, of: Part) -> Vec<PathBuf> {
    let name = name(manager, of);
    match manager {
        Manager::Systemd => vec![Path::new("/etc/systemd/system").join(name)],
        Manager::Launchd => vec![Path::new("/Library/LaunchDaemons").join(format!("{name}.plist"))],
    }
}

fn files(manager: Manager, unit: &Unit) -> Result<Vec<File>> {
    let texts = match manager {
        Manager::Systemd => vec![systemd(unit)?],
        Manager::Launchd => vec![launchd(unit)?],
    };
    Ok(paths(manager, unit.part).into_iter().zip(texts).map(|(path, text)| File { path, text }).collect())
}

impl Unit {
    /// The command line. Machines go on when the agent ends, unless somebody says otherwise.
    fn command(&self) -> Result<Vec<String>> {
        let text = |path: &Path| {
            let text = path.to_str().with_context(|| format!("{} isn't UTF-8", path.display()));
            text.map(ToOwned::to_owned)
        };
        let mut words = vec![text(&self.program)?, "--home".to_owned(), text(&self.home)?, part(self.part).to_owned()];
        if self.part != Part::Controller && !self.arguments.iter().any(|word| word == "--keep-vms") {
            words.push("--keep-vms".to_owned());
        }
        words.extend(self.arguments.iter().cloned());
        Ok(words)
    }
}

/// The unit, see `systemd.service(5)`.
fn systemd(unit: &Unit) -> Result<String> {
    let command: Vec<_> = unit.command()?.iter().map(|word| systemd_word(word)).collect();
    let what = match unit.part {
        Part::Up => "pods as virtual machines, with an API of its own",
        Part::Node => "pods as virtual machines",
        Part::Controller => "pools of CI runners",
    };
    Ok(format!(
        "[Unit]\n\
         Description=vmpod: {what}\n\
         Wants=network-online.target\n\
         After=network-online.target docker.service\n\
         StartLimitIntervalSec=0\n\
         \n\
         [Service]\n\
         ExecStart={}\n\
         # Machines run in the unit's control group and outlive the agent. Without this, a restart would kill them.\n\
         KillMode=process\n\
         Restart=always\n\
         RestartSec=2\n\
         LimitNOFILE=1048576\n\
         TasksMax=infinity\n\
         # An agent that is killed for want of memory is started anew; its machines must not go with it.\n\
         OOMPolicy=continue\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        command.join(" ")
    ))
}

/// A word of a command line in a unit (`systemd.service(5)`, "COMMAND LINES"): specifiers and variables are kept from being expanded.
fn systemd_word(word: &str) -> String {
    let word = word.replace('%', "%%").replace('$', "$$");
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@+%$".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word;
    }
    let mut quoted = String::from("\"");
    for c in word.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// A property list of `launchd.plist(5)`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Daemon {
    label: String,
    program_arguments: Vec<String>,
    run_at_load: bool,
    keep_alive: bool,
    /// What is left of the process's group isn't killed with it. The machines have sessions of their own besides.
    abandon_process_group: bool,
    process_type: &'static str,
    soft_resource_limits: Limits,
    hard_resource_limits: Limits,
    standard_error_path: String,
    standard_out_path: String,
    /// So long until it is killed, seconds: more than an agent that keeps its machines ever needs.
    exit_time_out: u32,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Limits {
    number_of_files: u32,
}

fn log(unit: &Unit) -> String {
    format!("/var/log/vmpod-{}.log", part(unit.part))
}

fn launchd(unit: &Unit) -> Result<String> {
    let limits = Limits { number_of_files: 65_536 };
    let daemon = Daemon {
        label: name(Manager::Launchd, unit.part),
        program_arguments: unit.command()?,
        run_at_load: true,
        keep_alive: true,
        abandon_process_group: true,
        // Neither throttled nor given up for others: it runs what people wait for.
        process_type: "Interactive",
        soft_resource_limits: limits,
        hard_resource_limits: limits,
        standard_error_path: log(unit),
        standard_out_path: log(unit),
        exit_time_out: 60,
    };
    let mut text = Vec::new();
    plist::to_writer_xml(&mut text, &daemon).context("can't write the property list")?;
    text.push(b'\n');
    String::from_utf8(text).context("the property list isn't UTF-8")
}

fn starting(manager: Manager, of: Part) -> Vec<Vec<String>> {
    let name = name(manager, of);
    match manager {
        Manager::Systemd => {
            vec![
                words(&["systemctl", "daemon-reload"]),
                words(&["systemctl", "enable", &name]),
                words(&["systemctl", "restart", &name]),
            ]
        }
        Manager::Launchd => {
            let file = format!("/Library/LaunchDaemons/{name}.plist");
            vec![words(&["launchctl", "bootstrap", "system", &file])]
        }
    }
}

fn stopping(manager: Manager, of: Part) -> Vec<Vec<String>> {
    let name = name(manager, of);
    match manager {
        Manager::Systemd => vec![words(&["systemctl", "disable", "--now", &name])],
        Manager::Launchd => vec![words(&["launchctl", "bootout", &format!("system/{name}")])],
    }
}

fn words(all: &[&str]) -> Vec<String> {
    all.iter().map(|word| (*word).to_owned()).collect()
}

async fn tell(words: &[String]) -> Result<()> {
    let [program, arguments @ ..] = words else { return Ok(()) };
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().await;
    let output = output.with_context(|| format!("can't run {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    anyhow::bail!("`{}` failed ({}): {said}", words.join(" "), output.status)
}

fn below(root: Option<&Path>, path: &Path) -> PathBuf {
    match root {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        None => path.to_owned(),
    }
}

/// Written aside and renamed: a service manager never reads half a file.
fn write(path: &Path, text: &str) -> Result<()> {
    let write = || -> std::io::Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(dir)?;
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().with_context(|| format!("can't write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(part: Part, arguments: &[&str]) -> Unit {
        Unit {
            part,
            program: "/usr/local/bin/vmpod".into(),
            home: "/var/lib/vmpod".into(),
            arguments: words(arguments),
        }
    }

    #[test]
    fn a_unit_keeps_machines_over_its_restarts() {
        let file =
            &files(Manager::Systemd, &unit(Part::Up, &["--name", "a b", "--node-label", "cost=5%$"])).unwrap()[0];
        assert_eq!(file.path, Path::new("/etc/systemd/system/vmpod-up.service"));
        insta::assert_snapshot!(file.text);
    }

    #[test]
    fn a_daemon_of_launchd_abandons_its_machines() {
        let files =
            files(Manager::Launchd, &unit(Part::Node, &["--kubeconfig", "/etc/vmpod/<node>&.conf", "--keep-vms"]))
                .unwrap();
        let texts: Vec<_> = files.iter().map(|file| format!("{}\n{}", file.path.display(), file.text)).collect();
        insta::assert_snapshot!(texts.join("\n"));
    }

    #[test]
    fn the_controller_has_no_machines_to_keep() {
        let command = unit(Part::Controller, &[]).command().unwrap();
        assert_eq!(command, ["/usr/local/bin/vmpod", "--home", "/var/lib/vmpod", "controller"]);
    }

    #[test]
    fn a_word_comes_back_as_it_was() {
        assert_eq!(systemd_word("--name=a"), "--name=a");
        assert_eq!(systemd_word("100%"), "100%%");
        assert_eq!(systemd_word("$HOME"), "$$HOME");
        assert_eq!(systemd_word("say \"hi\" \\ there"), r#""say \"hi\" \\ there""#);
        assert_eq!(systemd_word(""), "\"\"");
    }

    #[test]
    fn files_below_a_root_are_whole_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = below(Some(dir.path()), Path::new("/etc/systemd/system/vmpod-up.service"));
        write(&path, "first, and longer").unwrap();
        write(&path, "second").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
