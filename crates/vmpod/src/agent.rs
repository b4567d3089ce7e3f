//! The node agent's parts, put together the same way for `up`, `node` and `run`.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use vmpod_image::{Credentials, Store};
use vmpod_machine::kvm::{self, Kvm};
use vmpod_machine::qemu::Qemu;
use vmpod_machine::vz::{self, Vz};
use vmpod_machine::{Auth, Machines, Memory, Secret};
use vmpod_node::{Capacity, Kubelet, MachineDefaults, Options, Registries};

use crate::args::{self, Accel, Kind, NodeMachines};
use crate::home::Home;
use crate::report::Remedy;

/// What one agent needs besides its home.
pub(crate) struct Parts<'a> {
    pub(crate) home: &'a Home,
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    pub(crate) kubelet: Kubelet,
    pub(crate) client: kube::Client,
    pub(crate) store: Store,
    pub(crate) machines: &'a NodeMachines,
}

/// The options of an agent.
pub(crate) async fn options(parts: Parts<'_>) -> Result<Options> {
    let Parts { home, name, address, kubelet, client, store, machines: args } = parts;
    let hypervisor = Hypervisor::of(&args.hypervisor)?;
    let accel = accel(home, &hypervisor, args.accel).await;
    Ok(Options {
        name,
        dir: home.node(),
        client,
        store,
        machines: machines(home, hypervisor)?,
        accel,
        kubelet: Some(kubelet),
        address,
        capacity: capacity(home, args)?,
        defaults: MachineDefaults::default(),
        guest_login: guest_login(&args.guest_login)?,
        registries: Registries {
            credentials: Credentials::from_environment(|name| std::env::var_os(name)),
            plain_http: args.plain_http.clone(),
            ca_files: args.registry_ca.clone(),
            mirrors: args.sources.registry_mirror.clone(),
            signatures: crate::image::signatures(&args.sources)?,
        },
        image_gc: vmpod_node::ImageGc {
            high_percent: args.images.image_gc_high,
            low_percent: args.images.image_gc_low.min(args.images.image_gc_high),
            budget: args.images.image_budget.as_ref().map(|size| size.bytes),
            ..vmpod_node::ImageGc::default()
        },
        eviction: args
            .eviction
            .eviction_hard
            .clone()
            .with_transition(args.eviction.eviction_pressure_transition_period),
        prefetch: args.images.prefetch.clone(),
        labels: args.object.node_label.iter().map(|label| (label.key.clone(), label.value.clone())).collect(),
        taints: args.object.taint.clone(),
        docker_host: args.docker.docker_host.clone(),
        network: args.network.usual.clone(),
        nat: vmpod_network::nat::Config {
            bridge: args.network.nat_bridge.clone(),
            subnet: args.network.nat_subnet,
            host: std::fs::read_to_string("/etc/machine-id").unwrap_or_default().trim().to_owned(),
        },
        keep_vms: args.keep_vms,
        snapshot_budget: Some(args.snapshots.bytes).filter(|bytes| *bytes > 0),
        shutdown_grace: args.shutdown_grace,
    })
}

/// The home's machines, none adopted yet.
pub(crate) fn machines(home: &Home, hypervisor: Hypervisor) -> Result<Machines> {
    let hypervisor: Arc<dyn vmpod_machine::Hypervisor> = match hypervisor {
        Hypervisor::Qemu(qemu) => Arc::new(qemu),
        Hypervisor::Vz(vz) => Arc::new(vz),
    };
    Machines::open(home.machines(), hypervisor)
        .with_context(|| format!("can't open the machines in {}", home.machines().display()))
}

/// What runs this host's machines.
#[derive(Clone, Debug)]
pub(crate) enum Hypervisor {
    Qemu(Qemu),
    Vz(Vz),
}

impl Hypervisor {
    /// What was named, or what is usual here.
    pub(crate) fn of(args: &args::Hypervisor) -> Result<Self> {
        let usual = if cfg!(target_os = "macos") { Kind::Vz } else { Kind::Qemu };
        match args.kind.unwrap_or(usual) {
            Kind::Qemu => Ok(Self::Qemu(qemu(args))),
            Kind::Vz if args.vz_helper.is_none() && cfg!(not(target_os = "macos")) => Err(Remedy::new(
                "Apple's Virtualization framework is on Macs only",
                "leave out --hypervisor, or run this on a Mac",
            )
            .into()),
            Kind::Vz => {
                let helper = args.vz_helper.clone().map_or_else(std::env::current_exe, std::path::absolute);
                let leases = args.vmnet_leases.clone().unwrap_or_else(|| vz::LEASES.into());
                Ok(Self::Vz(Vz { helper: helper.context("can't tell where this program is")?, leases }))
            }
        }
    }
}

/// The QEMU that was named, or this architecture's.
pub(crate) fn qemu(args: &args::Hypervisor) -> Qemu {
    let qemu = Qemu { virtiofsd: args.virtiofsd.clone(), ..Qemu::default() };
    match args.qemu.clone() {
        Some(program) => Qemu { program, ..qemu },
        None => qemu,
    }
}

