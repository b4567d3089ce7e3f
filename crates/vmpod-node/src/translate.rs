//! From a pod and an image to a machine. Pure.

use std::path::PathBuf;

use k8s_openapi::api::core::v1::{Container, Pod};
use vmpod_api::annotations;
use vmpod_image::{
    Architecture, ClonedBoot, ClonedImage, Config, DeviceKind, DiskFormat as ImageDiskFormat,
    Firmware as ImageFirmware, Os, SeedKind,
};
use vmpod_machine::{
    Accel, Access, Arch, Auth, Boot, Cpus, Devices, Disk, DiskFormat, Firmware, Forward, GuestOs, Mac, MacAddr,
    MachineId, Memory, Network, Protocol, Secret, Seed, SeedForm, Share, Spec,
};

use crate::{
    network,
    options::MachineDefaults,
    pod::{self, PodUid},
    quantity::Nanos,
};

/// Why a pod and its image don't make a machine: reason `CreateContainerError`, with this message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TranslateError {
    #[error(
        "image {image} needs at least {needs} of memory, and the container gets {gets}: raise its memory request or limit"
    )]
    Memory { image: String, needs: Memory, gets: Memory },
    #[error(
        "image {image} needs at least {needs} processors, and the container gets {gets}: raise its cpu request or limit"
    )]
    Cpus { image: String, needs: u32, gets: u32 },
    #[error("image {image} holds a {os} guest, which this node can't run")]
    Os { image: String, os: Os },
    #[error(
        "image {image} doesn't say on which hardware its macOS was installed, or lacks its auxiliary storage: make it anew from a working machine"
    )]
    NoMac { image: String },
    #[error(
        "image {image} reads no first-boot seed and names no password, so there is no way into its guest: name a Secret with one in the annotation {}, or give the node one (--guest-user)",
        annotations::GUEST_LOGIN_SECRET
    )]
    NoAccess { image: String },
}

/// How large a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) cpus: Cpus,
    pub(crate) memory: Memory,
    /// The least size of the first disk, bytes.
    pub(crate) disk: Option<u64>,
}

/// The machine's size: the container's limits, else its requests, else what the image needs, else the node's default.
pub(crate) fn size(
    container: &Container,
    image: &str,
    config: &Config,
    defaults: MachineDefaults,
) -> Result<Size, TranslateError> {
    let least_cpus = config.min_cpus.unwrap_or(1).max(1);
    let cpus = match pod::size(container, "cpu").map(Nanos::units_up).filter(|cpus| *cpus > 0) {
        Some(cpus) => u32::try_from(cpus).unwrap_or(u32::MAX),
        None => defaults.cpus.max(least_cpus),
    };
    if cpus < least_cpus {
        return Err(TranslateError::Cpus { image: image.to_owned(), needs: least_cpus, gets: cpus });
    }
    let memory = match pod::size(container, "memory").map(Nanos::units_up).filter(|bytes| *bytes > 0) {
        Some(bytes) => Memory::from_bytes(bytes),
        None => config.min_memory.map_or(defaults.memory, Memory::from_bytes),
    };
    let least_memory = Memory::from_bytes(config.min_memory.unwrap_or(0));
    if memory < least_memory {
        return Err(TranslateError::Memory { image: image.to_owned(), needs: least_memory, gets: memory });
    }
    let disk = pod::size(container, "ephemeral-storage").map(Nanos::units_up).filter(|bytes| *bytes > 0);
    Ok(Size { cpus: Cpus::new(cpus).unwrap_or(Cpus::ONE), memory, disk })
}

/// What a machine is made from.
pub(crate) struct Parts<'a> {
    pub(crate) id: MachineId,
    pub(crate) uid: &'a PodUid,
    pub(crate) pod: &'a Pod,
    pub(crate) container: &'a Container,
    pub(crate) image: &'a str,
    pub(crate) clone: &'a ClonedImage,
    pub(crate) size: Size,
    pub(crate) place: network::Place<'a>,
    /// The file of our private key for the guest.
    pub(crate) key: PathBuf,
    /// The keys that open a guest that reads a seed: ours, and the one with which the pod says to log in.
    pub(crate) authorized_keys: Vec<String>,
    pub(crate) user_data: Option<String>,
    /// How to log in, when that isn't as the image says: the user if it is another, and what proves it.
    pub(crate) login: Option<(Option<String>, Auth)>,
    /// How to log in when the image says nothing of it.
    pub(crate) usual_login: Option<(Option<String>, Auth)>,
    pub(crate) accel: Accel,
    /// The host's architecture.
    pub(crate) host: Option<Arch>,
    /// Whether ports below 1024 can be forwarded.
    pub(crate) low_ports: bool,
    /// The directories that the machine shares with the containers beside it.
    pub(crate) shares: Vec<Share>,
}

