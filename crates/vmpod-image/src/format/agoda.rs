//! The format of macOS-vz-kubelet: one disk, one auxiliary storage, one configuration, told apart by their media types.

use serde::Deserialize;

use super::{
    Documents, Encoding, FormatError, LARGEST_DISK, Layer, Plan, Target, annotation, blob, document, only, tart,
};
use crate::config::{Architecture, Boot, Config, DiskConfig, Firmware, Hardware, MacIdentity, Os};
use crate::digest::Digest;
use crate::manifest::{Descriptor, Manifest};
use crate::store::record::Part;

const ARTIFACT: &str = "application/vnd.agoda.macosvz.artifact";
pub(super) const CONFIG: &str = "application/vnd.agoda.macosvz.config.v1+json";
const DISK: &str = "application/vnd.agoda.macosvz.disk.image.v1";
const AUX: &str = "application/vnd.agoda.macosvz.aux.image.v1";
const RAW_SIZE: &str = "com.agoda.macosvz.content.uncompressed-size";
const RAW_DIGEST: &str = "com.agoda.macosvz.content.uncompressed-digest";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AgodaConfig {
    os: Option<String>,
    hardware_model_data: String,
    machine_id_data: String,
}

pub(super) fn is(manifest: &Manifest) -> bool {
    manifest.artifact_type.as_deref() == Some(ARTIFACT) || manifest.layers.iter().any(|layer| layer.media_type == DISK)
}

pub(super) fn plan(manifest: &Manifest, documents: &Documents) -> Result<Plan, FormatError> {
    let config: AgodaConfig = document(only(manifest, CONFIG)?, documents)?;
    if let Some(other) = manifest.layers.iter().find(|layer| ![CONFIG, DISK, AUX].contains(&layer.media_type.as_str()))
    {
        return Err(FormatError::Layer { layer: other.digest, media_type: other.media_type.clone() });
    }
    let (disk, disk_size) = file(only(manifest, DISK)?, Part::Disk(0))?;
    let (aux, aux_size) = file(only(manifest, AUX)?, Part::Nvram)?;
    let os = config.os.as_deref().unwrap_or("darwin").parse();
    Ok(Plan {
        format: "agoda",
        config: Config {
            os: os.unwrap_or(Os::Darwin),
            architecture: Architecture::Arm64,
            boot: Boot::Firmware(Firmware::Uefi),
            disks: vec![DiskConfig { size: disk_size }],
            min_cpus: None,
            min_memory: None,
            hardware: Hardware::default(),
            macos: Some(MacIdentity {
                hardware_model: config.hardware_model_data,
                machine_identifier: config.machine_id_data,
            }),
            guest: tart::mac_guest("root", None),
            labels: std::collections::BTreeMap::new(),
        },
        files: vec![(Part::Disk(0), Some(disk_size)), (Part::Nvram, Some(aux_size))],
        layers: vec![disk, aux],
    })
}

/// A layer is gzip exactly if it has both annotations.
fn file(layer: &Descriptor, part: Part) -> Result<(Layer, u64), FormatError> {
    let packed = layer.annotations.contains_key(RAW_SIZE) && layer.annotations.contains_key(RAW_DIGEST);
    let (encoding, size, digest) = if packed {
        (Encoding::Gzip, annotation::<u64>(layer, RAW_SIZE)?, annotation::<Digest>(layer, RAW_DIGEST)?)
    } else {
        (Encoding::Plain, layer.size, layer.digest)
    };
    if size > LARGEST_DISK {
        return Err(FormatError::Bounds("its disk is larger than 64 TiB"));
    }
    let target = Target::File { part, offset: 0 };
    let layer = Layer { blobs: vec![blob(layer)], encoding, raw_size: Some(size), raw_digest: Some(digest), target };
    Ok((layer, size))
}
