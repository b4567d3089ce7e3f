//! From a [`Spec`] to QEMU's command line. Pure, so that every change of it shows in a snapshot.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::Path;

use serde_json::json;

use super::{SOCKET, VARIABLES, shares, tpm};
use crate::spec::{
    Accel, Arch, Boot, Devices, DiskFormat, Firmware, Forward, GuestOs, Network, Protocol, SeedForm, Snapshot, Spec,
};
use crate::{renewal, seed, template};

/// The arguments of the QEMU process for `spec`.
///
/// The process's working directory is the machine's directory; sockets and our own files are named relative to it, which
/// also keeps socket paths under the kernel's 108 bytes. `firmware` is the UEFI code, when the machine boots by UEFI. `vhost` says
/// that the kernel can move a bridge's packets itself.
#[must_use]
pub fn args(spec: &Spec, firmware: Option<&Path>, vhost: bool) -> Vec<OsString> {
    let mut line = Line(Vec::new());
    line.add("-name", spec.id.as_str());
    line.add("-uuid", spec.id.uuid().to_string());
    // Only what is named here: no default devices, nobody's configuration files.
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    line.add("-display", "none");
    line.add("-machine", machine(spec));
    match spec.accel {
        // One host thread per virtual processor.
        Accel::Tcg => line.add("-accel", "tcg,thread=multi"),
        accel => line.add("-accel", accel.to_string()),
    }
    line.add("-cpu", processor(spec));
    let cpus = spec.cpus.get();
    line.add("-smp", format!("{cpus},sockets=1,cores={cpus},threads=1"));
    memory(&mut line, spec);

    line.add("-chardev", format!("socket,id=control,path={SOCKET},server=on,wait=off"));
    line.add("-mon", "chardev=control,mode=control");
    // Logged by QEMU itself, whether an agent looks or not; the socket is for whoever wants to type.
    line.add("-chardev", "socket,id=console,path=console.sock,server=on,wait=off,logfile=console.log,logappend=on");
    line.add("-serial", "chardev:console");
    // Leaves the cause of the end in the process's log, for an agent that comes later.
    line.add("-trace", "qemu_system_shutdown_request");

    boot(&mut line, spec, firmware);
    if spec.os == GuestOs::Windows {
        // Windows keeps its clock in local time, and sets itself up on a display.
        line.add("-rtc", "base=localtime,driftfix=slew");
        line.add("-device", "VGA");
    }
    if spec.tpm {
        line.add("-chardev", format!("socket,id=tpm,fd={}", tpm::DESCRIPTOR));
        line.add("-tpmdev", "emulator,id=tpm0,chardev=tpm");
        let device = if spec.arch == Arch::Amd64 { "tpm-crb" } else { "tpm-tis-device" };
        line.add("-device", format!("{device},tpmdev=tpm0"));
    }
    if spec.devices == Devices::Virtio {
        line.add("-device", "virtio-rng-pci");
    }
    if spec.snapshot.is_some() {
        line.add("-device", "virtio-serial-pci,id=ports");
        line.add("-chardev", format!("socket,id=renew,path={},server=on,wait=off", renewal::SOCKET));
        line.add("-device", format!("virtserialport,chardev=renew,name={}", renewal::PORT));
    }
    disks(&mut line, spec);
    for (index, network) in spec.networks.iter().enumerate() {
        if spec.snapshot == Some(Snapshot::Make) {
            // The same device in the same place, without anything behind it: a copy of this machine may be on any network.
            line.add("-device", "virtio-net-pci,romfile=");
            continue;
        }
        match network {
            Network::User { address, ssh_port, forwards, host_ports, .. } => {
                let ssh = Forward { protocol: Protocol::Tcp, host_port: *ssh_port, guest_port: spec.access.port };
                let ports: Vec<_> =
                    std::iter::once(&ssh).chain(forwards).map(|port| forward(*address, *port)).collect();
                let hosts = host_ports.iter().map(|port| {
                    let inside =
                        Forward { protocol: port.protocol, host_port: port.host_port, guest_port: port.guest_port };
                    forward(port.host.unwrap_or(Ipv4Addr::UNSPECIFIED), inside)
                });
                line.add("-netdev", format!("user,id=net{index}{}{}", ports.concat(), hosts.collect::<String>()));
            }
            // Refused before anybody asks for a command line.
            Network::Vmnet { .. } => continue,
            Network::Tap { interface, .. } => {
                let vhost = if vhost { ",vhost=on" } else { "" };
                line.add("-netdev", format!("tap,id=net{index},ifname={interface},script=no,downscript=no{vhost}"));
            }
        }
        // Without its ROM: nobody boots from this network, and loading it takes time.
        let card = match spec.devices {
            Devices::Virtio => "virtio-net-pci",
            Devices::Emulated => "e1000e",
        };
        line.add("-device", format!("{card},netdev=net{index},mac={},romfile=", network.mac()));
    }
    for (index, share) in spec.shares.iter().enumerate() {
        line.add("-chardev", format!("socket,id=share{index},fd={}", shares::descriptor(index)));
        line.add("-device", format!("vhost-user-fs-pci,chardev=share{index},tag={}", share.tag));
    }
    if spec.template().is_some() {
        line.add("-incoming", "defer");
    }
    line.0
}