/// The port at a machine's address that leads to its SSH server, unless the pod wants it for itself.
const SSH_PORT: u16 = 2222;

/// The machine.
pub(crate) fn machine(parts: Parts<'_>) -> Result<Spec, TranslateError> {
    let config = &parts.clone.config;
    let guest = &config.guest;
    let apple = matches!(parts.place, network::Place::Vmnet(_));
    let os = match config.os {
        Os::Linux => GuestOs::Linux,
        Os::Darwin if apple => GuestOs::Macos,
        Os::Windows if !apple => GuestOs::Windows,
        Os::Darwin | Os::Windows | Os::Freebsd => {
            return Err(TranslateError::Os { image: parts.image.to_owned(), os: config.os });
        }
    };
    let mac = if os == GuestOs::Macos { Some(mac(&parts)?) } else { None };
    let form = match guest.seed {
        SeedKind::Nocloud => Some(SeedForm::Nocloud),
        SeedKind::Configdrive => Some(SeedForm::ConfigDrive),
        SeedKind::None => None,
    };
    let (user, auth) = match (parts.login, &guest.password) {
        (Some((user, auth)), _) => (user.unwrap_or_else(|| guest.user.clone()), auth),
        // cloudbase-init puts keys where an administrator's aren't looked for: a password that is known comes first.
        (None, Some(password)) if form != Some(SeedForm::Nocloud) => {
            (guest.user.clone(), Auth::Password(Secret::new(password.clone())))
        }
        (None, _) if form.is_some() => (guest.user.clone(), Auth::Key(parts.key)),
        (None, Some(password)) => (guest.user.clone(), Auth::Password(Secret::new(password.clone()))),
        (None, None) => match parts.usual_login {
            Some((user, auth)) => (user.unwrap_or_else(|| guest.user.clone()), auth),
            None => return Err(TranslateError::NoAccess { image: parts.image.to_owned() }),
        },
    };
    let arch = match config.architecture {
        Architecture::Amd64 => Arch::Amd64,
        Architecture::Arm64 => Arch::Arm64,
    };
    let network = match (&parts.place, network::interface(&parts.place, &parts.id, parts.uid, parts.pod)) {
        (network::Place::User(address), _) => {
            let (ssh_port, forwards) = ports(parts.container, parts.low_ports);
            vec![Network::User {
                address: *address,
                ssh_port,
                forwards,
                host_ports: network::host_ports(parts.container),
                mac: MacAddr::derive(parts.uid.as_str()),
            }]
        }
        (_, interface) => interface.into_iter().collect(),
    };
    Ok(Spec {
        seed: form.map(|form| Seed {
            form,
            instance_id: parts.id.to_string(),
            hostname: pod::hostname(parts.pod),
            authorized_keys: parts.authorized_keys,
            user_data: parts.user_data,
            vendor_data: (form == SeedForm::Nocloud).then(|| vendor_data(&guest.user)),
            network_config: None,
        }),
        id: parts.id,
        cpus: parts.size.cpus,
        memory: parts.size.memory,
        arch,
        os,
        boot: match &parts.clone.boot {
            ClonedBoot::Kernel { kernel, initrd, cmdline } => {
                Boot::Kernel { kernel: kernel.clone(), initrd: initrd.clone(), cmdline: cmdline.clone() }
            }
            ClonedBoot::Firmware(firmware) => Boot::Firmware(match firmware {
                ImageFirmware::Bios => Firmware::Bios,
                ImageFirmware::Uefi => Firmware::Uefi,
                ImageFirmware::Secure => Firmware::Secure,
            }),
        },
        disks: parts
            .clone
            .disks
            .iter()
            .map(|disk| Disk {
                path: disk.path.clone(),
                format: match disk.format {
                    ImageDiskFormat::Raw => DiskFormat::Raw,
                    ImageDiskFormat::Qcow2 => DiskFormat::Qcow2,
                },
            })
            .collect(),
        networks: network,
        access: Access { user, auth, ready_marker: guest.ready_marker.clone(), port: guest.ssh_port },
        // Another architecture's instructions can only be emulated.
        accel: if parts.host == Some(arch) { parts.accel } else { Accel::Tcg },
        snapshot: None,
        mac,
        devices: match config.hardware.devices {
            DeviceKind::Virtio => Devices::Virtio,
            DeviceKind::Emulated => Devices::Emulated,
        },
        tpm: config.hardware.tpm,
        shares: parts.shares,
    })
}

