//! Lume's formats: gzip chunks that say where they go, and the older Apple-LZ4 parts in order.

use serde::Deserialize;

use super::{
    Documents, Encoding, FormatError, LARGEST_DISK, Layer, Plan, Target, annotation, blob, document, only, plain_file,
    tart,
};
use crate::config::{Architecture, Boot, Config, DiskConfig, Firmware, Hardware, MacIdentity, Os};
use crate::digest::Digest;
use crate::manifest::{Descriptor, Manifest};
use crate::media;
use crate::store::record::Part;

const CONFIG: &str = "application/vnd.trycua.lume.config.v1+json";
const DISK: &str = "application/vnd.trycua.lume.disk.v1";
const NVRAM: &str = "application/vnd.trycua.lume.nvram.v1";
const PART_OFFSET: &str = "org.trycua.lume.part.offset";
const RAW_SIZE: &str = "org.trycua.lume.content.uncompressed-size";
const RAW_DIGEST: &str = "org.trycua.lume.content.uncompressed-digest";
const TOTAL: &str = "org.trycua.lume.total-uncompressed-size";
const DISK_SIZE: &str = "org.trycua.lume.disk-size";
const LEGACY_DISK: &str = "application/octet-stream+lz4";
const LEGACY_NVRAM: &str = "application/octet-stream";
/// The older format keeps the virtual machine's configuration in a layer of this type.
pub(super) const LEGACY_CONFIG: &str = media::OCI_CONFIG;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LumeConfig {
    os: Option<String>,
    hardware_model: Option<String>,
    machine_identifier: Option<String>,
    disk_size: Option<u64>,
}

pub(super) fn is(manifest: &Manifest) -> bool {
    manifest.config.media_type == CONFIG || manifest.layers.iter().any(|layer| is_legacy_disk(&layer.media_type))
}

/// Parts of the older format may carry their number in the media type.
fn is_legacy_disk(media_type: &str) -> bool {
    media_type == LEGACY_DISK || media_type.strip_prefix(LEGACY_DISK).is_some_and(|rest| rest.starts_with(';'))
}

pub(super) fn plan(manifest: &Manifest, config: &[u8], documents: &Documents) -> Result<Plan, FormatError> {
    if manifest.config.media_type == CONFIG { current(manifest, config) } else { legacy(manifest, config, documents) }
}

fn current(manifest: &Manifest, config: &[u8]) -> Result<Plan, FormatError> {
    let config: LumeConfig = serde_json::from_slice(config).map_err(FormatError::Config)?;
    let nvram = only(manifest, NVRAM)?;
    let mut layers = vec![plain_file(nvram, Part::Nvram)];
    let disks: Vec<_> = manifest.layers.iter().filter(|layer| layer.media_type == DISK).collect();
    if let Some(other) = manifest.layers.iter().find(|layer| layer.media_type != DISK && layer.media_type != NVRAM) {
        return Err(FormatError::Layer { layer: other.digest, media_type: other.media_type.clone() });
    }
    let said = [TOTAL, DISK_SIZE].iter().find_map(|key| manifest.annotations.get(*key)?.parse::<u64>().ok());
    let mut end = 0;
    match disks.as_slice() {
        [] => return Err(FormatError::Count { media_type: DISK, count: 0, expected: "at least one" }),
        // All of the disk in one layer.
        [layer] if !layer.annotations.contains_key(PART_OFFSET) => {
            layers.push(Layer {
                blobs: vec![blob(layer)],
                encoding: Encoding::Detect,
                raw_size: annotation(layer, RAW_SIZE).ok(),
                raw_digest: annotation::<Digest>(layer, RAW_DIGEST).ok(),
                target: Target::File { part: Part::Disk(0), offset: 0 },
            });
            end = annotation(layer, RAW_SIZE).unwrap_or(0);
        }
        disks => {
            for layer in disks {
                let (offset, size): (u64, u64) = (annotation(layer, PART_OFFSET)?, annotation(layer, RAW_SIZE)?);
                let fits = offset.checked_add(size).filter(|end| *end <= LARGEST_DISK);
                end = end.max(fits.ok_or(FormatError::Bounds("its disk is larger than 64 TiB"))?);
                layers.push(Layer {
                    blobs: vec![blob(layer)],
                    encoding: Encoding::Gzip,
                    raw_size: Some(size),
                    raw_digest: Some(annotation::<Digest>(layer, RAW_DIGEST)?),
                    target: Target::File { part: Part::Disk(0), offset },
                });
            }
        }
    }
    // Chunks of zeros at the end may have been left out: the disk is as long as it says.
    let size = said.unwrap_or(0).max(end);
    let size = (size > 0 && size <= LARGEST_DISK).then_some(size);
    Ok(finish(&config, layers, nvram, size))
}

fn legacy(manifest: &Manifest, config: &[u8], documents: &Documents) -> Result<Plan, FormatError> {
    let config: LumeConfig = match only(manifest, LEGACY_CONFIG) {
        Ok(layer) => document(layer, documents)?,
        Err(_) => serde_json::from_slice(config).map_err(FormatError::Config)?,
    };
    let nvram = only(manifest, LEGACY_NVRAM)?;
    let parts = manifest.layers.iter().filter(|layer| is_legacy_disk(&layer.media_type)).map(blob).collect();
    let disk = Layer {
        blobs: parts,
        encoding: Encoding::AppleLz4,
        raw_size: None,
        raw_digest: None,
        target: Target::File { part: Part::Disk(0), offset: 0 },
    };
    Ok(finish(&config, vec![plain_file(nvram, Part::Nvram), disk], nvram, None))
}

fn finish(config: &LumeConfig, layers: Vec<Layer>, nvram: &Descriptor, size: Option<u64>) -> Plan {
    let macos = match (&config.hardware_model, &config.machine_identifier) {
        (Some(model), Some(machine)) => {
            Some(MacIdentity { hardware_model: model.clone(), machine_identifier: machine.clone() })
        }
        _ => None,
    };
    let said = config.disk_size.filter(|said| *said <= LARGEST_DISK).unwrap_or(0);
    Plan {
        format: "lume",
        config: Config {
            os: config.os.as_deref().and_then(|os| os.to_lowercase().parse().ok()).unwrap_or(Os::Darwin),
            architecture: Architecture::Arm64,
            boot: Boot::Firmware(Firmware::Uefi),
            disks: vec![DiskConfig { size: size.unwrap_or(said) }],
            min_cpus: None,
            min_memory: None,
            hardware: Hardware::default(),
            macos,
            guest: tart::mac_guest("lume", Some("lume")),
            labels: std::collections::BTreeMap::new(),
        },
        files: vec![(Part::Nvram, Some(nvram.size)), (Part::Disk(0), size)],
        layers,
    }
}
