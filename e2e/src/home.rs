//! A home of one test.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use tempfile::TempDir;
use tokio::process::Command;

use crate::command::{Ran, run};
use crate::leaks;
use crate::patience::eventually_within;
use crate::prerequisites;
use crate::up::Up;

/// A state directory that is gone at the end, with all that runs in it.
#[derive(Debug)]
pub struct Home {
    dir: TempDir,
}

impl Home {
    /// A new, empty home.
    pub fn new(name: &str) -> Result<Self> {
        prerequisites::program(&format!("qemu-system-{}", std::env::consts::ARCH), "qemu-system-x86")?;
        let dir = tempfile::Builder::new()
            .prefix(&format!("{name}-"))
            // A home is its user's alone: vmpod takes over no directory of others.
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(prerequisites::scratch()?)?;
        let home = Self { dir };
        // Whether KVM works is found out once for all tests, not once for each home.
        let (known, here) = (known_kvm()?, home.path().join("kvm.json"));
        if known.exists() {
            std::fs::copy(&known, &here).context("can't copy what is known of KVM")?;
        }
        Ok(home)
    }

    /// A new home whose store has the image `tiny`.
    pub async fn with_tiny(name: &str) -> Result<Self> {
        let home = Self::new(name)?;
        home.import(&prerequisites::tiny()?, "tiny").await?;
        Ok(home)
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Puts an image into its store.
    pub async fn import(&self, layout: &Path, name: &str) -> Result<()> {
        self.vmpod(&["image", "import", &layout.to_string_lossy(), name]).await?.ok().map(drop)
    }

    /// `vmpod` on this home, not started yet.
    pub fn command(&self) -> Result<Command> {
        let mut command = Command::new(prerequisites::vmpod()?);
        command.env("VMPOD_HOME", self.path()).env("NO_COLOR", "1").env_remove("KUBECONFIG");
        if let Some(program) = prerequisites::virtiofsd() {
            command.env("VMPOD_VIRTIOFSD", program);
        }
        Ok(command)
    }

    /// Runs `vmpod` on this home.
    pub async fn vmpod(&self, args: &[&str]) -> Result<Ran> {
        self.vmpod_with(args, None).await
    }

    /// Runs `vmpod` on this home with some input.
    pub async fn vmpod_with(&self, args: &[&str], stdin: Option<&[u8]>) -> Result<Ran> {
        let mut command = self.command()?;
        command.args(args);
        run(command, stdin, Duration::from_mins(3)).await
    }

    /// Starts `vmpod up` on free ports and waits until it is ready.
    pub async fn up(&self, args: &[&str]) -> Result<Up> {
        let up = Up::start(self, args).await?;
        let here = self.path().join("kvm.json");
        if here.exists() {
            std::fs::copy(&here, known_kvm()?).context("can't keep what is known of KVM")?;
        }
        Ok(up)
    }

    /// The same with the fleet's operator, which asks a scripted GitLab each second. Its token is in the Secret `gitlab`.
    pub async fn up_with_fleet(&self, args: &[&str]) -> Result<Up> {
        let up = self.up(&[&["--fleet-poll", "1s"], args].concat()).await?;
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "gitlab", "namespace": "default"},
            "stringData": {"token": "glpat-scripted"}});
        up.apply(&secret).await?;
        eventually_within(Duration::from_mins(1), "the kinds of the fleet are there", || async {
            up.kubectl_ok(&["get", "runnerpools,runners"]).await.map(drop)
        })
        .await?;
        Ok(up)
    }

    /// The hypervisor processes of this home.
    #[must_use]
    pub fn hypervisors(&self) -> usize {
        leaks::hypervisors(self.path()).len()
    }

    /// The machine directories of this home.
    pub fn machines(&self) -> Result<Vec<String>> {
        entries(&self.path().join("machines"))
    }

    /// Fails unless nothing is left of any machine: no process, no directory, no disk, no hold on an image.
    ///
    /// `vmpod up` itself may run. What takes a moment gets one: a minute, as the design promises.
    pub async fn assert_clean(&self) -> Result<()> {
        eventually_within(Duration::from_mins(1), "nothing is left", || async { self.left() }).await
    }

    fn left(&self) -> Result<()> {
        let processes = leaks::hypervisors(self.path());
        if let Some(process) = processes.first() {
            bail!("{} processes are left, such as {process}", processes.len());
        }
        for dir in ["machines", "node/pods", "run"] {
            let left = entries(&self.path().join(dir))?;
            if !left.is_empty() {
                bail!("{dir} still holds {left:?}");
            }
        }
        Ok(())
    }

    /// Fails unless no process of any kind has to do with this home.
    pub fn assert_no_process(&self) -> Result<()> {
        let left = leaks::processes(self.path());
        match left.first() {
            None => Ok(()),
            Some(process) => bail!("{} processes are left, such as {process}", left.len()),
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        leaks::kill_all(self.path());
        // The log beside it; a home that never had an `up` has none.
        drop(std::fs::remove_file(self.path().with_extension("log")));
    }
}

fn known_kvm() -> Result<PathBuf> {
    Ok(prerequisites::scratch()?.join("kvm.json"))
}

/// The names in a directory, hidden ones too; none when it isn't there.
pub fn entries(dir: &Path) -> Result<Vec<String>> {
    let read = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("can't list {}", dir.display()))?,
    };
    let mut names: Vec<String> = read.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}