/// The hardware of a macOS image. Each machine has a copy of the auxiliary storage, and an identifier of its own when the pod asks
/// for one.
fn mac(parts: &Parts<'_>) -> Result<Mac, TranslateError> {
    let missing = || TranslateError::NoMac { image: parts.image.to_owned() };
    let identity = parts.clone.config.macos.as_ref().ok_or_else(missing)?;
    let own = pod::annotation(parts.pod, annotations::MAC_IDENTIFIER) == Some("new");
    Ok(Mac {
        hardware_model: identity.hardware_model.clone(),
        machine_identifier: (!own).then(|| identity.machine_identifier.clone()),
        auxiliary_storage: parts.clone.nvram.clone().ok_or_else(missing)?,
    })
}

/// The SSH port and the forwarded ports: the container's own `ports`, at the same numbers.
fn ports(container: &Container, low: bool) -> (u16, Vec<Forward>) {
    let mut forwards: Vec<Forward> = Vec::new();
    for port in container.ports.iter().flatten() {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some(_) => continue,
        };
        let Ok(number) = u16::try_from(port.container_port) else { continue };
        let forward = Forward { protocol, host_port: number, guest_port: number };
        if number != 0 && (number >= 1024 || low) && !forwards.contains(&forward) {
            forwards.push(forward);
        }
    }
    let taken = |port: u16| forwards.iter().any(|f| f.protocol == Protocol::Tcp && f.host_port == port);
    let ssh = (SSH_PORT..=u16::MAX).find(|port| !taken(*port)).unwrap_or(SSH_PORT);
    (ssh, forwards)
}

/// What cloud-init does on our behalf, overridden by the user's own data: our key opens the user that the image names.
fn vendor_data(user: &str) -> String {
    let config = if user == "root" {
        serde_json::json!({"disable_root": false})
    } else {
        serde_json::json!({"user": {"name": user}})
    };
    // JSON is YAML.
    format!("#cloud-config\n{config}\n")
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "JSON is written in place")]
mod tests {
    use serde_json::{Value, json};
    use vmpod_image::{Boot as ImageBoot, ClonedDisk, GuestConfig, Hardware};

    use super::*;

    const UID: &str = "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f8a";

    fn config(guest: GuestConfig) -> Config {
        Config {
            os: Os::Linux,
            architecture: Architecture::Amd64,
            boot: ImageBoot::Firmware(ImageFirmware::Uefi),
            disks: Vec::new(),
            min_cpus: Some(2),
            min_memory: Some(256 << 20),
            macos: None,
            hardware: Hardware::default(),
            guest,
            labels: std::collections::BTreeMap::new(),
        }
    }

    fn container(resources: Value) -> Container {
        serde_json::from_value(json!({"name": "vm", "resources": resources,
            "ports": [{"containerPort": 8080}, {"containerPort": 2222}, {"containerPort": 53, "protocol": "UDP"}]}))
        .unwrap()
    }

    fn spec(guest: GuestConfig, low_ports: bool) -> Result<Spec, TranslateError> {
        made(config(guest), json!({}), |parts| parts.low_ports = low_ports)
    }

