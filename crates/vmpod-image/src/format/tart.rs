//! Tart's format: Apple-LZ4 chunks in the order of the disk.
//!
//! `disk.v2` chunks are streams of their own, each with its raw size and digest; the older `disk.v1` is one stream cut anywhere. An
//! image of stacked ASIF overlays needs macOS 27's own library and is refused.

use serde::Deserialize;

use super::{
    Documents, Encoding, FormatError, LARGEST_DISK, Layer, Plan, Target, annotation, blob, document, only, plain_file,
};
use crate::config::{Boot, Config, DiskConfig, Firmware, GuestConfig, Hardware, MacIdentity, Os, SeedKind};
use crate::digest::Digest;
use crate::manifest::Manifest;
use crate::store::record::Part;

pub(super) const CONFIG: &str = "application/vnd.cirruslabs.tart.config.v1";
const DISK_V1: &str = "application/vnd.cirruslabs.tart.disk.v1";
const DISK_V2: &str = "application/vnd.cirruslabs.tart.disk.v2";
const NVRAM: &str = "application/vnd.cirruslabs.tart.nvram.v1";
const ASIF: &str = "application/vnd.cirruslabs.tart.disk.asif.";
const RAW_SIZE: &str = "org.cirruslabs.tart.uncompressed-size";
const RAW_DIGEST: &str = "org.cirruslabs.tart.uncompressed-content-digest";
const DISK_SIZE: &str = "org.cirruslabs.tart.uncompressed-disk-size";

/// The virtual machine's configuration, as far as it matters here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TartConfig {
    os: Option<String>,
    arch: Option<String>,
    ecid: Option<String>,
    hardware_model: Option<String>,
    cpu_count_min: Option<u32>,
    memory_size_min: Option<u64>,
    disk_format: Option<String>,
}

pub(super) fn is(manifest: &Manifest) -> bool {
    manifest.layers.iter().any(|layer| layer.media_type == CONFIG)
}

pub(super) fn plan(manifest: &Manifest, documents: &Documents) -> Result<Plan, FormatError> {
    let config: TartConfig = document(only(manifest, CONFIG)?, documents)?;
    if config.disk_format.as_deref().is_some_and(|format| format != "raw")
        || manifest.layers.iter().any(|layer| layer.media_type.starts_with(ASIF))
    {
        return Err(FormatError::Unsupported(
            "its disk is in Apple's sparse format (ASIF), perhaps with stacked overlays, which only macOS can read: push it with a raw disk",
        ));
    }
    let nvram = only(manifest, NVRAM)?;
    let mut layers = vec![plain_file(nvram, Part::Nvram)];
    let mut size = 0u64;
    let mut legacy = Vec::new();
    for layer in &manifest.layers {
        match layer.media_type.as_str() {
            CONFIG | NVRAM => {}
            DISK_V2 => {
                let raw_size: u64 = annotation(layer, RAW_SIZE)?;
                layers.push(Layer {
                    blobs: vec![blob(layer)],
                    encoding: Encoding::AppleLz4,
                    raw_size: Some(raw_size),
                    raw_digest: Some(annotation::<Digest>(layer, RAW_DIGEST)?),
                    target: Target::File { part: Part::Disk(0), offset: size },
                });
                size = size
                    .checked_add(raw_size)
                    .filter(|size| *size <= LARGEST_DISK)
                    .ok_or(FormatError::Bounds("its disk is larger than 64 TiB"))?;
            }
            DISK_V1 => legacy.push(blob(layer)),
            _ => return Err(FormatError::Layer { layer: layer.digest, media_type: layer.media_type.clone() }),
        }
    }
    let disk_size = match (legacy.is_empty(), size) {
        (true, 0) => return Err(FormatError::Count { media_type: DISK_V2, count: 0, expected: "at least one" }),
        (true, size) => Some(size),
        (false, 0) => {
            layers.push(Layer {
                blobs: legacy,
                encoding: Encoding::AppleLz4,
                raw_size: manifest.annotations.get(DISK_SIZE).and_then(|size| size.parse().ok()),
                raw_digest: None,
                target: Target::File { part: Part::Disk(0), offset: 0 },
            });
            None
        }
        (false, _) => return Err(FormatError::Unsupported("it mixes disk layers of two versions")),
    };
    Ok(Plan {
        format: "tart",
        config: self::config(&config, disk_size)?,
        files: vec![(Part::Nvram, Some(nvram.size)), (Part::Disk(0), disk_size)],
        layers,
    })
}

fn config(config: &TartConfig, disk_size: Option<u64>) -> Result<Config, FormatError> {
    let unknown = |_| FormatError::Unsupported("its operating system or architecture isn't known");
    let os: Os = config.os.as_deref().unwrap_or("darwin").parse().map_err(unknown)?;
    let macos = match (&config.hardware_model, &config.ecid) {
        (Some(model), Some(ecid)) => {
            Some(MacIdentity { hardware_model: model.clone(), machine_identifier: ecid.clone() })
        }
        _ => None,
    };
    Ok(Config {
        os,
        architecture: config.arch.as_deref().unwrap_or("arm64").parse().map_err(unknown)?,
        boot: Boot::Firmware(Firmware::Uefi),
        disks: vec![DiskConfig { size: disk_size.unwrap_or(0) }],
        min_cpus: config.cpu_count_min,
        min_memory: config.memory_size_min,
        hardware: Hardware::default(),
        macos,
        guest: mac_guest("admin", Some("admin")),
        labels: std::collections::BTreeMap::new(),
    })
}

/// A guest that reads no seed.
pub(super) fn mac_guest(user: &str, password: Option<&str>) -> GuestConfig {
    GuestConfig {
        user: user.to_owned(),
        password: password.map(str::to_owned),
        seed: SeedKind::None,
        ..GuestConfig::default()
    }
}
