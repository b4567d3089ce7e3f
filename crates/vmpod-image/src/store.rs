//! The local store.
//!
//! ```text
//! DIR/lock                  taken for each change of names, pins and images: moments only
//! DIR/images/HEX/           one directory per image, HEX the digest of its manifest:
//!     manifest.json config.json     the bytes whose digests name them
//!     image.json windows.json       what they mean: the record, and the digest of each range of data
//!     seal.json used                how the files looked when they were verified; when the image was last cloned
//!     disk-0.raw … kernel initrd    the data: disks whole, sparse, read-only
//! DIR/names/*               one file per name: {"reference", "digest"}
//! DIR/pins/*                one file per holder and image: {"holder", "image"}
//! DIR/work/*                unfinished pulls (with their journal) and imports; whoever works there holds its lock
//! DIR/trash/*               on the way out
//! ```
//!
//! **An image is visible only when whole**: its directory is filled in `work/`, everything in it is synced, and one rename
//! shows it. A crash leaves either a pull that goes on later or garbage that the next [`Store::open`] removes.
//!
//! **An image stays while it has a name or a pin.** A machine's clone reads from the image's files, so its holder's pin is
//! written, durably, before the clone is made.
//!
//! **Disks are kept assembled and uncompressed, and nothing else is**: a clone then is one system call, and a pull writes each
//! byte once. The compressed layers are not kept: they would cost a second write and half as much disk again for bytes that
//! only a push needs. A push or export compresses a window again, deterministically; with the same compressor (the
//! same parameters and zstd release) the bytes and digests are equal, else the layer gets a new digest and so does the manifest
//! that is pushed. Layers that the registry has already are named as they are, without being made.
//!
//! **Equal windows are found again** by the digests in `windows.json`: a new version of an image takes from disk
//! what any image here already has, verified while copied, and fetches the rest.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::clone;
use crate::digest::Digest;
use crate::image::{ClonedImage, Image};
use crate::progress::Progress;
use crate::reference::Reference;

pub(crate) mod files;
mod prune;
pub(crate) mod record;
mod seal;
mod verify;
pub(crate) mod work;

use files::Lock;
pub use prune::{FileSystem, Prune, Pruned};
use record::{Record, read_json, write_json};
pub use verify::Damage;

/// The local store of images: cheap to clone, safe for several processes.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// The pulls of this process, for the progress of those who wait for them.
    pulls: Mutex<HashMap<Digest, watch::Sender<Progress>>>,
}

/// Why the store couldn't do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file system refused.
    #[error("couldn't {action} {path}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the store can't be read as what it should be.
    #[error("{path} in the image store is damaged", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A file of a newer store.
    #[error("{path} has version {found}, but this vmpod reads only version {known}: it was written by a newer one", path = path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version that is known.
        known: u32,
    },
    /// The image went away between looking and using.
    #[error("image {0} isn't in the store any more")]
    NoImage(Digest),
    /// Something changed a file of the image after it was verified.
    #[error("image {image} is corrupt: {damage} aren't what was verified; remove the image and get it again")]
    Corrupt {
        /// The image.
        image: Digest,
        /// The first part that differs.
        damage: Damage,
    },
    /// A disk of a clone would be too large for its format, or not a whole number of sectors.
    #[error("a disk of {size} bytes can't be made: it must be a multiple of 512 and at most {most}")]
    DiskSize {
        /// The size asked for.
        size: u64,
        /// The greatest possible.
        most: u64,
    },
    /// A path that a qcow2 file can't name.
    #[error("{path} is too long or no UTF-8, so an overlay can't name it: move the image store", path = path.display())]
    BackingPath {
        /// The path.
        path: PathBuf,
    },
}

impl StoreError {
    /// Whether the file system is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
    }
}

/// Someone who holds an image, so that it isn't removed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Holder {
    /// The holder's name as given to [`Store::clone_image`].
    #[serde(rename = "holder")]
    pub name: String,
    /// The image held.
    pub image: Digest,
}

#[derive(Debug, Serialize, Deserialize)]
struct Name {
    reference: Reference,
    digest: Digest,
}