    /// The machine of an image and a pod with these annotations, made from otherwise usual parts.
    fn made(config: Config, annotations: Value, change: impl FnOnce(&mut Parts<'_>)) -> Result<Spec, TranslateError> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "web", "annotations": annotations}})).unwrap();
        let uid = PodUid::parse(UID).unwrap();
        let container = container(json!({"limits": {"cpu": "2500m", "memory": "1Gi"}}));
        let clone = ClonedImage {
            digest: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
            config: config.clone(),
            boot: ClonedBoot::Firmware(ImageFirmware::Uefi),
            disks: vec![ClonedDisk { path: "/m/disk0".into(), format: ImageDiskFormat::Qcow2, size: 1 << 30 }],
            nvram: config.macos.is_some().then(|| "/m/nvram".into()),
        };
        let mut parts = Parts {
            id: uid.machine(0),
            uid: &uid,
            pod: &pod,
            container: &container,
            image: "tiny",
            size: size(&container, "tiny", &config, MachineDefaults::default())?,
            clone: &clone,
            place: network::Place::User([127, 64, 0, 9].into()),
            key: "/m/key".into(),
            authorized_keys: vec!["ssh-ed25519 AAAA".to_owned()],
            user_data: Some("#!/bin/sh\n".to_owned()),
            login: None,
            usual_login: None,
            accel: Accel::Kvm,
            host: Some(Arch::Amd64),
            low_ports: false,
            shares: Vec::new(),
        };
        change(&mut parts);
        machine(parts)
    }

    /// As macOS-vz-kubelet's images are: a Mac that tells no password.
    fn mac() -> Config {
        let guest = GuestConfig { seed: SeedKind::None, ..GuestConfig::default() };
        let identity =
            vmpod_image::MacIdentity { hardware_model: "bQ==".to_owned(), machine_identifier: "aQ==".to_owned() };
        Config { os: Os::Darwin, macos: Some(identity), ..config(guest) }
    }

    fn on_apple(parts: &mut Parts<'_>) {
        parts.place = network::Place::Vmnet(None);
        parts.usual_login = Some((Some("ci".to_owned()), Auth::Password(Secret::new("usual"))));
    }

    #[test]
    fn a_mac_has_its_images_hardware_and_a_copy_of_its_storage() {
        let spec = made(mac(), json!({}), on_apple).unwrap();
        let mac_ = spec.mac.unwrap();
        assert_eq!((mac_.hardware_model.as_str(), mac_.machine_identifier.as_deref()), ("bQ==", Some("aQ==")));
        assert_eq!(mac_.auxiliary_storage, PathBuf::from("/m/nvram"));
        assert_eq!(spec.os, GuestOs::Macos);
        assert!(matches!(&spec.networks[..], [Network::Vmnet { bridged: None, .. }]));
        let own = made(mac(), json!({"vmpod.dev/mac-identifier": "new"}), on_apple).unwrap();
        assert_eq!(own.mac.unwrap().machine_identifier, None, "it gets one of its own");
    }

    #[test]
    fn what_only_one_hypervisor_runs_is_refused_by_the_other() {
        assert!(matches!(made(mac(), json!({}), |_| {}), Err(TranslateError::Os { os: Os::Darwin, .. })));
        let windows = Config { os: Os::Windows, ..config(GuestConfig::default()) };
        assert!(matches!(made(windows, json!({}), on_apple), Err(TranslateError::Os { os: Os::Windows, .. })));
        let nameless = Config { macos: None, ..mac() };
        assert!(matches!(made(nameless, json!({}), on_apple), Err(TranslateError::NoMac { .. })));
    }

    #[test]
    fn the_pods_login_comes_before_the_images_and_the_nodes_is_the_last() {
        let entered = |config: Config, login: Option<(Option<String>, Auth)>| {
            let access = made(config, json!({}), |parts| {
                on_apple(parts);
                parts.login = login;
            })
            .unwrap()
            .access;
            (access.user, access.auth)
        };
        let password = |text: &str| Auth::Password(Secret::new(text));
        assert_eq!(entered(mac(), None), ("ci".to_owned(), password("usual")));
        let mut told = mac();
        told.guest.password = Some("admin".to_owned());
        told.guest.user = "admin".to_owned();
        assert_eq!(entered(told.clone(), None), ("admin".to_owned(), password("admin")));
        let key = Auth::Key("/m/login_key".into());
        assert_eq!(entered(told, Some((None, key.clone()))), ("admin".to_owned(), key));
    }

    #[test]
    fn a_pod_and_an_image_make_a_machine() {
        insta::assert_json_snapshot!(spec(GuestConfig::default(), false).unwrap());
    }

    #[test]
    fn low_ports_are_forwarded_where_they_can_be() {
        let Network::User { forwards, ssh_port, .. } = spec(GuestConfig::default(), true).unwrap().networks.remove(0)
        else {
            panic!()
        };
        assert_eq!(ssh_port, 2223, "the pod's own port 2222 comes first");
        assert_eq!(forwards.len(), 3);
    }

    #[test]
    fn guests_without_seed_are_entered_by_password() {
        let guest = GuestConfig { seed: SeedKind::None, password: Some("admin".to_owned()), ..GuestConfig::default() };
        let spec_ = spec(guest, false).unwrap();
        assert_eq!((spec_.seed, spec_.access.auth), (None, Auth::Password(Secret::new("admin"))));
        let guest = GuestConfig { seed: SeedKind::None, ..GuestConfig::default() };
        assert!(matches!(spec(guest, false), Err(TranslateError::NoAccess { .. })));
    }

    #[test]
    fn sizes_come_from_limits_requests_image_and_node_in_this_order() {
        let of = |resources: Value| {
            size(&container(resources), "tiny", &config(GuestConfig::default()), MachineDefaults::default())
        };
        let got = of(json!({"requests": {"cpu": "2", "memory": "300Mi"}, "limits": {"memory": "512Mi", "ephemeral-storage": "8Gi"}})).unwrap();
        assert_eq!((got.cpus.get(), got.memory, got.disk), (2, Memory::from_mib(512), Some(8 << 30)));
        let got = of(json!({})).unwrap();
        assert_eq!((got.cpus.get(), got.memory, got.disk), (2, Memory::from_mib(256), None));
        let too_small = of(json!({"limits": {"memory": "64Mi"}})).unwrap_err();
        assert_eq!(
            too_small.to_string(),
            "image tiny needs at least 256 MiB of memory, and the container gets 64 MiB: raise its memory request or limit"
        );
        assert!(matches!(of(json!({"limits": {"cpu": "1"}})), Err(TranslateError::Cpus { needs: 2, gets: 1, .. })));
    }
}
