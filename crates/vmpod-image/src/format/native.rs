//! The native format: see the media types in [`crate::media`].

use std::collections::BTreeMap;

use super::{Encoding, FormatError, LARGEST_DISK, Layer, Plan, Target, annotation, blob, plain_file};
use crate::config::{Boot, Config};
use crate::digest::Digest;
use crate::manifest::{Descriptor, Manifest};
use crate::media;
use crate::store::record::Part;

/// The format's name.
pub(crate) const NAME: &str = "vmpod";
/// The default window.
const WINDOW: u64 = 4 << 20;
/// The largest window: what one window needs in memory is bounded by it.
const LARGEST_WINDOW: u64 = 64 << 20;
/// The most windows of a disk, so that its manifest stays below the 4 MiB that registries take.
const MOST_WINDOWS: u64 = 8192;
/// A kernel or initial RAM disk beyond this is none.
const LARGEST_FILE: u64 = 4 << 30;

/// The window for a disk of `size` bytes. It depends on nothing else, so that versions of an image share windows.
pub(crate) fn window(size: u64) -> u64 {
    let mut window = WINDOW;
    while window < LARGEST_WINDOW && size.div_ceil(window) > MOST_WINDOWS {
        window *= 2;
    }
    window
}

/// A window of a disk, packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) offset: u64,
    pub(crate) raw_size: u64,
    pub(crate) raw_digest: Digest,
    /// Of the packed bytes.
    pub(crate) digest: Digest,
    /// Of the packed bytes.
    pub(crate) size: u64,
}

impl Chunk {
    pub(crate) fn descriptor(&self, disk: usize) -> Descriptor {
        Descriptor {
            annotations: BTreeMap::from([
                (media::CHUNK_DISK.to_owned(), disk.to_string()),
                (media::CHUNK_OFFSET.to_owned(), self.offset.to_string()),
                (media::CHUNK_RAW_SIZE.to_owned(), self.raw_size.to_string()),
                (media::CHUNK_RAW_DIGEST.to_owned(), self.raw_digest.to_string()),
            ]),
            ..Descriptor::new(media::DISK_CHUNK_ZSTD, self.digest, self.size)
        }
    }
}

/// The manifest of a native image.
pub(crate) fn manifest(config: &[u8], layers: Vec<Descriptor>, annotations: BTreeMap<String, String>) -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: media::OCI_MANIFEST.to_owned(),
        artifact_type: Some(media::ARTIFACT.to_owned()),
        config: Descriptor::new(media::CONFIG, Digest::of(config), config.len() as u64),
        layers,
        subject: None,
        annotations,
    }
}

/// The part that a layer of this media type is, when it isn't a chunk of a disk.
pub(crate) fn file_part(media_type: &str) -> Option<Part> {
    match media_type {
        media::KERNEL => Some(Part::Kernel),
        media::INITRD => Some(Part::Initrd),
        media::NVRAM => Some(Part::Nvram),
        _ => None,
    }
}

/// The media type of a part that isn't a disk.
pub(crate) fn media_type(part: Part) -> &'static str {
    match part {
        Part::Disk(_) => media::DISK_CHUNK_ZSTD,
        Part::Kernel => media::KERNEL,
        Part::Initrd => media::INITRD,
        Part::Nvram => media::NVRAM,
    }
}

/// Reads a native manifest.
pub(crate) fn plan(manifest: &Manifest, config: &[u8]) -> Result<Plan, FormatError> {
    let config: Config = serde_json::from_slice(config).map_err(FormatError::Config)?;
    if config.disks.len() > 26 {
        return Err(FormatError::Bounds("it has more than 26 disks"));
    }
    let mut files = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        if disk.size > LARGEST_DISK {
            return Err(FormatError::Bounds("a disk is larger than 64 TiB"));
        }
        files.push((Part::Disk(index), Some(disk.size)));
    }
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for layer in &manifest.layers {
        if let Some(part) = file_part(&layer.media_type) {
            if layer.size > LARGEST_FILE {
                return Err(FormatError::Bounds("a kernel or initial RAM disk is larger than 4 GiB"));
            }
            files.push((part, Some(layer.size)));
            layers.push(plain_file(layer, part));
        } else if layer.media_type == media::DISK_CHUNK_ZSTD {
            layers.push(chunk(layer)?);
        } else {
            return Err(FormatError::Layer { layer: layer.digest, media_type: layer.media_type.clone() });
        }
    }
    let direct = matches!(config.boot, Boot::Kernel { .. });
    for (part, least, most, expected) in [
        (Part::Kernel, usize::from(direct), 1, "one"),
        (Part::Initrd, 0, 1, "at most one"),
        (Part::Nvram, 0, 1, "at most one"),
    ] {
        let count = files.iter().filter(|(file, _)| *file == part).count();
        if count < least || count > most {
            return Err(FormatError::Count { media_type: media_type(part), count, expected });
        }
    }
    Ok(Plan { format: NAME, config, files, layers })
}

