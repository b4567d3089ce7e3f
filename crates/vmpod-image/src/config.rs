//! What an image says about itself: the native configuration, and what every other format is translated to.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The configuration of an image (`application/vnd.vmpod.config.v1+json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// The guest's operating system.
    pub os: Os,
    /// The guest's processor architecture.
    pub architecture: Architecture,
    /// How the guest starts.
    pub boot: Boot,
    /// The disks, in the order in which the guest sees them. May be empty when a kernel is booted directly.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// The fewest processors the guest runs with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_cpus: Option<u32>,
    /// The least memory the guest runs with, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_memory: Option<u64>,
    /// What a macOS guest is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub macos: Option<MacIdentity>,
    /// What hardware the guest needs beyond processors, memory and disks.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hardware: Hardware,
    /// How to reach and to prepare the guest.
    #[serde(default)]
    pub guest: GuestConfig,
    /// Free labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// An operating system, named as Go and OCI name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Os {
    /// Linux.
    #[default]
    Linux,
    /// macOS.
    Darwin,
    /// Windows.
    Windows,
    /// FreeBSD.
    Freebsd,
}

/// A processor architecture, named as Go and OCI name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// 64-bit x86.
    Amd64,
    /// 64-bit ARM.
    Arm64,
}

/// An operating system or architecture that isn't known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {name:?} isn't known: it must be one of {known}")]
pub struct UnknownName {
    what: &'static str,
    name: String,
    known: &'static str,
}

impl Os {
    /// The name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Darwin => "darwin",
            Self::Windows => "windows",
            Self::Freebsd => "freebsd",
        }
    }
}

impl FromStr for Os {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            "linux" => Ok(Self::Linux),
            "darwin" | "macos" | "macOS" => Ok(Self::Darwin),
            "windows" => Ok(Self::Windows),
            "freebsd" => Ok(Self::Freebsd),
            _ => Err(UnknownName {
                what: "operating system",
                name: name.to_owned(),
                known: "linux, darwin, windows, freebsd",
            }),
        }
    }
}

impl fmt::Display for Os {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Architecture {
    /// The architecture of this host.
    #[must_use]
    pub fn host() -> Self {
        if cfg!(target_arch = "aarch64") { Self::Arm64 } else { Self::Amd64 }
    }

    /// The name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

impl FromStr for Architecture {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            "amd64" | "x86_64" => Ok(Self::Amd64),
            "arm64" | "aarch64" => Ok(Self::Arm64),
            _ => Err(UnknownName { what: "architecture", name: name.to_owned(), known: "amd64, arm64" }),
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a guest starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boot {
    /// From its first disk, by firmware.
    Firmware(Firmware),
    /// From the image's kernel, given to the hypervisor.
    Kernel {
        /// The kernel's command line.
        cmdline: String,
    },
}

/// The firmware that starts a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// A PC's BIOS.
    Bios,
    /// UEFI.
    Uefi,
    /// UEFI with secure boot.
    Secure,
}

/// One disk of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskConfig {
    /// Its size in bytes, a multiple of 512.
    pub size: u64,
}

/// What hardware a guest needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Hardware {
    /// The kind of its devices.
    pub devices: DeviceKind,
    /// A TPM 2.0, as Windows 11 wants it.
    pub tpm: bool,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The kind of a guest's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Virtio: fast, and the guest needs drivers for it.
    #[default]
    Virtio,
    /// Those of common hardware, for guests without such drivers, such as Windows as it comes.
    Emulated,
}

/// What binds a macOS guest to a virtual Mac.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MacIdentity {
    /// `VZMacHardwareModel`'s data representation, base64.
    pub hardware_model: String,
    /// `VZMacMachineIdentifier`'s data representation, base64.
    pub machine_identifier: String,
}

/// How to reach and to prepare a guest.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestConfig {
    /// The user to log in as.
    pub user: String,
    /// The port of the guest's SSH server.
    pub ssh_port: u16,
    /// The user's password, for guests that read no seed. It is in the image for everyone to read: a default, no secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// How the guest learns its hostname and keys.
    pub seed: SeedKind,
    /// A line that the guest prints on its console once its SSH server listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_marker: Option<String>,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self { user: "root".to_owned(), ssh_port: 22, password: None, seed: SeedKind::Nocloud, ready_marker: None }
    }
}

impl fmt::Debug for GuestConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestConfig")
            .field("user", &self.user)
            .field("ssh_port", &self.ssh_port)
            .field("password", &self.password.as_ref().map(|_| "…"))
            .field("seed", &self.seed)
            .field("ready_marker", &self.ready_marker)
            .finish()
    }
}

/// How a guest learns its hostname and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum SeedKind {
    /// From a disk labelled `cidata` (cloud-init's `NoCloud`).
    #[default]
    Nocloud,
    /// From a disc labelled `config-2` (`OpenStack`'s config drive, which cloudbase-init reads); user data that is XML are answers for
    /// Windows' own set-up.
    Configdrive,
    /// Not at all.
    None,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_is_stable() {
        let config = Config {
            os: Os::Linux,
            architecture: Architecture::Amd64,
            boot: Boot::Kernel { cmdline: "console=ttyS0".to_owned() },
            disks: vec![DiskConfig { size: 1 << 30 }],
            min_cpus: Some(1),
            min_memory: Some(256 << 20),
            macos: None,
            hardware: Hardware::default(),
            guest: GuestConfig { ready_marker: Some("ready".to_owned()), ..GuestConfig::default() },
            labels: BTreeMap::from([("team".to_owned(), "ci".to_owned())]),
        };
        insta::assert_json_snapshot!(config);
        let firmware = Config { boot: Boot::Firmware(Firmware::Uefi), guest: GuestConfig::default(), ..config };
        let text = serde_json::to_string(&firmware).unwrap();
        assert!(text.contains(r#""boot":{"firmware":"uefi"}"#), "{text}");
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), firmware);
    }

    #[test]
    fn the_least_configuration_gets_defaults() {
        let config: Config =
            serde_json::from_str(r#"{"os":"linux","architecture":"arm64","boot":{"firmware":"bios"}}"#).unwrap();
        assert_eq!(config.guest, GuestConfig::default());
        assert!(config.disks.is_empty());
    }

    #[test]
    fn a_password_is_not_printed() {
        let guest = GuestConfig { password: Some("hunter2".to_owned()), ..GuestConfig::default() };
        assert!(!format!("{guest:?}").contains("hunter2"));
    }
}
