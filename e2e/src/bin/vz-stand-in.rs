//! A stand-in for the process in which a machine of Apple's Virtualization framework lives, for tests on Linux: it is the same
//! helper, with QEMU where the framework would be.
//!
//! As with the framework, the guest dies with this process, its address is found in the host's leases, its disk is raw, and there is
//! a limit that others count towards as well. The guest is `tiny`, whatever the image holds. In the directory `vmnet` beside the
//! machines are the leases, the keys that open the guests (`authorized_keys`), and, to play a host whose other programs run guests,
//! a file `limit`.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use async_trait::async_trait;
use clap::Parser;
use e2e::prerequisites;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::watch;
use vmpod_machine::vz::config::Configuration;
use vmpod_machine::vz::helper::{self, Ended, Engine, EngineError};
use vmpod_machine::{Accel, Auth, Boot, GuestOs, MachineId, Machines, Network, Seed, SeedForm, Spec, qemu};

#[derive(Parser)]
enum Args {
    /// Be a machine.
    MachineVz {
        /// Its directory.
        dir: PathBuf,
    },
}

fn main() -> ExitCode {
    let Args::MachineVz { dir } = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.to_string(), 1),
    };
    let engine = StandIn { dir: dir.clone(), ended: watch::Sender::new(None), kill: watch::Sender::new(false) };
    match runtime.block_on(helper::run(&dir, Arc::new(engine))) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.code();
            failed(&format!("{:#}", anyhow::Error::from(error)), code)
        }
    }
}

fn failed(why: &str, code: u8) -> ExitCode {
    // The agent reads the last lines of this.
    drop(std::io::stderr().write_all(format!("{why}\n").as_bytes()));
    ExitCode::from(code)
}

struct StandIn {
    dir: PathBuf,
    ended: watch::Sender<Option<Ended>>,
    kill: watch::Sender<bool>,
}

/// The name of the guest's own machine, in the directory of ours.
const INNER: &str = "guest";

impl StandIn {
    fn vmnet(&self) -> PathBuf {
        self.dir.parent().and_then(Path::parent).unwrap_or(Path::new("/")).join("vmnet")
    }

    fn inner(&self) -> PathBuf {
        self.dir.join(INNER).join(INNER)
    }

