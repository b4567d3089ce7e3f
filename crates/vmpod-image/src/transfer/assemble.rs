//! What only the data tells: the disk of a container image, and the size of a disk that the manifest doesn't say.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::TransferError;
use super::tar::Found;
use crate::config::{Config, DiskConfig};
use crate::format::{Plan, Target, containerdisk, native};
use crate::ingest::{Disk, Ingest};
use crate::qcow2::{self, Qcow2};
use crate::store::files::{io, remove_file};
use crate::store::record::{Part, Window, Windows, read_json};

/// What the layer `layer` of a container image was found to hold.
pub(super) fn found_path(dir: &Path, layer: usize) -> PathBuf {
    dir.join(format!("layer-{layer}.json"))
}

/// Finishes the files in `dir`, all of whose bytes are there. Returns the configuration with the disks' true sizes.
pub(crate) fn assemble(plan: &Plan, dir: &Path, mut windows: Windows) -> Result<(Config, Windows), TransferError> {
    let mut config = plan.config.clone();
    if plan.format == containerdisk::NAME {
        windows.disks = vec![container_disk(plan, dir)?];
    }
    for (index, disk) in config.disks.iter_mut().enumerate() {
        let part = Part::Disk(index);
        if plan.files.iter().any(|(file, size)| *file == part && size.is_some()) {
            continue;
        }
        let path = dir.join(part.file_name());
        let file = File::options().write(true).open(&path).map_err(io("open", &path))?;
        // Holes at the end aren't in the file yet.
        let written = file.metadata().map_err(io("read", &path))?.len();
        let end = windows.disks.get(index).into_iter().flatten().map(|window| window.offset + window.size).max();
        let size = written.max(end.unwrap_or(0)).next_multiple_of(512);
        if size == 0 {
            return Err(TransferError::Content("its disk is empty".to_owned()));
        }
        file.set_len(size).map_err(io("set the size of", &path))?;
        *disk = DiskConfig { size };
    }
    Ok((config, windows))
}

/// Makes the disk of a container image from what its layers hold.
fn container_disk(plan: &Plan, dir: &Path) -> Result<Vec<Window>, TransferError> {
    let mut layers = Vec::new();
    for layer in &plan.layers {
        if let Target::Tar { layer } = layer.target {
            layers.push((layer, read_json::<Found>(&found_path(dir, layer))?.unwrap_or_default()));
        }
    }
    let (name, layer) = the_disk(layers).map_err(TransferError::Content)?;
    let scratch = dir.join(Target::Tar { layer }.place().0);
    let target = dir.join(Part::Disk(0).file_name());
    let mut magic = Vec::new();
    let file = File::open(&scratch).map_err(io("open", &scratch))?;
    (&file).take(4).read_to_end(&mut magic).map_err(io("read", &scratch))?;
    let (disk, copy) = if magic == qcow2::MAGIC {
        let disk = Qcow2::open(file).map_err(|source| TransferError::Disk { name, source })?;
        // An earlier attempt may have left its own.
        let copy = File::create(&target).map_err(io("make", &target))?;
        copy.set_len(disk.size()).map_err(io("set the size of", &target))?;
        (Disk::Qcow2(disk), Some(copy))
    } else {
        // The scratch file stays until the image is shown, so that this can be done again after a crash.
        remove_file(&target)?;
        std::fs::hard_link(&scratch, &target).map_err(io("put in place", &target))?;
        (Disk::raw(file).map_err(io("read", &target))?, None)
    };
    let ingest = Ingest {
        disk: &disk,
        window: native::window(disk.size()),
        copy_to: copy.as_ref(),
        pack: false,
        cancelled: &AtomicBool::new(false),
        done: &|_| {},
    };
    let chunks = ingest.run().map_err(io("write", &target))?;
    let window =
        |chunk: &native::Chunk| Window { offset: chunk.offset, size: chunk.raw_size, digest: chunk.raw_digest };
    Ok(chunks.iter().map(window).collect())
}

/// The one disk that is left when each layer is laid upon those before it: its name, and the layer that has it.
fn the_disk(layers: Vec<(usize, Found)>) -> Result<(String, usize), String> {
    let mut disks = BTreeMap::new();
    for (layer, found) in layers {
        for removed in &found.removed {
            if removed.is_empty() {
                disks.clear();
            } else {
                disks.retain(|name: &String, _| name != removed && !name.starts_with(&format!("{removed}/")));
            }
        }
        if let Some((name, _)) = found.file {
            disks.insert(name, Some(layer));
        }
        for other in found.others {
            disks.insert(other, None);
        }
    }
    let names = || disks.keys().take(5).cloned().collect::<Vec<_>>().join(", ");
    match (disks.len(), disks.iter().next()) {
        (1, Some((name, Some(layer)))) => Ok((name.clone(), *layer)),
        (0, _) => Err("it has no file under /disk: it is an ordinary container image, no virtual machine".to_owned()),
        // The one that is left isn't the one that was kept while the layer came.
        (1, _) => Err(format!("a layer of it has several files under /disk ({})", names())),
        (count, _) => Err(format!("it has {count} files under /disk ({}), where there must be one", names())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(file: &str, others: &[&str], removed: &[&str]) -> Found {
        let strings = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Found {
            file: (!file.is_empty()).then(|| (file.to_owned(), 1)),
            others: strings(others),
            removed: strings(removed),
        }
    }

    #[test]
    fn layers_are_laid_upon_each_other() {
        let disk = |layers: Vec<Found>| the_disk(layers.into_iter().enumerate().collect());
        let at = |name: &str, layer| Ok((name.to_owned(), layer));
        assert_eq!(disk(vec![layer("", &[], &[]), layer("a", &[], &[])]), at("a", 1));
        assert_eq!(disk(vec![layer("a", &[], &[]), layer("a", &[], &[])]), at("a", 1));
        assert_eq!(disk(vec![layer("a", &[], &[]), layer("b", &[], &["a"])]), at("b", 1));
        assert_eq!(disk(vec![layer("a", &["x"], &[]), layer("b", &[], &[""])]), at("b", 1));
        assert!(
            disk(vec![layer("a", &[], &[]), layer("b", &[], &[])]).unwrap_err().contains("2 files under /disk (a, b)")
        );
        assert!(disk(vec![layer("a", &["b"], &[])]).is_err());
        assert!(disk(vec![layer("", &[], &[])]).unwrap_err().contains("ordinary container image"));
    }
}
