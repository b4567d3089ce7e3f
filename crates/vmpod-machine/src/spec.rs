//! What a machine is to be: a value that is written to `spec.json` and never changes afterwards.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use vmpod_network::MacAddr;
pub use vmpod_network::nat::{HostPort, Protocol};

use crate::id::MachineId;

/// An amount of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Memory(u64);

impl Memory {
    /// An amount in bytes.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// An amount in MiB (2^20 bytes).
    #[must_use]
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// Bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Whole MiB, rounded up: hypervisors take memory in MiB, and a guest must not get less than was asked for.
    #[must_use]
    pub const fn mib_up(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1 << 30) {
            write!(f, "{} GiB", self.0 >> 30)
        } else {
            write!(f, "{} MiB", self.mib_up())
        }
    }
}

/// A number of virtual processors, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cpus(std::num::NonZeroU32);

impl Cpus {
    /// One processor.
    pub const ONE: Self = Self(std::num::NonZeroU32::MIN);

    /// `count` processors; none when `count` is zero.
    #[must_use]
    pub const fn new(count: u32) -> Option<Self> {
        match std::num::NonZeroU32::new(count) {
            Some(count) => Some(Self(count)),
            None => None,
        }
    }

    /// How many.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

/// The guest's processor architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// `x86_64`.
    Amd64,
    /// `aarch64`.
    Arm64,
}

impl Arch {
    /// The architecture of this host, when it is one of ours.
    #[must_use]
    pub fn host() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::Amd64),
            "aarch64" => Some(Self::Arm64),
            _ => None,
        }
    }
}

/// The kind of system inside the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestOs {
    /// Linux.
    Linux,
    /// macOS.
    Macos,
    /// Windows.
    Windows,
}

/// How the machine comes up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boot {
    /// The hypervisor loads a kernel itself.
    Kernel {
        /// Kernel image.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        cmdline: String,
    },
    /// Firmware finds a boot loader on the first disk.
    Firmware(Firmware),
}

/// The firmware of a machine that boots from disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// Legacy BIOS.
    Bios,
    /// UEFI.
    Uefi,
    /// UEFI with secure boot.
    Secure,
}

/// One disk, in the order in which the guest sees them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The file. It belongs to this machine alone: it is written without regard to the host's page cache
    /// being lost, because a machine's disk is worth nothing after its host went down.
    pub path: PathBuf,
    /// How the file is to be read.
    pub format: DiskFormat,
}

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// The kind of the devices that a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Devices {
    /// Virtio: fast, and the guest needs drivers for it.
    #[default]
    Virtio,
    /// Those of common hardware (AHCI, Intel's e1000e), for guests without such drivers, such as Windows as it comes.
    Emulated,
}

/// The form of a seed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SeedForm {
    /// cloud-init's `NoCloud`.
    #[default]
    Nocloud,
    /// `OpenStack`'s config drive, which cloudbase-init reads; user data that is XML becomes an answer file of Windows' set-up.
    ConfigDrive,
}

/// What a guest that reads a seed learns at boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    /// How it is written.
    #[serde(default, skip_serializing_if = "is_default")]
    pub form: SeedForm,
    /// Changes when the guest is to behave as a new instance; the machine's id by custom.
    pub instance_id: String,
    /// The guest's host name.
    pub hostname: String,
    /// Public keys in OpenSSH's one-line form.
    pub authorized_keys: Vec<String>,
    /// The user's own `user-data`, untouched (cloud-config, script or MIME archive).
    pub user_data: Option<String>,
    /// Our own `vendor-data`, which user data overrides.
    pub vendor_data: Option<String>,
    /// `network-config`, version 1 or 2.
    pub network_config: Option<String>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Network {
    /// The hypervisor's own network stack: no privilege, outbound connections as the agent's user, inbound ones
    /// only through ports forwarded from a loopback address of the machine's own.
    User {
        /// The machine's address on this host, from 127.64.0.0/10 (see [`crate::loopback`]).
        address: Ipv4Addr,
        /// The port at `address` that leads to the guest's SSH server ([`Access::port`]).
        ssh_port: u16,
        /// Further ports.
        forwards: Vec<Forward>,
        /// Ports of this host that lead into the guest.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        host_ports: Vec<HostPort>,
        /// The interface's hardware address.
        mac: MacAddr,
    },
    /// A port of a bridge of this host. The hypervisor makes the interface, and it goes with the hypervisor's process.
    Tap {
        /// The interface's name on this host.
        interface: String,
        /// The bridge.
        bridge: String,
        /// The address that was reserved for the guest; without one it has to be learnt.
        address: Option<Assigned>,
        /// The interface's hardware address inside the guest.
        mac: MacAddr,
        /// The name that the guest hears over DHCP.
        hostname: String,
        /// Whether other machines of the bridge are kept from it.
        isolated: bool,
        /// Ports of this host that lead into the guest. Whoever keeps the bridge forwards them.
        host_ports: Vec<HostPort>,
    },
    /// A network of Apple's: its address is learnt from the host's leases and neighbours.
    Vmnet {
        /// The interface of this host whose network the guest is on; none for the network that the host shares with its guests
        /// alone, with address translation.
        bridged: Option<String>,
        /// The interface's hardware address.
        mac: MacAddr,
        /// The name by which the guest asks for an address, if it does as its seed says.
        hostname: String,
    },
}