    async fn begin(&self, spec: &Spec, configuration: &Configuration) -> Result<()> {
        for disk in configuration.disks.iter().filter(|disk| !disk.read_only) {
            // A Mac opens it for writing, and reads nothing but raw bytes.
            let mut magic = [0; 4];
            OpenOptions::new().read(true).write(true).open(&disk.path)?.read_exact(&mut magic)?;
            ensure!(magic != *b"QFI\xfb", "{} is no raw disk", disk.path.display());
        }
        let address = self.lease(spec).await?;
        let machines = Machines::open(self.dir.join(INNER), Arc::new(qemu::Qemu::default()))?;
        machines.create(self.guest(spec, address)?).await?;
        let inner = self.inner();
        std::os::unix::fs::symlink(&configuration.console, inner.join("console.log"))?;
        let told: Value = serde_json::from_slice(&std::fs::read(inner.join("spec.json"))?)?;
        let told: Spec = serde_json::from_value(told)?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(qemu::Qemu::default().program)
            .args(qemu::args(&told, None, false))
            .current_dir(&inner)
            .stdin(Stdio::null());
        let mut child = command.spawn().context("setpriv is needed (util-linux)")?;
        while !inner.join("qmp.sock").exists() {
            ensure!(child.try_wait()?.is_none(), "qemu ended while it was starting");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let (ended, mut kill) = (self.ended.clone(), self.kill.subscribe());
        tokio::spawn(async move {
            let killed = tokio::select! {
                _ = child.wait() => false,
                killed = async { kill.wait_for(|kill| *kill).await.is_ok() } => killed,
            };
            if killed {
                drop(child.kill().await);
            }
            ended.send_replace(Some(Ended::Stopped));
        });
        Ok(())
    }

    /// Gives the guest an address of this host, and writes its lease as macOS does.
    async fn lease(&self, spec: &Spec) -> Result<Ipv4Addr> {
        let mac = spec.networks.first().context("a machine without network")?.mac();
        let mut leases = OpenOptions::new().read(true).append(true).create(true).open(self.vmnet().join("leases"))?;
        rustix::fs::flock(&leases, rustix::fs::FlockOperation::LockExclusive)?;
        let mut text = String::new();
        leases.rewind()?;
        leases.read_to_string(&mut text)?;
        let last = 10 + u8::try_from(text.matches("ip_address=").count()).context("too many leases")?;
        let address = Ipv4Addr::new(192, 168, 64, last);
        let added = Command::new("ip").args(["addr", "add", &format!("{address}/32"), "dev", "lo"]).status().await?;
        ensure!(added.success(), "can't add {address} to lo");
        let octets: Vec<_> = mac.octets().iter().map(|octet| format!("{octet:x}")).collect();
        let hardware = octets.join(":");
        let lease = format!(
            "{{\n\tname=macs-vm\n\tip_address={address}\n\thw_address=1,{hardware}\n\tidentifier=1,{hardware}\n\tlease=0x7fffffff\n}}\n"
        );
        leases.write_all(lease.as_bytes())?;
        Ok(address)
    }

    fn guest(&self, spec: &Spec, address: Ipv4Addr) -> Result<Spec> {
        let files = prerequisites::repository().join("target/guest");
        let mut guest = spec.clone();
        guest.id = MachineId::parse(INNER)?;
        guest.os = GuestOs::Linux;
        guest.mac = None;
        guest.accel = Accel::Tcg;
        guest.memory = vmpod_machine::Memory::from_mib(256);
        guest.disks.clear();
        guest.boot = Boot::Kernel {
            kernel: files.join("tiny.vmlinuz"),
            initrd: Some(files.join("tiny.initrd")),
            cmdline: std::fs::read_to_string(files.join("tiny.cmdline"))?.trim().to_owned(),
        };
        guest.seed = Some(Seed {
            form: SeedForm::Nocloud,
            instance_id: spec.id.to_string(),
            hostname: "macs-vm".to_owned(),
            authorized_keys: vec![std::fs::read_to_string(self.vmnet().join("authorized_keys"))?.trim().to_owned()],
            user_data: None,
            vendor_data: None,
            network_config: None,
        });
        guest.networks = vec![Network::User {
            address,
            ssh_port: 22,
            forwards: Vec::new(),
            host_ports: Vec::new(),
            mac: guest.networks.first().context("a machine without network")?.mac(),
        }];
        guest.access.auth = Auth::Key(self.vmnet().join("id"));
        Ok(guest)
    }

    /// Says one thing to QEMU.
    async fn say(&self, command: &str) -> Result<()> {
        let file = File::open(self.inner())?;
        let path = format!("/proc/self/fd/{}/qmp.sock", std::os::fd::AsRawFd::as_raw_fd(&file));
        let (reader, mut writer) = UnixStream::connect(path).await?.into_split();
        let mut lines = BufReader::new(reader).lines();
        lines.next_line().await?.context("no greeting")?;
        for command in ["qmp_capabilities", command] {
            writer.write_all(format!("{}\n", json!({"execute": command})).as_bytes()).await?;
            loop {
                let answer: Value = serde_json::from_str(&lines.next_line().await?.context("no answer")?)?;
                ensure!(answer.get("error").is_none(), "{command}: {answer}");
                if answer.get("return").is_some() {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn command(&self, command: &str) -> Result<(), EngineError> {
        self.say(command).await.map_err(|error| EngineError::Failed(format!("{error:#}")))
    }
}

#[async_trait]
impl Engine for StandIn {
    async fn start(&self, spec: &Spec, configuration: &Configuration) -> Result<(), EngineError> {
        if self.vmnet().join("limit").exists() {
            return Err(EngineError::Limit("The number of virtual machines exceeds the limit.".to_owned()));
        }
        self.begin(spec, configuration).await.map_err(|error| EngineError::Failed(format!("{error:#}")))
    }

    async fn request_stop(&self) -> Result<(), EngineError> {
        self.command("system_powerdown").await
    }

    async fn stop(&self) -> Result<(), EngineError> {
        self.kill.send_replace(true);
        Ok(())
    }

    async fn pause(&self) -> Result<(), EngineError> {
        self.command("stop").await
    }

    async fn resume(&self) -> Result<(), EngineError> {
        self.command("cont").await
    }

    async fn ended(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
        end.unwrap_or(Ended::Stopped)
    }
}
