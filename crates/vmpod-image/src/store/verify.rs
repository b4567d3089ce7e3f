//! Reading an image again and comparing it with what was verified when it came.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::record::{FileRecord, Part, Window, Windows};
use super::{Store, StoreError, files};
use crate::digest::{Digest, Hasher};
use crate::image::Image;

const BUFFER: usize = 1 << 20;

/// A part of an image that isn't what it was.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Damage {
    /// The file, relative to the image's directory.
    pub file: String,
    /// Where it begins, bytes.
    pub offset: u64,
    /// How long it is, bytes.
    pub size: u64,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} bytes at {}", self.file, self.size, self.offset)
    }
}

impl Store {
    /// Reads all of an image and returns what is damaged. It takes as long as reading the disks; blocks.
    pub fn verify(&self, image: &Image) -> Result<Vec<Damage>, StoreError> {
        let dir = self.image_dir(image.digest);
        let record = self.record(image.digest)?.ok_or(StoreError::NoImage(image.digest))?;
        let mut damage = Vec::new();
        let manifest = dir.join("manifest.json");
        let bytes = std::fs::read(&manifest).map_err(files::io("read", &manifest))?;
        if Digest::of(&bytes) != image.digest {
            damage.push(Damage { file: "manifest.json".to_owned(), offset: 0, size: bytes.len() as u64 });
        }
        for FileRecord { part, size, digest } in &record.files {
            let window = Window { offset: 0, size: *size, digest: *digest };
            damage.extend(self.check(image, *part, &[window], false)?);
        }
        for (index, windows) in Windows::read(&dir)?.disks.iter().enumerate() {
            damage.extend(self.check(image, Part::Disk(index), windows, true)?);
        }
        damage.sort();
        Ok(damage)
    }

    pub(super) fn check(
        &self,
        image: &Image,
        part: Part,
        windows: &[Window],
        holes: bool,
    ) -> Result<Vec<Damage>, StoreError> {
        let path = self.image_dir(image.digest).join(part.file_name());
        let file = File::open(&path).map_err(files::io("open", &path))?;
        let length = file.metadata().map_err(files::io("read", &path))?.len();
        let mut parts: Vec<(u64, u64, Option<Digest>)> =
            windows.iter().map(|window| (window.offset, window.size, Some(window.digest))).collect();
        if holes {
            // What is in no window must be zero.
            let mut at = 0;
            for window in windows {
                parts.push((at, window.offset.saturating_sub(at), None));
                at = at.max(window.offset + window.size);
            }
            parts.push((at, length.saturating_sub(at), None));
        }
        let next = AtomicUsize::new(0);
        let damage = Mutex::new(Vec::new());
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(&(offset, size, digest)) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let intact = match digest {
                            Some(digest) => digest_of(&file, offset, size) == Some(digest),
                            None => zero(&file, offset, size),
                        };
                        if !intact {
                            let found = Damage { file: part.file_name(), offset, size };
                            damage.lock().unwrap_or_else(PoisonError::into_inner).push(found);
                        }
                    }
                });
            }
        });
        Ok(damage.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The digest of a range; none if it can't be read, which is damage, too.
fn digest_of(file: &File, mut offset: u64, size: u64) -> Option<Digest> {
    let end = offset + size;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BUFFER];
    while offset < end {
        let step = usize::try_from(end - offset).unwrap_or(usize::MAX).min(BUFFER);
        file.read_exact_at(&mut buffer[..step], offset).ok()?;
        hasher.update(&buffer[..step]);
        offset += step as u64;
    }
    Some(hasher.finish())
}

fn zero(file: &File, offset: u64, size: u64) -> bool {
    let end = offset + size;
    let mut at = offset;
    let mut buffer = vec![0; BUFFER];
    while let Ok(Some((start, stop))) = files::next_data(file, at, end) {
        let mut here = start;
        while here < stop {
            let step = usize::try_from(stop - here).unwrap_or(usize::MAX).min(BUFFER);
            if file.read_exact_at(&mut buffer[..step], here).is_err() || !files::is_zero(&buffer[..step]) {
                return false;
            }
            here += step as u64;
        }
        at = stop;
    }
    true
}
