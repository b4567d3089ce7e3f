//! Images in the store, and clones of them.

use std::path::PathBuf;

use crate::config::{Config, Firmware};
use crate::digest::Digest;
use crate::reference::Reference;

/// An image in the store: whole and verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The digest of its manifest: what identifies it.
    pub digest: Digest,
    /// The names it has here, sorted. Empty when the last name went to another image while a machine still used this one.
    pub references: Vec<Reference>,
    /// What it says about itself.
    pub config: Config,
    /// The format it came in: `vmpod`, `containerdisk`, …
    pub format: String,
    /// The bytes a registry holds for it: the sum of its layers.
    pub transfer_bytes: u64,
    /// The bytes its disks and files take in the store, holes left out.
    pub stored_bytes: u64,
    /// When it was put into the store.
    pub created: jiff::Timestamp,
}

/// A machine's own copy of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClonedImage {
    /// The image's digest.
    pub digest: Digest,
    /// The image's configuration.
    pub config: Config,
    /// What starts it.
    pub boot: ClonedBoot,
    /// Its disks, in order, writable.
    pub disks: Vec<ClonedDisk>,
    /// Its own copy of the firmware variables or macOS auxiliary storage that the image carries.
    pub nvram: Option<PathBuf>,
}

/// What starts a clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClonedBoot {
    /// A kernel, in the store: read-only, kept while the clone's holder holds the image.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// Its initial RAM disk.
        initrd: Option<PathBuf>,
        /// Its command line.
        cmdline: String,
    },
    /// Firmware, from the first disk.
    Firmware(Firmware),
}

/// One disk of a clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClonedDisk {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Its virtual size in bytes.
    pub size: u64,
}

/// The format of a disk file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    Raw,
    /// A qcow2 overlay whose backing file is in the store.
    Qcow2,
}
