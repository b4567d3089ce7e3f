//! `KubeVirt`'s containerDisk: an ordinary container image with exactly one file under `/disk`, raw or qcow2.
//!
//! Labels of the container image may say what `KubeVirt` keeps elsewhere: `dev.vmpod.os`, `dev.vmpod.firmware` and
//! `dev.vmpod.guest.user`.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Encoding, FormatError, Layer, Plan, Target, blob};
use crate::config::{Architecture, Boot, Config, DiskConfig, Firmware, GuestConfig, Hardware, Os};
use crate::digest::Digest;
use crate::manifest::Manifest;
use crate::media;

/// The format's name.
pub(crate) const NAME: &str = "containerdisk";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub(crate) const LABEL_OS: &str = "dev.vmpod.os";
pub(crate) const LABEL_FIRMWARE: &str = "dev.vmpod.firmware";
pub(crate) const LABEL_USER: &str = "dev.vmpod.guest.user";
/// A container image has dozens of layers, no more.
const MOST_LAYERS: usize = 512;

#[derive(Debug, Deserialize)]
struct ImageConfig {
    architecture: Option<String>,
    os: Option<String>,
    #[serde(default)]
    config: Option<Inner>,
    #[serde(default)]
    rootfs: RootFs,
}

#[derive(Debug, Deserialize, Default)]
struct Inner {
    #[serde(rename = "Labels", default)]
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize, Default)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

pub(super) fn is(manifest: &Manifest) -> bool {
    let config = [media::OCI_CONFIG, DOCKER_CONFIG].contains(&manifest.config.media_type.as_str());
    config && !manifest.layers.is_empty() && manifest.layers.iter().all(|layer| encoding(&layer.media_type).is_some())
}

fn encoding(media_type: &str) -> Option<Encoding> {
    match media_type {
        "application/vnd.oci.image.layer.v1.tar" => Some(Encoding::Plain),
        "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            Some(Encoding::Gzip)
        }
        "application/vnd.oci.image.layer.v1.tar+zstd" => Some(Encoding::Zstd),
        _ => None,
    }
}

pub(super) fn plan(manifest: &Manifest, config: &[u8]) -> Result<Plan, FormatError> {
    if manifest.layers.len() > MOST_LAYERS {
        return Err(FormatError::Bounds("it has more layers than any container image"));
    }
    let config: ImageConfig = serde_json::from_slice(config).map_err(FormatError::Config)?;
    let diffs = &config.rootfs.diff_ids;
    if diffs.len() != manifest.layers.len() {
        return Err(FormatError::Bounds("its configuration lists another number of layers than its manifest"));
    }
    let layers = manifest.layers.iter().zip(diffs).enumerate().filter_map(|(index, (layer, diff))| {
        Some(Layer {
            blobs: vec![blob(layer)],
            encoding: encoding(&layer.media_type)?,
            raw_size: None,
            raw_digest: Some(*diff),
            target: Target::Tar { layer: index },
        })
    });
    let layers = layers.collect();
    let labels = config.config.and_then(|inner| inner.labels).unwrap_or_default();
    let unknown = |_| FormatError::Unsupported("its operating system or architecture isn't known");
    let architecture = match config.architecture.as_deref() {
        None | Some("") => Architecture::host(),
        Some(name) => name.parse().map_err(unknown)?,
    };
    let os = labels.get(LABEL_OS).or(config.os.as_ref()).map_or(Ok(Os::Linux), |name| name.parse()).map_err(unknown)?;
    let firmware = match (labels.get(LABEL_FIRMWARE).map(String::as_str), architecture) {
        (Some("uefi"), _) | (None, Architecture::Arm64) => Firmware::Uefi,
        (Some("secure"), _) => Firmware::Secure,
        // As KubeVirt has it.
        (Some("bios") | None, _) => Firmware::Bios,
        (Some(_), _) => {
            return Err(FormatError::Unsupported("its label dev.vmpod.firmware must be bios, uefi or secure"));
        }
    };
    let mut guest = GuestConfig::default();
    if let Some(user) = labels.get(LABEL_USER) {
        guest.user.clone_from(user);
    }
    Ok(Plan {
        format: NAME,
        config: Config {
            os,
            architecture,
            boot: Boot::Firmware(firmware),
            disks: vec![DiskConfig { size: 0 }],
            min_cpus: None,
            min_memory: None,
            macos: None,
            hardware: Hardware::default(),
            guest,
            labels,
        },
        files: Vec::new(),
        layers,
    })
}