impl Network {
    /// The address under which the machine is known: a loopback address of this host, or the guest's own. None while it isn't
    /// known beforehand.
    #[must_use]
    pub fn address(&self) -> Option<Ipv4Addr> {
        match self {
            Self::User { address, .. } => Some(*address),
            Self::Tap { address, .. } => Some(address.as_ref()?.address),
            Self::Vmnet { .. } => None,
        }
    }

    /// The hardware address inside the guest.
    #[must_use]
    pub fn mac(&self) -> MacAddr {
        match self {
            Self::User { mac, .. } | Self::Tap { mac, .. } | Self::Vmnet { mac, .. } => *mac,
        }
    }

    /// What the guest is told to configure; none when it is to ask by DHCP.
    #[must_use]
    pub fn assigned(&self) -> Option<Assigned> {
        match self {
            Self::User { .. } => Some(Assigned::USER),
            Self::Tap { address, .. } => *address,
            Self::Vmnet { .. } => None,
        }
    }
}

/// An address that a guest is to have, known before it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// The address.
    pub address: Ipv4Addr,
    /// The number of bits that the addresses of its network share.
    pub prefix: u8,
    /// The way out.
    pub gateway: Ipv4Addr,
    /// Who knows names.
    pub dns: Ipv4Addr,
}

impl Assigned {
    /// What every guest has on QEMU's own network (<https://wiki.qemu.org/Documentation/Networking>).
    pub const USER: Self = Self {
        address: Ipv4Addr::new(10, 0, 2, 15),
        prefix: 24,
        gateway: Ipv4Addr::new(10, 0, 2, 2),
        dns: Ipv4Addr::new(10, 0, 2, 3),
    };
}

/// A port of the machine's loopback address that leads into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Port at the machine's address.
    pub host_port: u16,
    /// Port in the guest.
    pub guest_port: u16,
}

/// A text that must not be printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret text.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one place that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// How to log in to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// Login name.
    pub user: String,
    /// Proof of identity.
    pub auth: Auth,
    /// A text that the guest prints on its console once its SSH server listens. With it, nobody has to knock
    /// before somebody is at home.
    pub ready_marker: Option<String>,
    /// The SSH server's port inside the guest.
    pub port: u16,
}

/// A proof of identity for SSH.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auth {
    /// A file with an OpenSSH private key.
    Key(PathBuf),
    /// A password, for guests that know nothing else.
    Password(Secret),
}

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Linux's KVM.
    Kvm,
    /// macOS's Hypervisor.framework.
    Hvf,
    /// Software emulation: works everywhere, several times slower.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Hvf => "hvf",
            Self::Tcg => "tcg",
        })
    }
}

/// What a machine has to do with a memory snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Snapshot {
    /// It boots, and its memory is to become a [`crate::template::Template`]. Its interfaces lead nowhere, so that nothing of
    /// a network is in the snapshot.
    Make,
    /// It goes on where the template in this directory stopped, and gets the identity that its [`Spec::seed`] and
    /// [`Spec::networks`] describe before it counts as started.
    From(PathBuf),
}

/// A machine, described whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Its name on this host.
    pub id: MachineId,
    /// Virtual processors.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Memory,
    /// Processor architecture.
    pub arch: Arch,
    /// The system inside.
    pub os: GuestOs,
    /// How it comes up.
    pub boot: Boot,
    /// Disks; may be none when a kernel is booted directly.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// First-boot data, attached as one more (read-only) disk.
    #[serde(default)]
    pub seed: Option<Seed>,
    /// Interfaces.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// The way in.
    pub access: Access,
    /// What executes it.
    pub accel: Accel,
    /// Whether it makes, or comes from, a memory snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Snapshot>,
    /// What makes it a Mac, when its guest is macOS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The kind of its devices.
    #[serde(default, skip_serializing_if = "is_default")]
    pub devices: Devices,
    /// Whether it has a TPM 2.0. Such a machine neither makes nor comes from a memory snapshot.
    #[serde(default, skip_serializing_if = "is_default")]
    pub tpm: bool,
    /// Directories of this host that the guest can mount. Such a machine neither makes nor comes from a memory snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<Share>,
}

