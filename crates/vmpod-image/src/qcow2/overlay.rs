//! An empty qcow2 file over a backing file.

use std::path::Path;

use super::MAGIC;
use crate::image::DiskFormat;
use crate::store::StoreError;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Bytes of the disk that one entry of the first-level table covers.
const L1_COVERS: u64 = CLUSTER * (CLUSTER / 8);
/// Clusters that one refcount block counts, 16 bits each.
const REFBLOCK_COVERS: u64 = CLUSTER / 2;
const HEADER: usize = 104;
/// QEMU's limit for the name of a backing file.
const LONGEST_NAME: usize = 1023;
/// 64 TiB: far beyond any guest, and well within one refcount block and QEMU's 32 MiB of first-level table.
const LARGEST: u64 = 64 << 40;

/// What to write to get the overlay; all else is zero.
#[derive(Debug)]
pub(crate) struct Overlay {
    file_size: u64,
    parts: Vec<(u64, Vec<u8>)>,
}

impl Overlay {
    /// An overlay of `size` bytes over the file `backing`, an absolute path.
    pub(crate) fn new(backing: &Path, format: DiskFormat, size: u64) -> Result<Self, StoreError> {
        if !size.is_multiple_of(512) || size > LARGEST {
            return Err(StoreError::DiskSize { size, most: LARGEST });
        }
        let name = backing
            .to_str()
            .filter(|name| backing.is_absolute() && name.len() <= LONGEST_NAME)
            .ok_or_else(|| StoreError::BackingPath { path: backing.to_owned() })?;
        let l1_entries = size.div_ceil(L1_COVERS).max(1);
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
        // Header, refcount table, one refcount block, first-level table.
        let clusters = 3 + l1_clusters;
        debug_assert!(clusters <= REFBLOCK_COVERS, "one refcount block counts all clusters");

        let mut header = Vec::with_capacity(HEADER + 32 + name.len());
        let be32 = |header: &mut Vec<u8>, value: u32| header.extend(value.to_be_bytes());
        let be64 = |header: &mut Vec<u8>, value: u64| header.extend(value.to_be_bytes());
        let extensions = 16 + 8;
        header.extend(MAGIC);
        be32(&mut header, 3);
        be64(&mut header, (HEADER + extensions) as u64);
        be32(&mut header, u32::try_from(name.len()).unwrap_or(u32::MAX));
        be32(&mut header, CLUSTER_BITS);
        be64(&mut header, size);
        be32(&mut header, 0); // no encryption
        be32(&mut header, u32::try_from(l1_entries).unwrap_or(u32::MAX));
        be64(&mut header, 3 * CLUSTER); // first-level table
        be64(&mut header, CLUSTER); // refcount table
        be32(&mut header, 1); // of one cluster
        be32(&mut header, 0); // no snapshots
        be64(&mut header, 0);
        be64(&mut header, 0); // incompatible features
        be64(&mut header, 0); // compatible features
        be64(&mut header, 0); // autoclear features
        be32(&mut header, 4); // refcounts of 16 bits
        be32(&mut header, 104); // length of the header
        // Extension: the backing file's format. Without it QEMU would guess, and a guest could fool it.
        let format: &[u8; 8] = match format {
            DiskFormat::Raw => b"raw\0\0\0\0\0",
            DiskFormat::Qcow2 => b"qcow2\0\0\0",
        };
        be32(&mut header, 0xe279_2aca);
        be32(&mut header, if format[3] == 0 { 3 } else { 5 });
        header.extend(format);
        // End of extensions.
        be64(&mut header, 0);
        header.extend(name.as_bytes());

        let table = (2 * CLUSTER).to_be_bytes().to_vec();
        let counts = (0..clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
        Ok(Self { file_size: clusters * CLUSTER, parts: vec![(0, header), (CLUSTER, table), (2 * CLUSTER, counts)] })
    }

    /// The size of the file in bytes, nearly all of it a hole.
    pub(crate) fn file_size(&self) -> u64 {
        self.file_size
    }

    /// What to write where.
    pub(crate) fn parts(&self) -> &[(u64, Vec<u8>)] {
        &self.parts
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn write(path: &Path, overlay: &Overlay) {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::File::create(path).unwrap();
        file.set_len(overlay.file_size()).unwrap();
        for (offset, bytes) in overlay.parts() {
            file.write_all_at(bytes, *offset).unwrap();
        }
    }

    #[test]
    fn qemu_finds_nothing_wrong_and_reads_the_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base, with: odd \"name\".raw");
        std::fs::write(&base, vec![7; 3 << 20]).unwrap();
        for size in [3 << 20, 64 << 30, 20 << 40, LARGEST] {
            let path = dir.path().join("overlay.qcow2");
            write(&path, &Overlay::new(&base, DiskFormat::Raw, size).unwrap());
            let check =
                Command::new("qemu-img").args(["check", "-f", "qcow2", "--output=json"]).arg(&path).output().unwrap();
            assert!(check.status.success(), "{size}: {}", String::from_utf8_lossy(&check.stderr));
            let check: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
            assert_eq!((&check["leaks"], &check["corruptions"]), (&serde_json::Value::Null, &serde_json::Value::Null));
            let info =
                Command::new("qemu-img").args(["info", "-f", "qcow2", "--output=json"]).arg(&path).output().unwrap();
            let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["backing-filename"], base.to_str().unwrap());
            assert_eq!(info["backing-filename-format"], "raw");
        }
        let path = dir.path().join("small.qcow2");
        write(&path, &Overlay::new(&base, DiskFormat::Raw, 4 << 20).unwrap());
        let out = dir.path().join("out.raw");
        // An overlay of an overlay reads through both.
        let second = dir.path().join("second.qcow2");
        write(&second, &Overlay::new(&path, DiskFormat::Qcow2, 4 << 20).unwrap());
        let path = second;
        let convert = Command::new("qemu-img").args(["convert", "-O", "raw"]).args([&path, &out]).output().unwrap();
        assert!(convert.status.success(), "{}", String::from_utf8_lossy(&convert.stderr));
        let bytes = std::fs::read(&out).unwrap();
        assert_eq!(bytes.len(), 4 << 20);
        assert!(bytes[..3 << 20].iter().all(|&byte| byte == 7) && bytes[3 << 20..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_the_format_cannot_hold_is_refused() {
        let base = Path::new("/base.raw");
        assert!(matches!(Overlay::new(base, DiskFormat::Raw, 513), Err(StoreError::DiskSize { .. })));
        assert!(matches!(Overlay::new(base, DiskFormat::Raw, LARGEST + 512), Err(StoreError::DiskSize { .. })));
        assert!(matches!(
            Overlay::new(Path::new("base.raw"), DiskFormat::Raw, 512),
            Err(StoreError::BackingPath { .. })
        ));
        let long = format!("/{}", "x".repeat(1023));
        assert!(matches!(Overlay::new(Path::new(&long), DiskFormat::Raw, 512), Err(StoreError::BackingPath { .. })));
    }
}
