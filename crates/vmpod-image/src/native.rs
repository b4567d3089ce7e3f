//! The native form of an image in the store: its manifest, and its layers made again from its disks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use crate::config::{Config, DiskConfig};
use crate::digest::Digest;
use crate::format::native::{self, file_part};
use crate::format::{FormatError, Target};
use crate::image::Image;
use crate::ingest::{Disk, Ingest, Packer};
use crate::manifest::{Descriptor, Manifest};
use crate::push::read_range;
use crate::store::files::{self, io};
use crate::store::record::{Part, Window, Windows};
use crate::store::{Store, StoreError};

/// Why the native form couldn't be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NativeError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A disk couldn't be read or packed.
    #[error("couldn't pack {path}", path = path.display())]
    Pack {
        /// The disk.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// The store's manifest.
    #[error("the image's manifest in the store is damaged")]
    Format(#[source] FormatError),
    /// The store's manifest, or a new one.
    #[error("the image's manifest can't be read or written")]
    Json(#[source] serde_json::Error),
    /// What the disk holds isn't what the manifest says any more.
    #[error("{path} in the image store is damaged: the bytes at {offset} are not those that were verified; remove the image and get it again", path = path.display())]
    Damaged {
        /// The disk.
        path: PathBuf,
        /// The window's offset, bytes.
        offset: u64,
    },
    /// An image that `KubeVirt` has no form for.
    #[error("image {image} can't be a containerDisk: {why}")]
    NoContainerDisk {
        /// The image.
        image: Digest,
        /// What is in the way.
        why: &'static str,
    },
    /// The runtime is shutting down.
    #[error("stopped")]
    Stopped,
}

/// The native form of an image.
#[derive(Debug)]
pub(crate) struct NativeImage {
    dir: PathBuf,
    config: Vec<u8>,
    manifest: Manifest,
    /// The manifest's bytes, when it is the image's own.
    original: Option<Vec<u8>>,
    /// Every window and file, in the order of the layers.
    places: Vec<(Part, Window)>,
    /// Per layer: where its raw bytes are.
    windows: HashMap<Digest, (Part, u64, u64, Digest)>,
}

impl NativeImage {
    /// Reads a native image, or cuts the disks of any other. That takes a while: don't call it in async code.
    pub(crate) fn of(store: &Store, image: &Image) -> Result<Self, NativeError> {
        let dir = store.image_dir(image.digest);
        if image.format != native::NAME {
            return Self::cut(store, image, dir);
        }
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(io("read", &path))
        };
        let (bytes, config) = (read("manifest.json")?, read("config.json")?);
        let manifest = serde_json::from_slice(&bytes).map_err(NativeError::Json)?;
        Self::new(dir, config, manifest, Some(bytes))
    }

    /// Cuts the disks of an image of another format into windows.
    fn cut(store: &Store, image: &Image, dir: PathBuf) -> Result<Self, NativeError> {
        let record = store.record(image.digest)?.ok_or(StoreError::NoImage(image.digest))?;
        // What is digested anew here would otherwise vouch for whatever the files hold by now.
        store.check_seal(image, &record)?;
        let mut layers: Vec<_> = record
            .files
            .iter()
            .map(|file| Descriptor::new(native::media_type(file.part), file.digest, file.size))
            .collect();
        let mut disks = Vec::new();
        for index in 0..record.config.disks.len() {
            let path = dir.join(Part::Disk(index).file_name());
            let failed = |source| NativeError::Pack { path: path.clone(), source };
            let disk = Disk::raw(File::open(&path).map_err(failed)?).map_err(failed)?;
            disks.push(DiskConfig { size: disk.size() });
            let ingest = Ingest {
                disk: &disk,
                window: native::window(disk.size()),
                copy_to: None,
                pack: true,
                cancelled: &AtomicBool::new(false),
                done: &|_| {},
            };
            layers.extend(ingest.run().map_err(failed)?.iter().map(|chunk| chunk.descriptor(index)));
        }
        let config = serde_json::to_vec(&Config { disks, ..record.config }).map_err(NativeError::Json)?;
        let manifest = native::manifest(&config, layers, BTreeMap::new());
        Self::new(dir, config, manifest, None)
    }

    fn new(dir: PathBuf, config: Vec<u8>, manifest: Manifest, original: Option<Vec<u8>>) -> Result<Self, NativeError> {
        let plan = native::plan(&manifest, &config).map_err(NativeError::Format)?;
        let mut places = Vec::new();
        let mut windows = HashMap::new();
        for layer in &plan.layers {
            let Target::File { part, offset } = layer.target else { continue };
            if let (Some(blob), Some(size), Some(digest)) = (layer.blobs.first(), layer.raw_size, layer.raw_digest) {
                places.push((part, Window { offset, size, digest }));
                windows.insert(blob.digest, (part, offset, size, digest));
            }
        }
        Ok(Self { dir, config, manifest, original, places, windows })
    }

    /// The layers, equal ones once.
    pub(crate) fn distinct_layers(&self) -> Vec<Descriptor> {
        let mut seen = HashSet::new();
        self.manifest.layers.iter().filter(|layer| seen.insert(layer.digest)).cloned().collect()
    }

    /// The windows of the disks.
    pub(crate) fn disk_windows(&self) -> Windows {
        let mut windows = Windows::default();
        for &(part, window) in &self.places {
            if let Part::Disk(index) = part {
                if windows.disks.len() <= index {
                    windows.disks.resize(index + 1, Vec::new());
                }
                windows.disks[index].push(window);
            }
        }
        for disk in &mut windows.disks {
            disk.sort_unstable_by_key(|window| window.offset);
        }
        windows
    }

    /// The bytes that a registry holds for it.
    pub(crate) fn transfer_bytes(&self) -> u64 {
        self.manifest.transfer_bytes()
    }

    /// The size of the largest window or file, bytes.
    pub(crate) fn largest_window(&self) -> u64 {
        self.windows.values().map(|(_, _, size, _)| *size).max().unwrap_or(0)
    }

    /// The bytes of a layer, made from the disk and verified against it. A digest other than the layer's means that it was packed by
    /// another compressor once.
    pub(crate) fn pack(&self, layer: &Descriptor) -> Result<Vec<u8>, NativeError> {
        let damaged = |part: Part, offset| NativeError::Damaged { path: self.dir.join(part.file_name()), offset };
        let &(part, offset, size, digest) = self.windows.get(&layer.digest).ok_or_else(|| damaged(Part::Disk(0), 0))?;
        let path = self.dir.join(part.file_name());
        let failed = |source| NativeError::Pack { path: path.clone(), source };
        let raw = read_range(&File::open(&path).map_err(failed)?, offset, size).map_err(failed)?;
        if Digest::of(&raw) != digest {
            return Err(damaged(part, offset));
        }
        if file_part(&layer.media_type).is_some() {
            return Ok(raw);
        }
        let mut packer = Packer::new().map_err(failed)?;
        packer.pack(&raw).map(<[u8]>::to_vec).map_err(failed)
    }

    /// The configuration and the manifest, with the descriptors of layers that came out otherwise, and with more annotations.
    pub(crate) fn documents(
        &self,
        changed: &HashMap<Digest, Descriptor>,
        annotations: &BTreeMap<String, String>,
    ) -> Result<(Vec<u8>, Vec<u8>), NativeError> {
        if changed.is_empty()
            && annotations.is_empty()
            && let Some(original) = &self.original
        {
            return Ok((self.config.clone(), original.clone()));
        }
        let mut manifest = self.manifest.clone();
        manifest.annotations.extend(annotations.clone());
        for layer in &mut manifest.layers {
            if let Some(new) = changed.get(&layer.digest) {
                (layer.digest, layer.size) = (new.digest, new.size);
            }
        }
        Ok((self.config.clone(), serde_json::to_vec(&manifest).map_err(NativeError::Json)?))
    }

    /// Writes a layer's bytes to a file, if it isn't there. Returns the descriptor if it came out otherwise.
    pub(crate) fn write_layer(
        &self,
        layer: &Descriptor,
        path_of: impl Fn(Digest) -> PathBuf,
    ) -> Result<Option<Descriptor>, NativeError> {
        let path = path_of(layer.digest);
        if std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() == layer.size)
            && std::fs::read(&path).is_ok_and(|bytes| Digest::of(&bytes) == layer.digest)
        {
            return Ok(None);
        }
        let packed = self.pack(layer)?;
        let digest = Digest::of(&packed);
        files::write_whole(&path_of(digest), &packed)?;
        Ok((digest != layer.digest).then(|| Descriptor { digest, size: packed.len() as u64, ..layer.clone() }))
    }
}
