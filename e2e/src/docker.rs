//! A Docker Engine of a test's own.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::command::run;
use crate::leaks;
use crate::patience::eventually_within;
use crate::prerequisites::program;

/// A real dockerd with its own socket, data and addresses. It needs root, as Docker does.
#[derive(Debug)]
pub struct Docker {
    dir: tempfile::TempDir,
    child: Option<Child>,
}

/// What the image of the tests' containers can do.
const APPLETS: [&str; 17] = [
    "sh", "cat", "sleep", "nc", "wget", "echo", "httpd", "id", "hostname", "mkdir", "touch", "head", "true", "tail",
    "rm", "chmod", "ls",
];

impl Docker {
    /// Starts one, with the image `box:1`, which is busybox.
    pub async fn start() -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "dockerd must be started as root: run the tests as root");
        // Not beside the homes: a socket's path is short.
        let dir = tempfile::Builder::new().prefix("vmpod-docker-").tempdir().context("can't make a directory")?;
        let mut docker = Self { dir, child: None };
        docker.run().await?;
        let rootfs = docker.dir.path().join("rootfs");
        std::fs::create_dir_all(rootfs.join("bin"))?;
        std::fs::create_dir_all(rootfs.join("tmp"))?;
        std::fs::copy(program("busybox", "busybox-static")?, rootfs.join("bin/busybox"))?;
        for applet in APPLETS {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&rootfs).args(["-c", "."]);
        let tar = tar.output().await?.stdout;
        docker.docker_with(&["import", "-", "box:1"], Some(&tar)).await?;
        Ok(docker)
    }

    /// Starts the daemon (again). Its containerd sometimes hangs before it listens: then it gets another chance.
    pub async fn run(&mut self) -> Result<()> {
        for _ in 0..3 {
            self.spawn()?;
            let answers = eventually_within(Duration::from_secs(40), "dockerd answers", || async {
                self.docker(&["version"]).await.map(drop)
            });
            if answers.await.is_ok() {
                return Ok(());
            }
            self.kill().await?;
            self.kill_engine();
        }
        bail!("dockerd doesn't start: {}", self.log())
    }

    fn spawn(&mut self) -> Result<()> {
        let dir = self.dir.path();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log"))?;
        let mut command = Command::new(program("dockerd", "docker.io")?);
        command
            .arg(format!("--host={}", self.host()))
            .arg(format!("--data-root={}", dir.join("data").display()))
            .arg(format!("--exec-root={}", dir.join("exec").display()))
            .arg(format!("--pidfile={}", dir.join("pid").display()))
            // Another engine on this host keeps its own.
            .args(["--bridge=none", "--iptables=false", "--default-address-pool=base=10.213.0.0/16,size=24"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true);
        self.child = Some(command.spawn().context("can't start dockerd")?);
        Ok(())
    }

    /// Kills the daemon as a crash does. Its containers go on.
    pub async fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().await.context("can't kill dockerd")?;
        }
        // A daemon that died leaves this, and the next one would take its number for a living one.
        std::fs::remove_file(self.dir.path().join("pid")).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        Ok(())
    }

    /// Ends the daemon's own processes, and not those that only know its address.
    fn kill_engine(&self) {
        leaks::kill_those(self.dir.path(), |process| {
            let program = process.words.split(' ').next().unwrap_or_default();
            program.contains("containerd") || program.ends_with("dockerd")
        });
    }

    /// The API's address.
    #[must_use]
    pub fn host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// What Docker's own client says.
    pub async fn docker(&self, args: &[&str]) -> Result<String> {
        self.docker_with(args, None).await
    }

    /// The same, with some input.
    pub async fn docker_with(&self, args: &[&str], stdin: Option<&[u8]>) -> Result<String> {
        let mut command = Command::new(program("docker", "docker.io")?);
        command.env("DOCKER_HOST", self.host()).env("DOCKER_CONFIG", self.dir.path().join("config")).args(args);
        run(command, stdin, Duration::from_mins(1)).await?.ok()
    }

    /// Makes the image `ansible:1`, which has Ansible, an SSH client and Git.
    pub async fn with_ansible(self) -> Result<Self> {
        let tar = crate::prerequisites::ansible()?;
        let tar = tar.to_str().context("a path that isn't text")?;
        self.docker(&["import", tar, "ansible:1"]).await?;
        Ok(self)
    }

    /// Where the data of a volume is.
    #[must_use]
    pub fn volume(&self, name: &str) -> PathBuf {
        self.dir.path().join("data/volumes").join(name).join("_data")
    }

    /// The containers and networks that are there, by their names.
    pub async fn left(&self) -> Result<Vec<String>> {
        let containers = self.docker(&["ps", "-a", "--format", "{{.Names}}"]).await?;
        let networks = self.docker(&["network", "ls", "--filter", "driver=bridge", "--format", "{{.Name}}"]).await?;
        let volumes = self.docker(&["volume", "ls", "-q"]).await?;
        Ok(containers.lines().chain(networks.lines()).chain(volumes.lines()).map(str::to_owned).collect())
    }

    /// What the daemon said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let pid = self.child.as_ref().and_then(Child::id);
        if let Some(pid) = pid.and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            // In order: then its containers end, and what it mounted is unmounted.
            terminate(pid);
        }
        self.kill_engine();
    }
}

/// Asks a process to end and gives it 15 s.
#[cfg(target_os = "linux")]
fn terminate(pid: Pid) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{PidfdFlags, pidfd_open};
    if let Ok(ended) = pidfd_open(pid, PidfdFlags::empty()) {
        kill_process(pid, Signal::TERM).ok();
        let patience = Timespec { tv_sec: 15, tv_nsec: 0 };
        poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&patience)).ok();
    }
}

/// Elsewhere nothing tells of a process's end, and no engine of these tests runs.
#[cfg(not(target_os = "linux"))]
fn terminate(pid: Pid) {
    kill_process(pid, Signal::TERM).ok();
}
