//! What a build does in its guest.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::AsyncReadExt as _;
use vmpod_machine::{Exec, ExecSession, ExitStatus, Guest, Machine, Spec};

use super::recipe::Step;
use crate::output::talk;

/// Where files are put before root moves them to their place.
const LANDING: &str = "/tmp/.vmpod-build";

/// A guest, and how to be root in it.
pub(crate) struct Builder<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) guest: Guest,
}

impl Builder<'_> {
    fn spec(&self) -> &Spec {
        self.machine.spec()
    }

    /// Waits until cloud-init, if the guest has it, is through with the user data.
    pub(crate) async fn first_boot(&self) -> Result<()> {
        let script = "command -v cloud-init >/dev/null || exit 0; cloud-init status --wait >/dev/null; \
            c=$?; [ $c = 0 ] || [ $c = 2 ] || { cloud-init status --long; exit $c; }";
        self.root(script, "cloud-init").await
    }

    /// Does one step.
    pub(crate) async fn step(&self, step: &Step) -> Result<()> {
        match step {
            Step::Run(script) => self.root(&format!("set -e\n{script}"), "the command").await,
            Step::Script(path) => {
                self.put(path, &format!("{LANDING}-script"), Some(0o700)).await?;
                let ran = self.root(&format!("{LANDING}-script"), "the script").await;
                self.root(&format!("rm -f {LANDING}-script"), "removing the script").await?;
                ran
            }
            Step::Copy { from, to, mode } if from.is_dir() => {
                for (file, relative) in files_below(from)? {
                    let to = format!("{}/{}", to.trim_end_matches('/'), relative);
                    self.put(&file, &to, *mode).await?;
                }
                Ok(())
            }
            Step::Copy { from, to, mode } => self.put(from, to, *mode).await,
            Step::Ansible { playbook, arguments } => self.ansible(playbook, arguments).await,
        }
    }

    /// Puts a file of this host at `to`, owned by root.
    async fn put(&self, from: &Path, to: &str, mode: Option<u32>) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let metadata = std::fs::metadata(from).with_context(|| format!("can't read {}", from.display()))?;
        ensure!(metadata.is_file(), "{} is neither a file nor a directory", from.display());
        let mode = mode.unwrap_or(metadata.permissions().mode() & 0o777);
        // Whoever logs in need not be who may write there.
        self.guest
            .copy_in(from, LANDING, 0o600)
            .await
            .with_context(|| format!("can't copy {} into the guest", from.display()))?;
        let (to, dir) =
            (quoted(to), quoted(to.rsplit_once('/').map_or("/", |(dir, _)| if dir.is_empty() { "/" } else { dir })));
        let script = format!("set -e\nmkdir -p {dir}\nmv -f {LANDING} {to}\nchown 0:0 {to}\nchmod {mode:o} {to}\n");
        self.root(&script, "putting a file in place").await
    }

    /// Runs shell as root; its output goes to standard error.
    pub(crate) async fn root(&self, script: &str, what: &str) -> Result<()> {
        let mut command = vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()];
        if self.spec().access.user != "root" {
            command.splice(0..0, ["sudo".to_owned(), "-n".to_owned()]);
        }
        let session = self.guest.exec(Exec::new(command)).await.with_context(|| format!("can't start {what}"))?;
        let ExecSession { stdin, stdout, stderr, control } = session;
        drop(stdin);
        let ((), (), status) = tokio::join!(show(stdout), show(stderr), control.wait());
        match status.with_context(|| format!("can't learn how {what} ended"))? {
            ExitStatus::Code(0) => Ok(()),
            ExitStatus::Code(code) => bail!("{what} ended with exit code {code}"),
            ExitStatus::Signal(signal) => bail!("{what} was ended by signal {}", signal.name()),
        }
    }

    /// Runs `ansible-playbook` of this host against the guest.
    async fn ansible(&self, playbook: &Path, arguments: &[String]) -> Result<()> {
        let address = self.spec().ssh_address().context("the guest has no address")?;
        let access = &self.spec().access;
        let vmpod_machine::Auth::Key(key) = &access.auth else {
            bail!("Ansible needs a guest that takes a key, and this one takes a password");
        };
        let mut command = tokio::process::Command::new("ansible-playbook");
        command
            .arg("--inventory")
            .arg(format!("{},", address.ip()))
            .args(["--user", &access.user])
            .arg("--private-key")
            .arg(key)
            .arg("--extra-vars")
            .arg(format!("ansible_port={}", address.port()))
            // The guest is as new as its host key.
            .args([
                "--ssh-common-args",
                "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
            ])
            .args(if access.user == "root" { &[][..] } else { &["--become"][..] })
            .args(arguments)
            .arg(playbook)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::from(std::io::stderr()))
            .kill_on_drop(true);
        let status = command.status().await.context("can't start ansible-playbook: is Ansible installed here?")?;
        ensure!(status.success(), "ansible-playbook failed: {status}");
        Ok(())
    }
}

/// Passes output on, line by line.
async fn show(mut from: vmpod_machine::guest::BoxRead) {
    let mut buffer = vec![0; 16 << 10];
    let mut line = Vec::new();
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        line.extend_from_slice(&buffer[..read]);
        while let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            let rest = line.split_off(end + 1);
            talk(&format!("  {}", String::from_utf8_lossy(&line).trim_end()));
            line = rest;
        }
    }
    if !line.is_empty() {
        talk(&format!("  {}", String::from_utf8_lossy(&line)));
    }
}

/// A word for the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The files in a directory and below, each with its path from there.
fn files_below(dir: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    let mut left = vec![(dir.to_owned(), String::new())];
    while let Some((dir, prefix)) = left.pop() {
        let entries = std::fs::read_dir(&dir).with_context(|| format!("can't list {}", dir.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("can't list {}", dir.display()))?;
            let name = entry
                .file_name()
                .into_string()
                .ok()
                .with_context(|| format!("a name in {} is no UTF-8", dir.display()))?;
            let relative = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            if entry.path().is_dir() {
                left.push((entry.path(), relative));
            } else {
                found.push((entry.path(), relative));
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_walked_in_order() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        for name in ["z", "a/x", "a/b/y"] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        let names: Vec<_> = files_below(dir.path()).unwrap().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["a/b/y", "a/x", "z"]);
    }

    #[test]
    fn no_name_ends_its_quotes() {
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
    }
}
