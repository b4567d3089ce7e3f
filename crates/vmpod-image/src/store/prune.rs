//! Making room. What to remove is decided by a pure function; a machine's image is never among it.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Store, StoreError, files, work};
use crate::digest::Digest;

/// Its modification time tells when an image was last cloned.
const USED: &str = "used";

/// What may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prune {
    /// Unfinished pulls that nobody works on; the next pull begins from nothing.
    pub unfinished: bool,
    /// Images of registries that no machine uses. Images that have a local name stay: nothing could bring them back.
    pub unused: bool,
    /// Such images, but the longest unused first and only until the images take at most so many bytes.
    pub down_to: Option<u64>,
    /// Images that were used, or came, within this time stay.
    pub idle_for: Duration,
}

/// A file system's room, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// All of it.
    pub capacity: u64,
    /// What is left for users that aren't root.
    pub available: u64,
}

/// What went.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pruned {
    /// The images.
    pub images: Vec<Digest>,
    /// The bytes of disk freed.
    pub bytes: u64,
}

/// An image, as the decision sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Candidate {
    digest: Digest,
    bytes: u64,
    /// Since it was last cloned or came.
    idle: Duration,
    /// Whether it must stay.
    kept: bool,
}

/// The images to remove, the longest idle first.
fn plan(mut images: Vec<Candidate>, prune: Prune) -> Vec<Candidate> {
    let mut total: u64 = images.iter().map(|image| image.bytes).sum();
    images.sort_by_key(|image| (std::cmp::Reverse(image.idle), image.digest));
    images.retain(|image| {
        let goes =
            !image.kept && image.idle >= prune.idle_for && prune.down_to.map_or(prune.unused, |most| total > most);
        if goes {
            total -= image.bytes;
        }
        goes
    });
    images
}

/// Notes that an image is used now. It only orders removals: failing is no harm.
pub(super) fn mark_used(image: &Path) {
    drop(File::create(image.join(USED)));
}

impl Store {
    /// Makes room. Images that a machine uses stay.
    pub fn prune(&self, prune: Prune) -> Result<Pruned, StoreError> {
        let mut pruned = Pruned::default();
        if prune.unfinished {
            pruned.bytes += work::sweep(self, Duration::ZERO)?;
        }
        let held: HashSet<Digest> = self.holders()?.into_iter().map(|holder| holder.image).collect();
        let mut candidates = Vec::new();
        let images = self.list()?;
        for image in &images {
            let dir = self.image_dir(image.digest);
            let local = image.references.iter().any(crate::Reference::is_local);
            candidates.push(Candidate {
                digest: image.digest,
                bytes: image.stored_bytes,
                idle: idle(&dir),
                kept: local || held.contains(&image.digest),
            });
        }
        for candidate in plan(candidates, prune) {
            let Some(image) = images.iter().find(|image| image.digest == candidate.digest) else { continue };
            for reference in &image.references {
                // A name that moved to another image meanwhile isn't this one's any more.
                if self.get(reference)?.is_some_and(|now| now.digest == image.digest) {
                    self.remove(reference)?;
                }
            }
            // A machine that was quicker holds it, and it stays until that lets go.
            if self.record(image.digest)?.is_none() {
                pruned.images.push(image.digest);
                pruned.bytes += image.stored_bytes;
            }
        }
        Ok(pruned)
    }
}

fn idle(image: &Path) -> Duration {
    let used = image.join(USED);
    let came = super::record::Record::path(image);
    let touched = |path: &Path| -> Option<SystemTime> { std::fs::metadata(path).ok()?.modified().ok() };
    let last = touched(&used).max(touched(&came));
    last.and_then(|last| last.elapsed().ok()).unwrap_or_default()
}

/// The bytes that unfinished work takes.
pub(super) fn unfinished_bytes(store: &Store) -> Result<u64, StoreError> {
    let work = store.dir().join("work");
    let mut bytes = 0;
    for name in files::names_in(&work)? {
        let dir = work.join(name);
        for file in files::names_in(&dir)? {
            bytes += files::allocated(&dir.join(file));
        }
    }
    Ok(bytes)
}

impl Store {
    /// The room on the file system that holds the store.
    pub fn file_system(&self) -> Result<FileSystem, StoreError> {
        let found = rustix::fs::statvfs(self.dir())
            .map_err(|errno| files::io("look at the file system of", self.dir())(errno.into()))?;
        Ok(FileSystem {
            capacity: found.f_blocks.saturating_mul(found.f_frsize),
            available: found.f_bavail.saturating_mul(found.f_frsize),
        })
    }

    /// The bytes of disk that images take, whole ones only: what [`Prune::down_to`] counts.
    pub fn image_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.list()?.iter().map(|image| image.stored_bytes).sum())
    }

    /// The bytes of disk that the store takes: images and unfinished work.
    pub fn used_bytes(&self) -> Result<u64, StoreError> {
        let images: u64 = self.list()?.iter().map(|image| image.stored_bytes).sum();
        Ok(images + unfinished_bytes(self)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate(name: u8, bytes: u64, idle: u64, kept: bool) -> Candidate {
        Candidate { digest: Digest::of(&[name]), bytes, idle: Duration::from_secs(idle), kept }
    }

    #[test]
    fn the_longest_idle_goes_first() {
        let images = vec![candidate(1, 10, 5, false), candidate(2, 10, 50, false), candidate(3, 10, 500, true)];
        let gone = |prune| plan(images.clone(), prune).iter().map(|image| image.digest).collect::<Vec<_>>();
        let down_to = |most| Prune { down_to: Some(most), ..Prune::default() };
        assert_eq!(gone(Prune::default()), []);
        assert_eq!(gone(down_to(30)), []);
        assert_eq!(gone(down_to(29)), [Digest::of(&[2])]);
        assert_eq!(gone(down_to(0)), [Digest::of(&[2]), Digest::of(&[1])]);
        assert_eq!(gone(Prune { unused: true, ..Prune::default() }).len(), 2);
        assert_eq!(gone(Prune { unused: true, ..down_to(29) }).len(), 1);
        let young = Duration::from_secs(51);
        assert_eq!(gone(Prune { idle_for: young, ..down_to(0) }), [], "the only old one is kept");
        let young = Duration::from_secs(50);
        assert_eq!(gone(Prune { idle_for: young, ..down_to(0) }), [Digest::of(&[2])]);
    }

    proptest! {
        #[test]
        fn what_must_stay_stays_and_no_more_goes_than_must(
            images in proptest::collection::vec((0u64..100, 0u64..100, any::<bool>()), 0..20),
            most in 0u64..1000,
        ) {
            let images: Vec<_> = (0u8..).zip(&images).map(|(name, &(bytes, idle, kept))| candidate(name, bytes, idle, kept)).collect();
            let total: u64 = images.iter().map(|image| image.bytes).sum();
            let gone = plan(images.clone(), Prune { down_to: Some(most), ..Prune::default() });
            prop_assert!(gone.iter().all(|image| !image.kept));
            let freed: u64 = gone.iter().map(|image| image.bytes).sum();
            let left = total - freed;
            prop_assert!(left <= most || images.iter().filter(|image| !image.kept).count() == gone.len());
            if let Some(last) = gone.last() {
                prop_assert!(left + last.bytes > most);
            }
        }
    }
}
