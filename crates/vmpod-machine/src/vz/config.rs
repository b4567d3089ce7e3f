//! From a [`Spec`] to what Apple's framework is told. Pure, so that every change of it shows in a snapshot.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::hypervisor::HypervisorError;
use crate::seed;
use crate::spec::{Arch, Boot, DiskFormat, Firmware, GuestOs, MacAddr, Network, Spec};

/// The variables of a guest that boots by EFI, in the machine's directory.
const VARIABLES: &str = "efivars.vz";

/// A `VZVirtualMachineConfiguration`, as data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Configuration {
    /// `CPUCount`.
    pub cpus: u32,
    /// `memorySize` in bytes, a multiple of 1 MiB as the framework wants it.
    pub memory: u64,
    /// `platform` and `bootLoader`, which belong together.
    pub platform: Platform,
    /// `storageDevices`, each a `VZVirtioBlockDeviceConfiguration`.
    pub disks: Vec<Disk>,
    /// `networkDevices`, each a `VZVirtioNetworkDeviceConfiguration`.
    pub networks: Vec<Interface>,
    /// The file to which the first serial port writes; it is appended to.
    pub console: PathBuf,
    /// `directorySharingDevices`, each a `VZVirtioFileSystemDeviceConfiguration` with a `VZSingleDirectoryShare`.
    pub shares: Vec<Shared>,
    /// The screen of a Mac, which is never shown. Without one its guest doesn't come up.
    pub display: Option<Display>,
}

/// A platform and what boots on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Platform {
    /// `VZMacPlatformConfiguration` with a `VZMacOSBootLoader`.
    Mac {
        /// Base64 of the hardware model's data representation.
        hardware_model: String,
        /// Base64 of the machine identifier's data representation; a new one is made when there is none.
        machine_identifier: Option<String>,
        /// The auxiliary storage.
        auxiliary_storage: PathBuf,
    },
    /// `VZGenericPlatformConfiguration` with a `VZEFIBootLoader`.
    Efi {
        /// The variable store; it is made when it isn't there.
        variables: PathBuf,
    },
    /// `VZGenericPlatformConfiguration` with a `VZLinuxBootLoader`.
    Kernel {
        /// The kernel: uncompressed, on Apple silicon.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// Its command line.
        cmdline: String,
    },
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// The image file, raw.
    pub path: PathBuf,
    /// Whether the guest can only read it.
    pub read_only: bool,
}

/// A directory of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shared {
    /// The name by which the guest mounts it; none for the one that macOS mounts by itself, at `/Volumes/My Shared Files`.
    pub tag: Option<String>,
    /// The directory.
    pub path: PathBuf,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// The interface of this host to bridge to; none for `VZNATNetworkDeviceAttachment`.
    pub bridged: Option<String>,
    /// The hardware address.
    pub mac: MacAddr,
}

/// A screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Display {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Pixels per inch.
    pub density: u32,
}

impl Display {
    /// What user interface tests find on a small desk.
    const USUAL: Self = Self { width: 1920, height: 1200, density: 80 };
}

