//! What a machine is to be: a value that is written to `spec.json` and never changes afterwards.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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

/// What a guest that reads a `NoCloud` seed learns at boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
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
        /// The interface's hardware address.
        mac: MacAddr,
    },
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

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

/// Why a text is no [`MacAddr`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is no hardware address: six two-digit hexadecimal octets with ':' between are wanted")]
pub struct InvalidMac(String);

impl MacAddr {
    /// An address from its octets.
    #[must_use]
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The address that belongs to `name` (a pod's UID, say): locally administered, unicast, always the same.
    #[must_use]
    pub fn derive(name: &str) -> Self {
        let id = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, format!("vmpod:mac:{name}").as_bytes());
        let mut octets = [0x02; 6];
        octets[1..].copy_from_slice(&id.as_bytes()[..5]);
        Self(octets)
    }

    /// The octets.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, octet) in self.0.iter().enumerate() {
            let colon = if index == 0 { "" } else { ":" };
            write!(f, "{colon}{octet:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for MacAddr {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || InvalidMac(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part =
                parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit())).ok_or_else(bad)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(octets)) }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
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

    /// The address at which this host reaches the guest's SSH server, when there is one.
    #[must_use]
    pub fn ssh_address(&self) -> Option<std::net::SocketAddr> {
        if self.snapshot == Some(Snapshot::Make) {
            // Its interfaces lead nowhere, and the address is that of another machine.
            return None;
        }
        let Network::User { address, ssh_port, .. } = self.networks.first()?;
        Some((*address, *ssh_port).into())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

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
        }
    }

    proptest! {
        #[test]
        fn a_mac_survives_its_text(octets in any::<[u8; 6]>()) {
            let mac = MacAddr::new(octets);
            prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
        }

        #[test]
        fn a_derived_mac_is_local_and_unicast(name in "\\PC*") {
            prop_assert_eq!(MacAddr::derive(&name).octets()[0] & 0b11, 0b10);
            prop_assert_eq!(MacAddr::derive(&name), MacAddr::derive(&name));
        }
    }

    #[test]
    fn malformed_macs_are_refused() {
        for bad in
            ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "zz:00:00:00:00:00", "02-00-00-00-00-00"]
        {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad:?}");
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