/// A snapshot's memory is a file: written by the machine that makes it, mapped privately by those that come from it, which
/// share what they don't change.
fn memory(line: &mut Line, spec: &Spec) {
    let size = format!("{}M", spec.memory.mib_up());
    let file = match &spec.snapshot {
        None => None,
        Some(Snapshot::Make) => Some((Path::new(template::MEMORY).to_owned(), "share=on")),
        Some(Snapshot::From(template)) => Some((template.join(template::MEMORY), "share=off,readonly=on,rom=off")),
    };
    if !spec.shares.is_empty() {
        // Whoever serves a directory reads and writes the guest's memory.
        line.add("-object", format!("memory-backend-memfd,id=ram,size={size},share=on"));
        line.add("-machine", "memory-backend=ram");
    }
    if let Some((path, how)) = file {
        // In QEMU's option syntax a comma in a value is written twice.
        let path = path.to_string_lossy().replace(',', ",,");
        line.add("-object", format!("memory-backend-file,id=ram,size={size},mem-path={path},{how}"));
        line.add("-machine", "memory-backend=ram");
    }
    line.add("-m", size);
}

fn forward(address: Ipv4Addr, port: Forward) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!(",hostfwd={protocol}:{address}:{}-:{}", port.host_port, port.guest_port)
}

struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn add(&mut self, flag: &str, value: impl Into<OsString>) {
        self.0.push(flag.into());
        self.0.push(value.into());
    }
}

/// The processor that the guest sees. Windows is told that it is a guest, by Hyper-V's names: it spins less, and keeps time without
/// interrupts (<https://www.qemu.org/docs/master/system/i386/hyperv.html>). Emulated processors have none of that.
fn processor(spec: &Spec) -> &'static str {
    match (spec.accel, spec.os, spec.arch) {
        (Accel::Tcg, ..) => "max",
        (Accel::Kvm, GuestOs::Windows, Arch::Amd64) => {
            "host,hv-relaxed,hv-vapic,hv-spinlocks=0x1fff,hv-vpindex,hv-runtime,hv-synic,hv-stimer,hv-time,hv-frequencies,hv-tlbflush,hv-ipi,hv-reset"
        }
        _ => "host",
    }
}

fn machine(spec: &Spec) -> &'static str {
    match (spec.arch, &spec.boot) {
        (Arch::Arm64, _) => "virt,gic-version=max",
        (Arch::Amd64, Boot::Firmware(Firmware::Secure)) => "q35,smm=on",
        // Common hardware is on the newer machine.
        (Arch::Amd64, Boot::Firmware(Firmware::Uefi)) => "q35",
        (Arch::Amd64, _) if spec.devices == Devices::Emulated => "q35",
        // The older machine has fewer devices to look for, and boots a kernel sooner.
        (Arch::Amd64, _) => "pc",
    }
}

