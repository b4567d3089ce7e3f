//! Clones of an image, made without copying data.
//!
//! Where the file system shares blocks (APFS, btrfs, XFS), a disk is a clone of the image's file. Elsewhere it is a qcow2
//! overlay whose backing file is the image's: a few hundred bytes, written here without starting a process.

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::config::Boot;
use crate::image::{ClonedBoot, ClonedDisk, ClonedImage, DiskFormat, Image};
use crate::qcow2;
use crate::store::files::{self, io};
use crate::store::record::Part;
use crate::store::{Store, StoreError};

/// Sectors are the unit of a disk's size.
const SECTOR: u64 = 512;

/// What the hypervisor reads that is to get a clone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Any format of ours.
    Any,
    /// Raw disks only.
    Raw,
}

/// Makes the clone's files in `into`. The caller has pinned the image.
pub(crate) fn make(
    store: &Store,
    image: &Image,
    into: &Path,
    disk_size: Option<u64>,
    reads: Reads,
) -> Result<ClonedImage, StoreError> {
    files::make_dir(into)?;
    let from = store.image_dir(image.digest);
    let mut disks = Vec::new();
    for (index, disk) in image.config.disks.iter().enumerate() {
        let asked = if index == 0 { disk_size.unwrap_or(0) } else { 0 };
        let size = asked.max(disk.size).next_multiple_of(SECTOR);
        let base = from.join(Part::Disk(index).file_name());
        disks.push(match reads {
            Reads::Any => clone_disk(&base, DiskFormat::Raw, into, index, size)?,
            Reads::Raw => raw_disk(&base, into, index, size)?,
        });
    }
    let boot = match &image.config.boot {
        Boot::Firmware(firmware) => ClonedBoot::Firmware(*firmware),
        Boot::Kernel { cmdline } => {
            let initrd = from.join(Part::Initrd.file_name());
            ClonedBoot::Kernel {
                kernel: from.join(Part::Kernel.file_name()),
                initrd: initrd.exists().then_some(initrd),
                cmdline: cmdline.clone(),
            }
        }
    };
    let nvram = from.join(Part::Nvram.file_name());
    let nvram = if nvram.exists() {
        let to = into.join(Part::Nvram.file_name());
        files::remove_file(&to)?;
        std::fs::copy(&nvram, &to).map_err(io("copy the firmware variables to", &to))?;
        own(&to)?;
        Some(to)
    } else {
        None
    };
    Ok(ClonedImage { digest: image.digest, config: image.config.clone(), boot, disks, nvram })
}

/// Makes a writable copy of the disk file `base` in the directory `into`, without copying data: disk number `index`, of
/// `size` bytes. Files of an earlier attempt are replaced. The base must stay as it is while the copy is in use.
pub fn clone_disk(
    base: &Path,
    format: DiskFormat,
    into: &Path,
    index: usize,
    size: u64,
) -> Result<ClonedDisk, StoreError> {
    let raw = into.join(format!("disk-{index}.raw"));
    let overlay = into.join(format!("disk-{index}.qcow2"));
    files::remove_file(&raw)?;
    files::remove_file(&overlay)?;
    if format == DiskFormat::Raw && reflink_copy::reflink(base, &raw).is_ok() {
        own(&raw)?;
        let file = OpenOptions::new().write(true).open(&raw).map_err(io("open", &raw))?;
        file.set_len(size).map_err(io("grow", &raw))?;
        return Ok(ClonedDisk { path: raw, format: DiskFormat::Raw, size });
    }
    // Each file system refuses in its own words; whatever it was, an overlay will do, or tell better.
    files::remove_file(&raw)?;
    write_overlay(base, format, &overlay, size)?;
    Ok(ClonedDisk { path: overlay, format: DiskFormat::Qcow2, size })
}

/// A raw disk, cloned where that can be.
fn raw_disk(base: &Path, into: &Path, index: usize, size: u64) -> Result<ClonedDisk, StoreError> {
    let raw = into.join(format!("disk-{index}.raw"));
    files::remove_file(&raw)?;
    reflink_copy::reflink_or_copy(base, &raw).map_err(io("copy the image's disk to", &raw))?;
    own(&raw)?;
    let file = OpenOptions::new().write(true).open(&raw).map_err(io("open", &raw))?;
    file.set_len(size).map_err(io("grow", &raw))?;
    Ok(ClonedDisk { path: raw, format: DiskFormat::Raw, size })
}

/// The image's files are read-only; a machine's own copies aren't.
fn own(path: &Path) -> Result<(), StoreError> {
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(io("make writable", path))
}

fn write_overlay(base: &Path, format: DiskFormat, path: &PathBuf, size: u64) -> Result<(), StoreError> {
    let overlay = qcow2::Overlay::new(base, format, size)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io("make", path))?;
    write_parts(&file, &overlay).map_err(io("write", path))
}

fn write_parts(file: &File, overlay: &qcow2::Overlay) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    file.set_len(overlay.file_size())?;
    for (offset, bytes) in overlay.parts() {
        file.write_all_at(bytes, *offset)?;
    }
    Ok(())
}
