//! Facts about this host for the Node object.

use std::{fs, path::Path};

/// What a Node tells about its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) os: &'static str,
    pub(crate) arch: &'static str,
    pub(crate) kernel: String,
    pub(crate) os_image: String,
    pub(crate) boot_id: String,
    pub(crate) machine_id: String,
    pub(crate) system_uuid: String,
}

impl Host {
    /// Reads them. What can't be read is empty: they inform.
    pub(crate) fn read() -> Self {
        let machine_id = file("/etc/machine-id");
        let system_uuid = file("/sys/class/dmi/id/product_uuid");
        Self {
            os: if cfg!(target_os = "macos") { "darwin" } else { "linux" },
            arch: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            kernel: sysinfo::System::kernel_version().unwrap_or_default(),
            os_image: sysinfo::System::long_os_version().unwrap_or_default(),
            boot_id: file("/proc/sys/kernel/random/boot_id"),
            system_uuid: if system_uuid.is_empty() { machine_id.clone() } else { system_uuid },
            machine_id,
        }
    }
}

fn file(path: &str) -> String {
    fs::read_to_string(Path::new(path)).map(|text| text.trim().to_owned()).unwrap_or_default()
}
