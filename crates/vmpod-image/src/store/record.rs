//! What the store keeps about an image, beside its data.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::StoreError;
use super::files::{io, write_whole};
use crate::config::Config;
use crate::digest::Digest;

/// The version of these files; another is refused.
const VERSION: u32 = 1;

/// `image.json`: small, read at each look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    version: u32,
    pub(crate) digest: Digest,
    pub(crate) format: String,
    pub(crate) created: jiff::Timestamp,
    pub(crate) config: Config,
    pub(crate) transfer_bytes: u64,
    /// The files that are no disk.
    #[serde(default)]
    pub(crate) files: Vec<FileRecord>,
}

/// A kernel, an initial RAM disk or firmware variables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FileRecord {
    pub(crate) part: Part,
    pub(crate) size: u64,
    pub(crate) digest: Digest,
}

/// A file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Part {
    /// A disk, by number.
    Disk(usize),
    /// A kernel.
    Kernel,
    /// Its initial RAM disk.
    Initrd,
    /// Firmware variables, or a macOS auxiliary storage.
    Nvram,
}

impl Part {
    /// The file's name in the image's directory: never a name that came from outside.
    pub(crate) fn file_name(self) -> String {
        match self {
            Self::Disk(index) => format!("disk-{index}.raw"),
            Self::Kernel => "kernel".to_owned(),
            Self::Initrd => "initrd".to_owned(),
            Self::Nvram => "nvram".to_owned(),
        }
    }
}

/// `windows.json`: every range of the disks that holds data, with its digest. What isn't in a window is zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub(crate) struct Windows {
    /// Per disk, by offset.
    pub(crate) disks: Vec<Vec<Window>>,
}

/// A range of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Window {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) digest: Digest,
}

impl Record {
    pub(crate) fn new(
        digest: Digest,
        format: &str,
        created: jiff::Timestamp,
        config: Config,
        transfer_bytes: u64,
    ) -> Self {
        Self { version: VERSION, digest, format: format.to_owned(), created, config, transfer_bytes, files: Vec::new() }
    }

    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join("image.json")
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<(), StoreError> {
        write_json(&Self::path(dir), self)
    }

    /// The record in an image's directory; none if there is none.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, StoreError> {
        let path = Self::path(dir);
        let Some(record) = read_json::<Self>(&path)? else { return Ok(None) };
        if record.version != VERSION {
            return Err(StoreError::Version { path, found: record.version, known: VERSION });
        }
        Ok(Some(record))
    }
}

impl Windows {
    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join("windows.json")
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<(), StoreError> {
        write_json(&Self::path(dir), self)
    }

    pub(crate) fn read(dir: &Path) -> Result<Self, StoreError> {
        Ok(read_json(&Self::path(dir))?.unwrap_or_default())
    }
}

pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let text = serde_json::to_vec(value).map_err(|source| StoreError::Json { path: path.to_owned(), source })?;
    write_whole(path, &text)
}

pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, StoreError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| StoreError::Json { path: path.to_owned(), source }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read", path)(error)),
    }
}
