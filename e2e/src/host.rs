//! A host without Kubernetes: an image store and machines.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use vmpod_image::{ClonedBoot, ImportOptions, Reference, Source, Store, import};
use vmpod_machine::qemu::Qemu;
use vmpod_machine::{
    Accel, Access, Arch, Auth, Boot, Cpus, Devices, Forward, GuestOs, GuestState, MacAddr, Machine, MachineId,
    Machines, Memory, Network, Protocol, Seed, SeedForm, Spec, loopback,
};

use crate::prerequisites::{program, scratch, tiny};

const PATIENCE: Duration = Duration::from_mins(2);

/// A host of its own: an image store and machines. Dropping it ends whatever is left.
#[derive(Debug)]
pub struct Host {
    dir: tempfile::TempDir,
    store: Store,
    reference: Reference,
}

impl Host {
    /// A new one, whose store has the tiny image.
    pub async fn new() -> Result<Self> {
        program("qemu-system-x86_64", "qemu-system-x86")?;
        let dir = tempfile::Builder::new().prefix("machine-").tempdir_in(scratch()?)?;
        let store = Store::open(&dir.path().join("images"))?;
        let reference = Reference::parse("tiny")?;
        import(&store, Source::OciLayout(tiny()?), &reference, ImportOptions::default()).await?;
        Ok(Self { dir, store, reference })
    }

    /// The directory of its machines.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        // Longer than a socket's path may be, and with what JSON and QEMU treat specially.
        self.dir.path().join("a,directory with a \"name\" that is longer than any socket's path may ever be on Linux")
    }

    /// The agent.
    pub fn machines(&self) -> Result<Machines> {
        Ok(Machines::open(self.root(), Arc::new(Qemu::default()))?)
    }

    /// A machine of the tiny image with a key of its own.
    pub fn spec(&self, machines: &Machines, name: &str) -> Result<Spec> {
        let id = MachineId::parse(format!("{name}-{}", std::process::id()))?;
        let image = self.store.get(&self.reference)?.context("the image that was just imported is gone")?;
        let clone = self.store.clone_image(&image, machines.directory(&id)?.path(), None, id.as_str())?;
        let ClonedBoot::Kernel { kernel, initrd, cmdline } = clone.boot else { bail!("tiny has no kernel") };
        let key = machines.ssh_key(&id)?;
        let address = loopback::allocate(&id, &machines.addresses()).context("no address is left")?;
        Ok(Spec {
            cpus: Cpus::ONE,
            memory: Memory::from_mib(256),
            arch: Arch::Amd64,
            os: GuestOs::Linux,
            boot: Boot::Kernel { kernel, initrd, cmdline },
            disks: Vec::new(),
            seed: Some(Seed {
                form: SeedForm::Nocloud,
                instance_id: id.to_string(),
                hostname: name.to_owned(),
                authorized_keys: vec![key.public],
                user_data: None,
                vendor_data: None,
                network_config: None,
            }),
            networks: vec![Network::User {
                address,
                ssh_port: 2222,
                forwards: vec![Forward { protocol: Protocol::Tcp, host_port: 8080, guest_port: 8080 }],
                host_ports: Vec::new(),
                mac: MacAddr::derive(id.as_str()),
            }],
            access: Access {
                user: clone.config.guest.user,
                auth: Auth::Key(key.path),
                ready_marker: clone.config.guest.ready_marker,
                port: 22,
            },
            accel: Accel::Tcg,
            snapshot: None,
            mac: None,
            devices: Devices::Virtio,
            tpm: false,
            shares: Vec::new(),
            id,
        })
    }

    /// A machine whose guest answers.
    pub async fn running(&self, machines: &Machines, name: &str) -> Result<Machine> {
        let machine = machines.create(self.spec(machines, name)?).await?;
        machine.start().await?;
        ready(&machine).await?;
        Ok(machine)
    }

    /// The processes that work in this host's directories.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let root = self.root();
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &u32| {
            let cwd = std::fs::read_link(format!("/proc/{pid}/cwd"));
            cwd.is_ok_and(|cwd| cwd.starts_with(&root))
        })
        .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.processes() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
        }
    }
}

/// Waits until a machine's guest answers.
pub async fn ready(machine: &Machine) -> Result<()> {
    let mut ready = machine.guest().ready();
    let state = tokio::time::timeout(PATIENCE, ready.wait_for(|state| *state == GuestState::Ready)).await;
    let seen = machine.guest().ready().borrow().clone();
    state.with_context(|| format!("{} isn't ready, {seen}: {}", machine.id(), console(machine)))??;
    Ok(())
}

/// What a machine's guest printed.
#[must_use]
pub fn console(machine: &Machine) -> String {
    String::from_utf8_lossy(&std::fs::read(machine.console_path()).unwrap_or_default()).into_owned()
}