/// What executes the guests: what was asked for, else the fastest that works here.
pub(crate) async fn accel(home: &Home, hypervisor: &Hypervisor, asked: Option<Accel>) -> vmpod_machine::Accel {
    // Apple's framework has no other.
    let Hypervisor::Qemu(qemu) = hypervisor else { return vmpod_machine::Accel::Hvf };
    match asked {
        Some(Accel::Kvm) => return vmpod_machine::Accel::Kvm,
        Some(Accel::Hvf) => return vmpod_machine::Accel::Hvf,
        Some(Accel::Tcg) => return vmpod_machine::Accel::Tcg,
        None if cfg!(target_os = "macos") => return vmpod_machine::Accel::Hvf,
        None => {}
    }
    match kvm::probe(qemu, &home.kvm()).await {
        Kvm::Works => vmpod_machine::Accel::Kvm,
        other => {
            tracing::warn!("guests run under software emulation, which is slow: {other}");
            vmpod_machine::Accel::Tcg
        }
    }
}

/// The way into guests whose image tells none, when the node has one.
fn guest_login(args: &args::GuestLogin) -> Result<Option<(Option<String>, Auth)>> {
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
        Ok::<_, anyhow::Error>(text.trim_end_matches(['\r', '\n']).to_owned())
    };
    let auth = match (&args.password_file, &args.key_file) {
        (Some(path), _) => Auth::Password(Secret::new(read(path)?)),
        (None, Some(path)) => Auth::Key(std::path::absolute(path)?),
        (None, None) if args.user.is_some() => {
            return Err(Remedy::new(
                "a user of guests without a password or key opens no guest",
                "name a file with one: --guest-password-file or --guest-key-file",
            )
            .into());
        }
        (None, None) => return Ok(None),
    };
    Ok(Some((args.user.clone(), auth)))
}

/// What this host offers.
fn capacity(home: &Home, args: &NodeMachines) -> Result<Capacity> {
    let host = Host::look(home)?;
    let mut capacity = Capacity::of_host(host.cpus, Memory::from_bytes(host.memory), host.disk_total);
    capacity.pods = args.max_pods;
    if let Some(reserved) = &args.reserve_memory {
        capacity.reserved_memory = Memory::from_bytes(reserved.bytes.min(host.memory));
    }
    Ok(capacity)
}

/// This host's size, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) cpus: u32,
    pub(crate) memory: u64,
    pub(crate) memory_free: u64,
    /// Of the file system that holds the home.
    pub(crate) disk_total: u64,
    pub(crate) disk_free: u64,
}

impl Host {
    /// Looks at the host, within the limits of this process's control group.
    pub(crate) fn look(home: &Home) -> Result<Self> {
        let mut system = sysinfo::System::new().context("can't look at the memory of this host")?;
        system.refresh_memory();
        let (mut memory, mut memory_free) = (system.total_memory(), system.available_memory());
        if let Some(limits) = system.cgroup_limits() {
            memory = memory.min(limits.total_memory);
            memory_free = memory_free.min(limits.free_memory);
        }
        // The home may not be there yet; what will hold it is.
        let existing = home.root().ancestors().find(|dir| dir.exists()).unwrap_or(home.root());
        let disk = rustix::fs::statvfs(existing)
            .with_context(|| format!("can't look at the file system of {}", existing.display()))?;
        Ok(Self {
            cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            memory,
            memory_free,
            disk_total: disk.f_blocks.saturating_mul(disk.f_frsize),
            disk_free: disk.f_bavail.saturating_mul(disk.f_frsize),
        })
    }
}

/// The node's name when none was given: this host's, as the API wants names.
pub(crate) fn node_name(asked: Option<&str>) -> String {
    match asked {
        Some(name) => name.to_owned(),
        None => clean_name(&rustix::system::uname().nodename().to_string_lossy()),
    }
}

fn clean_name(host: &str) -> String {
    let clean: String = host
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .collect();
    let parts: Vec<&str> =
        clean.split('.').map(|part| part.trim_matches('-')).filter(|part| !part.is_empty()).collect();
    if parts.is_empty() { "vmpod".into() } else { parts.join(".") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_becomes_a_node_name() {
        for (host, node) in [
            ("Anna's_Mac", "anna-s-mac"),
            ("build-01.example.com", "build-01.example.com"),
            ("", "vmpod"),
            ("-a-..b", "a.b"),
        ] {
            assert_eq!(clean_name(host), node);
        }
    }

    #[test]
    fn the_host_has_something() {
        let home = Home::resolve(Some(Path::new("/no/such/dir"))).unwrap();
        let host = Host::look(&home).unwrap();
        assert!(host.cpus > 0 && host.memory > 0 && host.disk_total > 0, "{host:?}");
        assert!(host.memory_free <= host.memory && host.disk_free <= host.disk_total, "{host:?}");
    }
}
