//! Noticing, without reading it, that an image's file isn't the one that was verified.
//!
//! `seal.json` holds each file's size, time of change and inode from the moment the image was shown. Nothing here ever writes to such a
//! file again, so a difference means that something else did, or that the store was copied: then the file is read and compared with
//! its digests before anything is cloned from it.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::record::{Part, Record, Window, Windows, read_json, write_json};
use super::{Store, StoreError, files};
use crate::image::Image;

const SEAL: &str = "seal.json";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
struct Seal {
    files: Vec<Stamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    part: Part,
    size: u64,
    inode: u64,
    seconds: i64,
    nanoseconds: i64,
}

impl Stamp {
    fn of(dir: &Path, part: Part) -> Result<Self, StoreError> {
        let path = dir.join(part.file_name());
        let metadata = std::fs::metadata(&path).map_err(files::io("look at", &path))?;
        Ok(Self {
            part,
            size: metadata.len(),
            inode: metadata.ino(),
            seconds: metadata.mtime(),
            nanoseconds: metadata.mtime_nsec(),
        })
    }
}

fn parts(record: &Record) -> impl Iterator<Item = Part> {
    let disks = (0..record.config.disks.len()).map(Part::Disk);
    disks.chain(record.files.iter().map(|file| file.part))
}

/// Seals the files in `dir`, which are as they were verified.
pub(super) fn seal(dir: &Path, record: &Record) -> Result<(), StoreError> {
    let files = parts(record).map(|part| Stamp::of(dir, part)).collect::<Result<_, _>>()?;
    write_json(&dir.join(SEAL), &Seal { files })
}

impl Store {
    /// Makes sure that the files of an image are those that were verified. Takes no time unless one was touched.
    pub(crate) fn check_seal(&self, image: &Image, record: &Record) -> Result<(), StoreError> {
        let dir = self.image_dir(image.digest);
        let sealed = read_json::<Seal>(&dir.join(SEAL))?.unwrap_or_default();
        let mut touched = Vec::new();
        for part in parts(record) {
            let now = Stamp::of(&dir, part)?;
            if !sealed.files.contains(&now) {
                touched.push(part);
            }
        }
        if touched.is_empty() {
            return Ok(());
        }
        tracing::warn!(image = %image.digest, "files of the image were touched; verifying them");
        let windows = Windows::read(&dir)?;
        for part in touched {
            let damage = match part {
                Part::Disk(index) => {
                    self.check(image, part, windows.disks.get(index).map_or(&[], Vec::as_slice), true)?
                }
                part => {
                    let files = record.files.iter().filter(|file| file.part == part);
                    let windows: Vec<_> =
                        files.map(|file| Window { offset: 0, size: file.size, digest: file.digest }).collect();
                    self.check(image, part, &windows, false)?
                }
            };
            if let Some(damage) = damage.into_iter().min() {
                return Err(StoreError::Corrupt { image: image.digest, damage });
            }
        }
        seal(&dir, record)
    }
}
