//! Directories of unfinished work.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::files::{self, Lock};
use super::record::{Part, Record, Windows};
use super::seal;
use super::{Store, StoreError};
use crate::digest::Digest;
use crate::image::Image;
use crate::reference::Reference;

/// How long an unfinished pull is kept so that it can go on.
pub(crate) const KEEP_UNFINISHED: Duration = Duration::from_hours(7 * 24);

const LOCK: &str = "lock";
/// What a pull has finished; the name is here because its age tells when the pull last moved.
pub(crate) const JOURNAL: &str = "journal";

/// What a finished directory holds.
#[derive(Debug)]
pub(crate) struct Finished<'a> {
    pub(crate) record: Record,
    pub(crate) windows: Windows,
    /// The manifest, as its digest names it.
    pub(crate) manifest: &'a [u8],
    /// The configuration, as the manifest names it.
    pub(crate) config: &'a [u8],
}

impl Finished<'_> {
    fn keeps(&self, file: &str) -> bool {
        let disks = (0..self.record.config.disks.len()).map(Part::Disk);
        disks.chain(self.record.files.iter().map(|file| file.part)).any(|part| part.file_name() == file)
    }
}

/// A directory to work in, alone. Dropping it leaves the files for the next attempt; [`Work::discard`] doesn't.
#[derive(Debug)]
pub(crate) struct Work {
    dir: PathBuf,
    _lock: Lock,
}

/// The directory in which the image `digest` is pulled.
fn pull_dir(store: &Store, digest: Digest) -> PathBuf {
    store.dir().join("work").join(format!("pull-{}", digest.hex()))
}

impl Work {
    /// The work on a pull of `digest`; none while someone else works on it.
    pub(crate) fn attempt_pull(store: &Store, digest: Digest) -> Result<Option<Self>, StoreError> {
        let dir = pull_dir(store, digest);
        Ok(Lock::attempt(&dir.join(LOCK))?.map(|lock| Self { dir, _lock: lock }))
    }

    /// Waits until nobody works on a pull of `digest`, then takes it over. Blocks for as long as that takes.
    pub(crate) fn wait_pull(store: &Store, digest: Digest) -> Result<Self, StoreError> {
        let dir = pull_dir(store, digest);
        Lock::wait(&dir.join(LOCK)).map(|lock| Self { dir, _lock: lock })
    }

    /// A new directory for work that can't go on after a crash.
    pub(crate) fn scratch(store: &Store) -> Result<Self, StoreError> {
        let work = store.dir().join("work");
        loop {
            let dir = tempfile::Builder::new()
                .prefix("import-")
                .tempdir_in(&work)
                .map_err(files::io("make a directory in", &work))?
                .keep();
            // Someone who opens the store just now may have taken it for garbage.
            if let Some(lock) = Lock::attempt(&dir.join(LOCK))? {
                return Ok(Self { dir, _lock: lock });
            }
        }
    }

    /// Removes what is there unless a journal vouches for it.
    pub(crate) fn without_journal_empty(&self) -> Result<(), StoreError> {
        if !self.dir.join(JOURNAL).exists() {
            for file in files::names_in(&self.dir)? {
                if file != LOCK {
                    files::remove_file(&self.dir.join(file))?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes down what the directory holds, makes all of it durable and shows it as an image. The lock's file goes along with the
    /// rename, so whoever waits for it finds that it isn't at its path any more, looks again and finds the image.
    pub(crate) fn publish(
        &self,
        store: &Store,
        finished: &Finished<'_>,
        reference: &Reference,
    ) -> Result<Image, StoreError> {
        let names = files::names_in(&self.dir)?;
        for file in names.iter().filter(|file| finished.keeps(file)) {
            files::sync_file(&self.dir.join(file))?;
        }
        // From here on there is nothing to go on with: whoever comes after a kill must not find a journal that vouches for files
        // that are gone, or that only root can still write.
        files::remove_file(&self.dir.join(JOURNAL))?;
        files::sync_dir(&self.dir)?;
        for file in names.iter().filter(|file| *file != LOCK && *file != JOURNAL) {
            let path = self.dir.join(file);
            if !finished.keeps(file) {
                files::remove_file(&path)?;
                continue;
            }
            std::fs::set_permissions(&path, Permissions::from_mode(0o400))
                .map_err(files::io("make read-only", &path))?;
        }
        files::write_whole(&self.dir.join("manifest.json"), finished.manifest)?;
        files::write_whole(&self.dir.join("config.json"), finished.config)?;
        finished.windows.write(&self.dir)?;
        seal::seal(&self.dir, &finished.record)?;
        finished.record.write(&self.dir)?;
        let digest = finished.record.digest;
        let image = store.publish(&self.dir, digest, reference)?;
        files::remove_file(&store.image_dir(digest).join(LOCK))?;
        Ok(image)
    }

    pub(crate) fn discard(&self) -> Result<(), StoreError> {
        files::remove_tree(&self.dir)
    }
}

/// Removes work that nobody does any more: imports at once, pulls that haven't moved for `keep`. Returns the bytes freed.
pub(crate) fn sweep(store: &Store, keep: Duration) -> Result<u64, StoreError> {
    let work = store.dir().join("work");
    let mut freed = 0;
    for name in files::names_in(&work)? {
        let dir = work.join(&name);
        if name.starts_with("pull-") && !keep.is_zero() {
            let moved = [JOURNAL, LOCK]
                .iter()
                .filter_map(|file| std::fs::metadata(dir.join(file)).ok()?.modified().ok()?.elapsed().ok())
                .min();
            if moved.is_some_and(|moved| moved < keep) {
                continue;
            }
        }
        if let Some(_lock) = Lock::attempt(&dir.join(LOCK))? {
            for file in files::names_in(&dir)? {
                freed += files::allocated(&dir.join(file));
            }
            files::remove_tree(&dir)?;
        }
    }
    Ok(freed)
}