fn boot(line: &mut Line, spec: &Spec, firmware: Option<&Path>) {
    match &spec.boot {
        // It was loaded before the snapshot was taken.
        Boot::Kernel { .. } if spec.template().is_some() => {}
        Boot::Kernel { kernel, initrd, cmdline } => {
            line.add("-kernel", kernel);
            if let Some(initrd) = initrd {
                line.add("-initrd", initrd);
            }
            line.add("-append", cmdline);
        }
        Boot::Firmware(kind) => {
            line.add("-boot", "strict=on");
            if let Some(code) = firmware {
                for (node, file, read_only) in [("code", code, true), ("variables", Path::new(VARIABLES), false)] {
                    let drive = json!({
                        "driver": "raw", "node-name": node, "read-only": read_only,
                        "file": {"driver": "file", "filename": file},
                    });
                    line.add("-blockdev", drive.to_string());
                }
                line.add("-machine", "pflash0=code,pflash1=variables");
                if *kind == Firmware::Secure && spec.arch == Arch::Amd64 {
                    line.add("-global", "driver=cfi.pflash01,property=secure,value=on");
                }
            }
        }
    }
}

/// The name of a disk's node, in the order of [`Spec::disks`].
pub(super) fn disk_node(index: usize) -> String {
    format!("disk{index}")
}