fn chunk(layer: &Descriptor) -> Result<Layer, FormatError> {
    let raw_size: u64 = annotation(layer, media::CHUNK_RAW_SIZE)?;
    if raw_size > LARGEST_WINDOW || layer.size > LARGEST_WINDOW + (1 << 20) {
        return Err(FormatError::Placement { layer: layer.digest, why: "it is larger than 64 MiB" });
    }
    Ok(Layer {
        blobs: vec![blob(layer)],
        encoding: Encoding::Zstd,
        raw_size: Some(raw_size),
        raw_digest: Some(annotation(layer, media::CHUNK_RAW_DIGEST)?),
        target: Target::File {
            part: Part::Disk(annotation(layer, media::CHUNK_DISK)?),
            offset: annotation(layer, media::CHUNK_OFFSET)?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str =
        r#"{"os":"linux","architecture":"amd64","boot":{"kernel":{"cmdline":"quiet"}},"disks":[{"size":8388608}]}"#;

    fn chunk_at(offset: u64, raw_size: u64) -> Chunk {
        Chunk { offset, raw_size, raw_digest: Digest::of(b"raw"), digest: Digest::of(b"packed"), size: 6 }
    }

    fn kernel() -> Descriptor {
        Descriptor::new(media::KERNEL, Digest::of(b"kernel"), 6)
    }

    fn planned(layers: Vec<Descriptor>) -> Result<Plan, String> {
        let manifest = manifest(CONFIG.as_bytes(), layers, BTreeMap::new());
        crate::format::plan(&manifest, CONFIG.as_bytes(), &crate::format::Documents::new())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_manifest_is_stable_and_reads_back() {
        let layers = vec![kernel(), chunk_at(0, 4 << 20).descriptor(0)];
        insta::assert_json_snapshot!(manifest(CONFIG.as_bytes(), layers.clone(), BTreeMap::new()));
        let plan = planned(layers).unwrap();
        assert_eq!(plan.files, [(Part::Disk(0), Some(8 << 20)), (Part::Kernel, Some(6))]);
        assert_eq!(plan.layers[1].target, Target::File { part: Part::Disk(0), offset: 0 });
    }

    #[test]
    fn what_lies_is_refused() {
        let mut no_size = chunk_at(0, 4).descriptor(0);
        no_size.annotations.remove(media::CHUNK_RAW_SIZE);
        let cases = [
            vec![],
            vec![kernel(), kernel()],
            vec![kernel(), chunk_at(8 << 20, 1).descriptor(0)],
            vec![kernel(), chunk_at(u64::MAX, 2).descriptor(0)],
            vec![kernel(), chunk_at(0, 4096).descriptor(0), chunk_at(4095, 1).descriptor(0)],
            vec![kernel(), chunk_at(0, 1).descriptor(1)],
            vec![kernel(), chunk_at(0, 65 << 20).descriptor(0)],
            vec![kernel(), no_size],
            vec![kernel(), Descriptor::new("application/x", Digest::of(b""), 0)],
        ];
        insta::assert_snapshot!(cases.map(|layers| planned(layers).unwrap_err()).join("\n"));
    }

    #[test]
    fn a_manifest_stays_below_what_registries_take() {
        for size in [1u64 << 20, 32 << 30, 64 << 30, 500 << 30] {
            let window = window(size);
            assert!(size.div_ceil(window) <= MOST_WINDOWS);
            let one = serde_json::to_vec(&chunk_at(size, window).descriptor(0)).unwrap().len() as u64 + 1;
            assert!(one * size.div_ceil(window) < 4 << 20, "{size}");
        }
        assert_eq!(window(8 << 30), 4 << 20);
    }

    #[test]
    fn media_types_and_annotations_are_stable() {
        insta::assert_snapshot!(
            [
                media::ARTIFACT,
                media::CONFIG,
                media::DISK_CHUNK_ZSTD,
                media::KERNEL,
                media::INITRD,
                media::NVRAM,
                media::CHUNK_DISK,
                media::CHUNK_OFFSET,
                media::CHUNK_RAW_SIZE,
                media::CHUNK_RAW_DIGEST,
            ]
            .join("\n")
        );
    }
}