/// What the framework is told; an error says what of the machine it can't do.
pub fn configuration(spec: &Spec, dir: &Path, host: Option<Arch>) -> Result<Configuration, HypervisorError> {
    let refuse = |why: String| Err(HypervisorError::Unsupported(why));
    if host != Some(spec.arch) {
        return refuse("Apple's Virtualization framework runs guests of the host's own architecture only".to_owned());
    }
    if spec.snapshot.is_some() {
        return refuse(
            "Apple's Virtualization framework has no memory snapshots that several machines share".to_owned(),
        );
    }
    let platform = match (spec.os, &spec.boot, &spec.mac) {
        (GuestOs::Macos, _, Some(mac)) => Platform::Mac {
            hardware_model: mac.hardware_model.clone(),
            machine_identifier: mac.machine_identifier.clone(),
            auxiliary_storage: mac.auxiliary_storage.clone(),
        },
        (GuestOs::Macos, _, None) => {
            return refuse("a macOS guest needs the hardware model and the auxiliary storage of its image".to_owned());
        }
        (GuestOs::Windows, ..) => {
            return refuse("Apple's Virtualization framework runs no Windows guests".to_owned());
        }
        (GuestOs::Linux, Boot::Kernel { kernel, initrd, cmdline }, _) => {
            Platform::Kernel { kernel: kernel.clone(), initrd: initrd.clone(), cmdline: cmdline.clone() }
        }
        (GuestOs::Linux, Boot::Firmware(Firmware::Uefi), _) => Platform::Efi { variables: dir.join(VARIABLES) },
        (GuestOs::Linux, Boot::Firmware(Firmware::Bios | Firmware::Secure), _) => {
            return refuse("Apple's Virtualization framework has UEFI only, without secure boot".to_owned());
        }
    };
    let mut disks = Vec::new();
    for disk in &spec.disks {
        if disk.format != DiskFormat::Raw {
            return refuse(format!(
                "Apple's Virtualization framework reads raw disks only, and {} isn't",
                disk.path.display()
            ));
        }
        disks.push(Disk { path: disk.path.clone(), read_only: false });
    }
    if spec.seed.is_some() {
        disks.push(Disk { path: dir.join(seed::FILE), read_only: true });
    }
    let mut networks = Vec::new();
    for network in &spec.networks {
        match network {
            Network::Vmnet { bridged, mac, .. } => networks.push(Interface { bridged: bridged.clone(), mac: *mac }),
            Network::User { .. } | Network::Tap { .. } => {
                return refuse(
                    "a machine of Apple's Virtualization framework is on one of Apple's networks".to_owned(),
                );
            }
        }
    }
    let mac = matches!(platform, Platform::Mac { .. });
    if mac && spec.shares.len() > 1 {
        return refuse("macOS mounts one shared directory by itself, and no other".to_owned());
    }
    let shares =
        spec.shares.iter().map(|share| Shared { tag: (!mac).then(|| share.tag.clone()), path: share.path.clone() });
    Ok(Configuration {
        shares: shares.collect(),
        cpus: spec.cpus.get(),
        memory: spec.memory.mib_up() << 20,
        display: mac.then_some(Display::USUAL),
        platform,
        disks,
        networks,
        console: dir.join("console.log"),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::spec::tests::spec;
    use crate::spec::{Auth, Disk as SpecDisk, Mac, Secret, Seed, SeedForm, Share, Snapshot};
    use crate::{Cpus, Memory};

    /// A machine of a macOS image.
    pub(crate) fn mac(name: &str) -> Spec {
        let mut spec = spec(name);
        spec.arch = Arch::host().unwrap();
        spec.os = GuestOs::Macos;
        spec.boot = Boot::Firmware(Firmware::Uefi);
        spec.cpus = Cpus::new(4).unwrap();
        spec.memory = Memory::from_bytes((8 << 30) + 1);
        spec.disks = vec![SpecDisk { path: "/m/disk-0.raw".into(), format: DiskFormat::Raw }];
        spec.access.auth = Auth::Password(Secret::new("admin"));
        spec.networks = vec![Network::Vmnet {
            bridged: None,
            mac: "02:cf:58:3b:87:a6".parse().unwrap(),
            hostname: "runner".to_owned(),
        }];
        spec.mac = Some(Mac {
            hardware_model: "bW9kZWw=".to_owned(),
            machine_identifier: Some("aWRlbnRpZmllcg==".to_owned()),
            auxiliary_storage: "/m/nvram".into(),
        });
        spec
    }

    fn refused(spec: &Spec) -> String {
        configuration(spec, Path::new("/m"), Arch::host()).unwrap_err().to_string()
    }

    #[test]
    fn a_mac_is_what_its_image_was_installed_on() {
        let configuration = configuration(&mac("a"), Path::new("/m"), Arch::host()).unwrap();
        insta::assert_yaml_snapshot!(configuration);
    }

    #[test]
    fn macos_mounts_what_is_shared_by_itself_and_linux_by_its_tag() {
        let mut machine = mac("a");
        machine.shares = vec![Share { tag: "vmpod".to_owned(), path: "/s".into() }];
        let shares = |spec: &Spec| configuration(spec, Path::new("/m"), Arch::host()).unwrap().shares;
        assert_eq!(shares(&machine), [Shared { tag: None, path: "/s".into() }]);
        (machine.os, machine.mac) = (GuestOs::Linux, None);
        assert_eq!(shares(&machine), [Shared { tag: Some("vmpod".to_owned()), path: "/s".into() }]);
    }

    #[test]
    fn a_linux_guest_boots_by_efi_or_by_its_kernel() {
        let mut machine = mac("a");
        machine.os = GuestOs::Linux;
        machine.mac = None;
        machine.seed = Some(Seed {
            form: SeedForm::Nocloud,
            instance_id: "a".to_owned(),
            hostname: "a".to_owned(),
            authorized_keys: Vec::new(),
            user_data: None,
            vendor_data: None,
            network_config: None,
        });
        let efi = configuration(&machine, Path::new("/m"), Arch::host()).unwrap();
        machine.boot = spec("a").boot;
        machine.networks.clear();
        let kernel = configuration(&machine, Path::new("/m"), Arch::host()).unwrap();
        insta::assert_yaml_snapshot!([efi, kernel]);
    }

    #[test]
    fn what_the_framework_can_not_do_is_said_beforehand() {
        let mut machine = mac("a");
        machine.disks[0].format = DiskFormat::Qcow2;
        insta::assert_snapshot!(refused(&machine), @"Apple's Virtualization framework reads raw disks only, and /m/disk-0.raw isn't");
        let mut machine = mac("a");
        machine.mac = None;
        insta::assert_snapshot!(refused(&machine), @"a macOS guest needs the hardware model and the auxiliary storage of its image");
        let mut machine = mac("a");
        machine.os = GuestOs::Windows;
        insta::assert_snapshot!(refused(&machine), @"Apple's Virtualization framework runs no Windows guests");
        let mut machine = mac("a");
        machine.shares = ["a", "b"].map(|tag| Share { tag: tag.to_owned(), path: "/s".into() }).into();
        insta::assert_snapshot!(refused(&machine), @"macOS mounts one shared directory by itself, and no other");
        let mut machine = mac("a");
        machine.snapshot = Some(Snapshot::Make);
        assert!(refused(&machine).contains("no memory snapshots"));
        let mut machine = mac("a");
        machine.os = GuestOs::Linux;
        machine.boot = Boot::Firmware(Firmware::Secure);
        assert!(refused(&machine).contains("without secure boot"));
        let other = if Arch::host() == Some(Arch::Arm64) { Arch::Amd64 } else { Arch::Arm64 };
        let error = configuration(&mac("a"), Path::new("/m"), Some(other)).unwrap_err();
        assert!(error.to_string().contains("the host's own architecture"));
    }
}