/// Disks are virtio-blk. Guest flushes are not passed on (`no-flush`): a machine's disk is a throwaway overlay that dies
/// with its machine, and a machine doesn't survive its host. What the guest wrote stays in the host's page cache when
/// QEMU is killed, so it can still be read and captured afterwards; only a crash of the host loses it, and fsync in the
/// guest, which dominates package installs and database tests, costs nothing. Discards shrink the file again.
///
/// A write that fails is reported to the guest. By itself QEMU would stop the whole guest when the host's disk is full, and
/// nobody would see why.
fn disks(line: &mut Line, spec: &Spec) {
    // Windows looks for answers on discs, and finds them without a driver that it may not have yet.
    let emulated = spec.devices == Devices::Emulated;
    let disc = spec.seed.as_ref().is_some_and(|seed| emulated || seed.form == SeedForm::ConfigDrive);
    if disc || emulated {
        // A controller of our own: its ports have the same names on every kind of machine.
        line.add("-device", "ich9-ahci,id=sata");
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let node = disk_node(index);
        let format = match disk.format {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        };
        // As JSON, so that a comma in a path is only a comma.
        let drive = json!({
            "driver": format, "node-name": node, "discard": "unmap",
            "cache": {"direct": false, "no-flush": true},
            "file": {
                "driver": "file", "filename": disk.path, "discard": "unmap", "aio": "threads",
                "cache": {"direct": false, "no-flush": true},
            },
        });
        line.add("-blockdev", drive.to_string());
        // Only for firmware: a kernel that QEMU loads itself takes the first place in the boot order.
        let first = index == 0 && matches!(spec.boot, Boot::Firmware(_));
        let bootindex = if first { ",bootindex=0" } else { "" };
        let device = match spec.devices {
            Devices::Virtio => "virtio-blk-pci".to_owned(),
            Devices::Emulated => format!("ide-hd,bus=sata.{index}"),
        };
        line.add("-device", format!("{device},id=blk{index},drive={node},werror=report,rerror=report{bootindex}"));
    }
    if spec.seed.is_some() {
        // A copy goes on with the disk that the snapshot's guest saw; what is its own it hears otherwise.
        let file = spec.template().map_or_else(|| seed::FILE.into(), |template| template.join(seed::FILE));
        let drive = json!({
            "driver": "raw", "node-name": "seed", "read-only": true,
            "file": {"driver": "file", "filename": file, "read-only": true},
        });
        line.add("-blockdev", drive.to_string());
        let device = if disc { "ide-cd,bus=sata.5" } else { "virtio-blk-pci" };
        line.add("-device", format!("{device},id=seed,drive=seed"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::spec;
    use crate::spec::{Assigned, HostPort};
    use crate::{Cpus, Disk, MacAddr, Memory, Seed, Share};

    fn show(spec: &Spec, firmware: Option<&Path>) -> String {
        let mut text = String::new();
        for argument in args(spec, firmware, true) {
            let argument = argument.into_string().unwrap();
            text.push_str(if argument.starts_with('-') { "\n" } else { " " });
            text.push_str(&argument);
        }
        text
    }

    fn seed() -> Seed {
        Seed {
            form: SeedForm::Nocloud,
            instance_id: "a".to_owned(),
            hostname: "a".to_owned(),
            authorized_keys: vec!["a secret place".to_owned()],
            user_data: Some("password: hunter2".to_owned()),
            vendor_data: None,
            network_config: None,
        }
    }

    #[test]
    fn a_kernel_without_disks() {
        let mut spec = spec("tiny-0");
        spec.seed = Some(seed());
        spec.networks = vec![Network::User {
            address: [127, 64, 0, 9].into(),
            ssh_port: 2222,
            forwards: vec![
                Forward { protocol: Protocol::Tcp, host_port: 8080, guest_port: 80 },
                Forward { protocol: Protocol::Udp, host_port: 53, guest_port: 53 },
            ],
            host_ports: vec![HostPort { protocol: Protocol::Tcp, host: None, host_port: 9000, guest_port: 90 }],
            mac: MacAddr::derive("tiny-0"),
        }];
        let text = show(&spec, None);
        assert!(!text.contains("hunter2") && !text.contains("secret place"));
        insta::assert_snapshot!(text);
    }

    #[test]
    fn firmware_with_disks() {
        let mut spec = spec("debian-0");
        spec.cpus = Cpus::new(4).unwrap();
        spec.memory = Memory::from_bytes((1 << 30) + 1);
        spec.accel = Accel::Kvm;
        spec.boot = Boot::Firmware(Firmware::Secure);
        spec.disks = vec![
            Disk { path: "/a,b/\"root\".qcow2".into(), format: DiskFormat::Qcow2 },
            Disk { path: "data.raw".into(), format: DiskFormat::Raw },
        ];
        insta::assert_snapshot!(show(&spec, Some(Path::new("/usr/share/OVMF/OVMF_CODE_4M.ms.fd"))));
    }

    #[test]
    fn a_kernel_with_a_disk_needs_no_place_in_the_boot_order() {
        let mut spec = spec("a");
        spec.disks = vec![Disk { path: "root.qcow2".into(), format: DiskFormat::Qcow2 }];
        let text = show(&spec, None);
        assert!(text.ends_with("-device virtio-blk-pci,id=blk0,drive=disk0,werror=report,rerror=report"), "{text}");
    }

    #[test]
    fn a_template_and_its_copy_have_the_same_devices() {
        let mut spec = spec("tiny-0");
        spec.seed = Some(seed());
        spec.networks = vec![Network::User {
            address: [127, 64, 0, 9].into(),
            ssh_port: 2222,
            forwards: Vec::new(),
            host_ports: Vec::new(),
            mac: MacAddr::derive("tiny-0"),
        }];
        let devices = |spec: &Spec| -> Vec<String> {
            let all = args(spec, None, true);
            all.windows(2)
                .filter(|pair| pair[0] == "-device")
                .map(|pair| pair[1].to_string_lossy().split(',').next().unwrap().to_owned())
                .collect()
        };
        spec.snapshot = Some(Snapshot::Make);
        let (base_devices, base) = (devices(&spec), show(&spec, None));
        spec.snapshot = Some(Snapshot::From("/t,1".into()));
        let (copied, copy) = (devices(&spec), show(&spec, None));
        assert_eq!(base_devices, copied);
        assert!(!base.contains("hostfwd") && base.contains("mem-path=ram,share=on"), "{base}");
        assert!(!copy.contains("-kernel") && copy.contains("mem-path=/t,,1/ram,share=off"), "{copy}");
        insta::assert_snapshot!(copy);
    }

    #[test]
    fn a_port_of_a_bridge() {
        let mut spec = spec("tiny-0");
        spec.networks = vec![Network::Tap {
            interface: "vmp0123456789a".to_owned(),
            bridge: "vmpod0".to_owned(),
            address: Some(Assigned {
                address: [10, 201, 0, 7].into(),
                prefix: 16,
                gateway: [10, 201, 0, 1].into(),
                dns: [10, 201, 0, 1].into(),
            }),
            mac: MacAddr::derive("tiny-0"),
            hostname: "tiny".to_owned(),
            isolated: false,
            host_ports: Vec::new(),
        }];
        let text = show(&spec, None);
        let wanted = "-netdev tap,id=net0,ifname=vmp0123456789a,script=no,downscript=no,vhost=on\n-device virtio-net-pci,netdev=net0,mac=";
        assert!(text.contains(wanted), "{text}");
        assert_eq!(spec.ssh_address(), Some(([10, 201, 0, 7], 22).into()));
    }

    #[test]
    fn a_shared_directory_is_served_from_the_guests_own_memory() {
        let mut spec = spec("tiny-0");
        spec.shares = vec![Share { tag: "vmpod".to_owned(), path: "/pods/u/shared".into() }];
        let text = show(&spec, None);
        for wanted in [
            "\n-object memory-backend-memfd,id=ram,size=256M,share=on\n-machine memory-backend=ram\n-m 256M\n",
            "\n-chardev socket,id=share0,fd=10\n-device vhost-user-fs-pci,chardev=share0,tag=vmpod",
        ] {
            assert!(text.contains(wanted), "{text}");
        }
        assert!(!text.contains("/pods/u"), "QEMU itself doesn't see the directory: {text}");
    }

    #[test]
    fn windows_has_what_it_knows() {
        let mut spec = spec("windows-0");
        spec.os = GuestOs::Windows;
        spec.accel = Accel::Kvm;
        spec.boot = Boot::Firmware(Firmware::Secure);
        (spec.devices, spec.tpm) = (Devices::Emulated, true);
        spec.seed = Some(Seed { form: SeedForm::ConfigDrive, ..seed() });
        spec.disks = vec![Disk { path: "root.qcow2".into(), format: DiskFormat::Qcow2 }];
        spec.networks = vec![Network::User {
            address: [127, 64, 0, 9].into(),
            ssh_port: 2222,
            forwards: Vec::new(),
            host_ports: Vec::new(),
            mac: MacAddr::derive("windows-0"),
        }];
        let text = show(&spec, Some(Path::new("/usr/share/OVMF/OVMF_CODE_4M.ms.fd")));
        assert!(!text.contains("virtio"), "it may have no driver for it: {text}");
        insta::assert_snapshot!(text);
        // Where there are drivers the fast devices are better; a seed is found on a disc all the same.
        spec.devices = Devices::Virtio;
        let text = show(&spec, None);
        assert!(
            text.contains("-device virtio-blk-pci,id=blk0") && text.contains("-device ide-cd,bus=sata.5,id=seed"),
            "{text}"
        );
        // Emulated processors have nothing of Hyper-V.
        spec.accel = Accel::Tcg;
        assert!(!show(&spec, None).contains("hv-"));
    }

    #[test]
    fn another_architecture() {
        let mut spec = spec("arm");
        spec.arch = Arch::Arm64;
        assert!(show(&spec, None).contains("-machine virt,gic-version=max"));
    }
}
