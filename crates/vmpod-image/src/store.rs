//! The local store.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;
use crate::image::{ClonedImage, Image};
use crate::reference::Reference;

/// The local store of images: cheap to clone, safe for several processes.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
}

/// Why the store couldn't do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Not there yet.
    #[error("not built yet: {0}")]
    NotBuilt(&'static str),
}

/// Someone who holds an image, so that it isn't removed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// The holder's name as given to [`Store::clone_image`].
    pub name: String,
    /// The image held.
    pub image: Digest,
}

impl Store {
    /// Opens the store in `dir`, made if absent (mode 0700), and removes what unfinished work left there.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Ok(Self { inner: Arc::new(Inner { dir: dir.to_owned() }) })
    }

    /// The store's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// The image of this name (or digest), if it is here.
    pub fn get(&self, _reference: &Reference) -> Result<Option<Image>, StoreError> {
        Err(StoreError::NotBuilt("get"))
    }

    /// All images, by name.
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        Err(StoreError::NotBuilt("list"))
    }

    /// Takes the name away; the data goes with the last name, or with the last holder. Returns whether the name was there.
    pub fn remove(&self, _reference: &Reference) -> Result<bool, StoreError> {
        Err(StoreError::NotBuilt("remove"))
    }

    /// Makes a machine's own copy of `image` in the directory `into`, without copying data, and holds the image for
    /// `holder` until [`Store::release`]. `disk_size` (bytes) is the least size of the first disk: it grows, never shrinks.
    pub fn clone_image(
        &self,
        _image: &Image,
        _into: &Path,
        _disk_size: Option<u64>,
        _holder: &str,
    ) -> Result<ClonedImage, StoreError> {
        Err(StoreError::NotBuilt("clone_image"))
    }

    /// Drops everything that `holder` holds; nothing to do is no error. Delete the clone's files first.
    pub fn release(&self, _holder: &str) -> Result<(), StoreError> {
        Err(StoreError::NotBuilt("release"))
    }

    /// Everyone who holds an image.
    pub fn holders(&self) -> Result<Vec<Holder>, StoreError> {
        Err(StoreError::NotBuilt("holders"))
    }
}