impl Store {
    /// Opens the store in `dir`, made if absent (mode 0700), and removes what unfinished work left there.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        for part in ["images", "names", "pins", "work", "trash"] {
            files::make_dir(&dir.join(part))?;
        }
        let dir = files::canonical(dir)?;
        let store = Self { inner: Arc::new(Inner { dir, pulls: Mutex::default() }) };
        store.sweep_temporaries()?;
        work::sweep(&store, work::KEEP_UNFINISHED)?;
        store.collect()?;
        Ok(store)
    }

    /// The store's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// The image of this name, if it is here. A name with a digest finds any image of that digest.
    pub fn get(&self, reference: &Reference) -> Result<Option<Image>, StoreError> {
        let digest = match reference.digest() {
            Some(digest) => Some(digest),
            None => read_json::<Name>(&self.name_path(reference))?.map(|name| name.digest),
        };
        match digest {
            Some(digest) => self.image(digest),
            None => Ok(None),
        }
    }

    /// The image of this digest, if it is here.
    pub fn image(&self, digest: Digest) -> Result<Option<Image>, StoreError> {
        let Some(record) = self.record(digest)? else { return Ok(None) };
        let references =
            self.names()?.into_iter().filter(|name| name.digest == digest).map(|name| name.reference).collect();
        Ok(Some(self.assemble(record, references)))
    }

    /// All images, by name.
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let mut names: HashMap<Digest, Vec<Reference>> = HashMap::new();
        for name in self.names()? {
            names.entry(name.digest).or_default().push(name.reference);
        }
        let mut images = Vec::new();
        for digest in self.digests()? {
            if let Some(record) = self.record(digest)? {
                images.push(self.assemble(record, names.remove(&digest).unwrap_or_default()));
            }
        }
        images.sort_by(|a, b| (&a.references, a.digest).cmp(&(&b.references, b.digest)));
        Ok(images)
    }

    /// Takes the name away; the data goes with the last name, or with the last holder. Returns whether the name was there.
    pub fn remove(&self, reference: &Reference) -> Result<bool, StoreError> {
        let lock = self.lock()?;
        let mut removed = files::remove_file(&self.name_path(reference))?;
        if let Some(digest) = reference.digest() {
            // All names of that image in that repository.
            for name in self.names()? {
                if name.digest == digest
                    && name.reference.registry() == reference.registry()
                    && name.reference.repository() == reference.repository()
                {
                    removed |= files::remove_file(&self.name_path(&name.reference))?;
                }
            }
        }
        files::sync_dir(&self.inner.dir.join("names"))?;
        drop(lock);
        self.collect()?;
        Ok(removed)
    }

    /// Gives an image one more name, which another image may have had.
    pub fn tag(&self, digest: Digest, reference: &Reference) -> Result<(), StoreError> {
        {
            let _lock = self.lock()?;
            if self.record(digest)?.is_none() {
                return Err(StoreError::NoImage(digest));
            }
            self.write_name(reference, digest)?;
        }
        self.collect()
    }

    /// Makes a machine's own copy of `image` in the directory `into` (made if absent), without copying data, and holds the image
    /// for `holder` until [`Store::release`]. `disk_size` (bytes) is the least size of the first disk: it grows, never
    /// shrinks. Files of an earlier attempt are replaced. Takes milliseconds; blocks on the file system.
    pub fn clone_image(
        &self,
        image: &Image,
        into: &Path,
        disk_size: Option<u64>,
        holder: &str,
    ) -> Result<ClonedImage, StoreError> {
        self.clone_for(image, into, disk_size, holder, clone::Reads::Any)
    }

    /// The same for a hypervisor that reads raw disks only: where the file system shares no blocks, the disks are copied.
    pub fn clone_image_raw(
        &self,
        image: &Image,
        into: &Path,
        disk_size: Option<u64>,
        holder: &str,
    ) -> Result<ClonedImage, StoreError> {
        self.clone_for(image, into, disk_size, holder, clone::Reads::Raw)
    }

    fn clone_for(
        &self,
        image: &Image,
        into: &Path,
        disk_size: Option<u64>,
        holder: &str,
        reads: clone::Reads,
    ) -> Result<ClonedImage, StoreError> {
        let pin = Holder { name: holder.to_owned(), image: image.digest };
        let path = self.pin_path(&pin);
        let (record, fresh) = {
            let _lock = self.lock()?;
            let record = self.record(image.digest)?.ok_or(StoreError::NoImage(image.digest))?;
            let fresh = !path.exists();
            if fresh {
                write_json(&path, &pin)?;
            }
            (record, fresh)
        };
        let cloned = self.check_seal(image, &record).and_then(|()| {
            prune::mark_used(&self.image_dir(image.digest));
            clone::make(self, image, into, disk_size, reads)
        });
        if cloned.is_err() && fresh {
            // What wasn't cloned needn't be held. Should this fail, too, the holder still can let go.
            drop(files::remove_file(&path));
        }
        cloned
    }

    /// Drops everything that `holder` holds; nothing to do is no error. Delete the clone's files first.
    pub fn release(&self, holder: &str) -> Result<(), StoreError> {
        {
            let _lock = self.lock()?;
            let prefix = holder_prefix(holder);
            let pins = self.inner.dir.join("pins");
            let mut any = false;
            for name in files::names_in(&pins)? {
                if name.starts_with(&prefix) {
                    any |= files::remove_file(&pins.join(name))?;
                }
            }
            if !any {
                return Ok(());
            }
            files::sync_dir(&pins)?;
        }
        self.collect()
    }

    /// Everyone who holds an image.
    pub fn holders(&self) -> Result<Vec<Holder>, StoreError> {
        let pins = self.inner.dir.join("pins");
        let mut holders = Vec::new();
        for name in files::names_in(&pins)? {
            if let Some(holder) = read_json(&pins.join(name))? {
                holders.push(holder);
            }
        }
        holders.sort();
        Ok(holders)
    }

    /// The directory of an image.
    pub(crate) fn image_dir(&self, digest: Digest) -> PathBuf {
        self.inner.dir.join("images").join(digest.hex())
    }

    pub(crate) fn record(&self, digest: Digest) -> Result<Option<Record>, StoreError> {
        Record::read(&self.image_dir(digest))
    }

    /// The digests of all images.
    pub(crate) fn digests(&self) -> Result<Vec<Digest>, StoreError> {
        let names = files::names_in(&self.inner.dir.join("images"))?;
        Ok(names.iter().filter_map(|name| Digest::from_hex(name).ok()).collect())
    }

    /// Shows the finished directory `from` as the image `digest` under the name `reference`. All files in it must be synced.
    pub(crate) fn publish(&self, from: &Path, digest: Digest, reference: &Reference) -> Result<Image, StoreError> {
        files::sync_dir(from)?;
        {
            let _lock = self.lock()?;
            let to = self.image_dir(digest);
            if self.record(digest)?.is_some() {
                files::remove_tree(from)?;
            } else {
                std::fs::rename(from, &to).map_err(files::io("put in place", &to))?;
                files::sync_dir(&self.inner.dir.join("images"))?;
            }
            self.write_name(reference, digest)?;
        }
        self.collect()?;
        self.image(digest)?.ok_or(StoreError::NoImage(digest))
    }

    pub(crate) fn pulls(&self) -> MutexGuard<'_, HashMap<Digest, watch::Sender<Progress>>> {
        self.inner.pulls.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn lock(&self) -> Result<Lock, StoreError> {
        Lock::wait(&self.inner.dir.join("lock"))
    }

    /// Removes every image that has neither a name nor a holder.
    fn collect(&self) -> Result<(), StoreError> {
        let trash = self.inner.dir.join("trash");
        {
            let _lock = self.lock()?;
            // A name or pin that can't be read stops everything: what it keeps isn't known.
            let mut kept: HashSet<Digest> = self.names()?.into_iter().map(|name| name.digest).collect();
            kept.extend(self.holders()?.into_iter().map(|holder| holder.image));
            for digest in self.digests()? {
                if !kept.contains(&digest) {
                    let dir = tempfile::Builder::new()
                        .prefix("image-")
                        .tempdir_in(&trash)
                        .map_err(files::io("make a directory in", &trash))?
                        .keep();
                    let from = self.image_dir(digest);
                    std::fs::rename(&from, dir.join("image")).map_err(files::io("remove", &from))?;
                }
            }
        }
        for name in files::names_in(&trash)? {
            files::remove_tree(&trash.join(name))?;
        }
        Ok(())
    }

    /// Removes the temporary files of writes that a crash cut off. Under the lock, since a writer holds it.
    fn sweep_temporaries(&self) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        for part in ["names", "pins"] {
            let dir = self.inner.dir.join(part);
            for entry in std::fs::read_dir(&dir).map_err(files::io("read the directory", &dir))?.flatten() {
                if entry.file_name().to_string_lossy().starts_with(".new-") {
                    files::remove_file(&entry.path())?;
                }
            }
        }
        Ok(())
    }

    fn assemble(&self, record: Record, mut references: Vec<Reference>) -> Image {
        references.sort();
        let dir = self.image_dir(record.digest);
        let disks = (0..record.config.disks.len()).map(|index| record::Part::Disk(index).file_name());
        let others = record.files.iter().map(|file| file.part.file_name());
        Image {
            stored_bytes: disks.chain(others).map(|name| files::allocated(&dir.join(name))).sum(),
            digest: record.digest,
            references,
            config: record.config,
            format: record.format,
            transfer_bytes: record.transfer_bytes,
            created: record.created,
        }
    }

    fn names(&self) -> Result<Vec<Name>, StoreError> {
        let dir = self.inner.dir.join("names");
        let mut names = Vec::new();
        for file in files::names_in(&dir)? {
            if let Some(name) = read_json(&dir.join(file))? {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn write_name(&self, reference: &Reference, digest: Digest) -> Result<(), StoreError> {
        write_json(&self.name_path(reference), &Name { reference: reference.clone(), digest })
    }

    fn name_path(&self, reference: &Reference) -> PathBuf {
        self.inner.dir.join("names").join(Digest::of(reference.to_string().as_bytes()).hex())
    }

    fn pin_path(&self, pin: &Holder) -> PathBuf {
        self.inner.dir.join("pins").join(format!("{}{}", holder_prefix(&pin.name), pin.image.hex()))
    }
}

/// A holder's name may hold any character; its file's name may not.
fn holder_prefix(holder: &str) -> String {
    format!("{}-", Digest::of(holder.as_bytes()).hex())
}

#[cfg(test)]
mod tests;