/// What is usual isn't written: specs from before it could be chosen stay as they are.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A directory of this host in the guest, by virtiofs: `mount -t virtiofs TAG PLACE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The name by which the guest mounts it: at most 36 bytes (virtio 1.2, 5.11.4), of a-z, 0-9 and '-'.
    pub tag: String,
    /// The directory. The guest's root can do in it what whoever runs the hypervisor can.
    pub path: PathBuf,
}

/// The hardware that an installed macOS is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mac {
    /// The data representation of a `VZMacHardwareModel`, base64.
    pub hardware_model: String,
    /// The data representation of a `VZMacMachineIdentifier`, base64; none for one that no other machine has.
    pub machine_identifier: Option<String>,
    /// The auxiliary storage's file. It belongs to this machine alone.
    pub auxiliary_storage: PathBuf,
}

impl Spec {
    /// The directory of the template that the machine comes from, when it does.
    #[must_use]
    pub fn template(&self) -> Option<&std::path::Path> {
        match &self.snapshot {
            Some(Snapshot::From(template)) => Some(template),
            _ => None,
        }
    }

    /// The address at which this host reaches the guest's SSH server, when there is one that is known beforehand.
    #[must_use]
    pub fn ssh_address(&self) -> Option<std::net::SocketAddr> {
        if self.snapshot == Some(Snapshot::Make) {
            // Its interfaces lead nowhere, and the address is that of another machine.
            return None;
        }
        let network = self.networks.first()?;
        let port = match network {
            Network::User { ssh_port, .. } => *ssh_port,
            Network::Tap { .. } | Network::Vmnet { .. } => self.access.port,
        };
        Some((network.address()?, port).into())
    }

    /// The guest's own address, where this host reaches each of its ports, when it is known beforehand.
    #[must_use]
    pub fn reachable(&self) -> Option<Ipv4Addr> {
        match self.networks.first()? {
            Network::User { .. } => None,
            other => other.address(),
        }
    }

    /// By what the guest's address has to be learnt, when it does.
    #[must_use]
    pub fn learns(&self) -> Option<Learns<'_>> {
        match self.networks.first()? {
            Network::Tap { address: None, interface, mac, .. } if self.snapshot != Some(Snapshot::Make) => {
                Some(Learns::Interface { interface, mac: *mac })
            }
            Network::Vmnet { mac, hostname, .. } => Some(Learns::Leases { mac: *mac, hostname }),
            _ => None,
        }
    }
}

/// By what a guest's address is learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learns<'a> {
    /// By what passes the machine's interface of this host.
    Interface {
        /// Its name.
        interface: &'a str,
        /// The hardware address inside the guest.
        mac: MacAddr,
    },
    /// By the leases and the neighbours that this host knows.
    Leases {
        /// The hardware address inside the guest.
        mac: MacAddr,
        /// The name that the guest may call itself by.
        hostname: &'a str,
    },
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine that boots a kernel, for the tests of this crate.
    pub(crate) fn spec(name: &str) -> Spec {
        Spec {
            id: MachineId::parse(name).unwrap(),
            cpus: Cpus::ONE,
            memory: Memory::from_mib(256),
            arch: Arch::Amd64,
            os: GuestOs::Linux,
            boot: Boot::Kernel {
                kernel: "/images/vmlinuz".into(),
                initrd: Some("/images/initrd".into()),
                cmdline: "console=ttyS0 quiet".to_owned(),
            },
            disks: Vec::new(),
            seed: None,
            networks: Vec::new(),
            access: Access { user: "root".to_owned(), auth: Auth::Key("key".into()), ready_marker: None, port: 22 },
            accel: Accel::Tcg,
            snapshot: None,
            mac: None,
            devices: Devices::Virtio,
            tpm: false,
            shares: Vec::new(),
        }
    }

    #[test]
    fn a_secret_is_not_shown_by_debug() {
        let auth = Auth::Password(Secret::new("hunter2"));
        assert!(!format!("{auth:?}").contains("hunter2"));
        assert!(serde_json::to_string(&auth).unwrap().contains("hunter2"));
    }

    #[test]
    fn memory_is_rounded_up_to_whole_mib() {
        assert_eq!(Memory::from_bytes((256 << 20) + 1).mib_up(), 257);
        assert_eq!(Memory::from_mib(2048).to_string(), "2 GiB");
        assert_eq!(Memory::from_mib(300).to_string(), "300 MiB");
    }

    #[test]
    fn zero_cpus_cannot_be_said() {
        assert!(serde_json::from_str::<Cpus>("0").is_err());
        assert!(Cpus::new(0).is_none());
    }
}
