//! Reading a qcow2 file that stands alone, or an overlay of our own.
//!
//! A file from elsewhere that names another one (a backing file or an external data file) is refused: an image from elsewhere must not make this
//! host read its own files.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use super::MAGIC;
use crate::store::files;

const L1_LARGEST: u64 = 32 << 20;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ALL_ZERO: u64 = 1;
/// 64 TiB: a larger disk is a lie.
const LARGEST: u64 = 64 << 40;
/// Second-level tables kept in memory.
const TABLES_KEPT: usize = 64;

/// Why a qcow2 file can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Qcow2Error {
    /// Something else.
    #[error("this is no qcow2 file")]
    Magic,
    /// A version other than 2 and 3.
    #[error("qcow2 version {0} isn't known")]
    Version(u32),
    /// An overlay.
    #[error("the file is an overlay on another file ({0:?}): flatten it with `qemu-img convert` first")]
    Backing(String),
    /// Data kept elsewhere.
    #[error("the file keeps its data in another file: flatten it with `qemu-img convert` first")]
    DataFile,
    /// An encrypted disk.
    #[error("the disk is encrypted")]
    Encrypted,
    /// Features that aren't known.
    #[error("the file needs features that aren't known here (bits {0:#x})")]
    Features(u64),
    /// A compression that isn't known.
    #[error("compression type {0} isn't known")]
    Compression(u8),
    /// A field out of bounds.
    #[error("the header is damaged: {0}")]
    Header(&'static str),
    /// The file ended, or the system failed.
    #[error("couldn't read the file")]
    Io(#[from] io::Error),
}

/// A qcow2 file open for reading. Reads may run in parallel.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    file: File,
    size: u64,
    cluster_bits: u32,
    l1: Vec<u64>,
    zstd: bool,
    extended: bool,
    version: u32,
    /// What an overlay lies upon, and its size.
    base: Option<(File, u64)>,
    tables: Mutex<HashMap<u64, Arc<Vec<u64>>>>,
}

/// Where a piece of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    Zero,
    /// What the file says nothing about: zero, or what the base has there.
    Absent,
    At(u64),
    Compressed {
        offset: u64,
        size: usize,
    },
}

impl Qcow2 {
    /// Reads the header and the first-level table of a file that stands alone.
    pub(crate) fn open(file: File) -> Result<Self, Qcow2Error> {
        Self::open_with(file, None)
    }

    /// The same for an overlay of our own. It lies upon `base`, a raw disk, whatever it says itself.
    pub(crate) fn open_over(file: File, base: File) -> Result<Self, Qcow2Error> {
        let size = base.metadata()?.len();
        Self::open_with(file, Some((base, size)))
    }

    fn open_with(file: File, base: Option<(File, u64)>) -> Result<Self, Qcow2Error> {
        let mut header = [0; 112];
        let have = read_up_to(&file, &mut header, 0)?;
        if have < 72 || header[..4] != MAGIC {
            return Err(Qcow2Error::Magic);
        }
        let be32 = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let be64 = |at: usize| (u64::from(be32(at)) << 32) | u64::from(be32(at + 4));
        let version = be32(4);
        if version != 2 && version != 3 {
            return Err(Qcow2Error::Version(version));
        }
        if be64(8) != 0 && base.is_none() {
            let mut name = vec![0; usize::try_from(be32(16)).unwrap_or(0).min(1023)];
            let length = read_up_to(&file, &mut name, be64(8)).unwrap_or(0);
            return Err(Qcow2Error::Backing(String::from_utf8_lossy(&name[..length]).into_owned()));
        }
        if be32(32) != 0 {
            return Err(Qcow2Error::Encrypted);
        }
        let (incompatible, length) = if version == 3 { (be64(72), be32(100)) } else { (0, 72) };
        // Bits 0 (dirty: refcounts may be wrong, which a reader doesn't mind), 3 (compression type), 4 (extended L2).
        let (data_file, compression_bit, extended) =
            (incompatible & 4 != 0, incompatible & 8 != 0, incompatible & 16 != 0);
        if incompatible & 2 != 0 {
            return Err(Qcow2Error::Header("it is marked corrupt; `qemu-img check -r all` may mend it"));
        }
        if data_file {
            return Err(Qcow2Error::DataFile);
        }
        if incompatible & !0b1_1111 != 0 {
            return Err(Qcow2Error::Features(incompatible & !0b1_1111));
        }
        let compression = if compression_bit && length > 104 { header[104] } else { 0 };
        if compression > 1 {
            return Err(Qcow2Error::Compression(compression));
        }
        let cluster_bits = be32(20);
        if !(9..=21).contains(&cluster_bits) || (extended && cluster_bits < 14) {
            return Err(Qcow2Error::Header("the cluster size is out of bounds"));
        }
        let size = be64(24);
        if size > LARGEST {
            return Err(Qcow2Error::Header("the disk is larger than 64 TiB"));
        }
        let l1_size = u64::from(be32(36));
        let l1_offset = be64(40);
        let entry_bits = if extended { 4 } else { 3 };
        let covers = 1u64 << (cluster_bits + cluster_bits - entry_bits);
        if l1_size * 8 > L1_LARGEST || l1_size < size.div_ceil(covers) {
            return Err(Qcow2Error::Header("the first-level table doesn't fit the disk"));
        }
        let l1 = read_table(&file, l1_offset, usize::try_from(l1_size).unwrap_or(0))?;
        let zstd = compression == 1;
        Ok(Self { file, size, cluster_bits, l1, zstd, extended, version, base, tables: Mutex::default() })
    }

    /// The disk's size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the disk that one second-level table covers.
    fn table_covers(&self) -> u64 {
        1 << (2 * self.cluster_bits - if self.extended { 4 } else { 3 })
    }

    /// The first offset at or after `offset` that may hold data; none if there is none.
    pub(crate) fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let own = self.next_own_data(offset);
        let Some((base, size)) = &self.base else { return Ok(own) };
        let below = files::next_data(base, offset, (*size).min(self.size))?.map(|(start, _)| start);
        Ok([own, below].into_iter().flatten().min())
    }

    fn next_own_data(&self, offset: u64) -> Option<u64> {
        let covers = self.table_covers();
        let mut at = offset;
        while at < self.size {
            let entry = self.l1.get(usize::try_from(at / covers).ok()?)?;
            if entry & OFFSET_MASK != 0 {
                return Some(at);
            }
            at = (at / covers + 1) * covers;
        }
        None
    }

    /// Fills `buffer`, which the caller has zeroed, from `offset`. Returns whether any of it is allocated: if not, it is zero.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        let cluster = 1u64 << self.cluster_bits;
        let granule = if self.extended { cluster / 32 } else { cluster };
        let mut any = false;
        let mut at = 0;
        while at < buffer.len() {
            let here = offset + at as u64;
            let within = here % granule;
            let step = usize::try_from(granule - within).unwrap_or(usize::MAX).min(buffer.len() - at);
            let part = &mut buffer[at..at + step];
            match self.piece(here)? {
                Piece::Zero => {}
                Piece::Absent => {
                    if let Some((base, size)) = self.base.as_ref().filter(|(_, size)| here < *size) {
                        any = true;
                        let within = usize::try_from(size - here).unwrap_or(usize::MAX).min(part.len());
                        read_up_to(base, &mut part[..within], here)?;
                    }
                }
                Piece::At(host) => {
                    any = true;
                    // The last cluster of a file may be cut: the rest is zero.
                    read_up_to(&self.file, part, host)?;
                }
                Piece::Compressed { offset: host, size } => {
                    any = true;
                    let whole = self.inflate(host, size)?;
                    let start = usize::try_from(here % cluster).unwrap_or(usize::MAX);
                    // With extended tables a granule is less than a cluster; one that is compressed is rare there.
                    part.copy_from_slice(&whole[start..start + step]);
                }
            }
            at += step;
        }
        Ok(any)
    }

    fn piece(&self, offset: u64) -> io::Result<Piece> {
        let covers = self.table_covers();
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a qcow2 table has an entry out of bounds");
        let index = |value: u64| usize::try_from(value).map_err(|_| damaged());
        let l1 = *self.l1.get(index(offset / covers)?).ok_or_else(damaged)? & OFFSET_MASK;
        if l1 == 0 {
            return Ok(Piece::Absent);
        }
        let table = self.table(l1)?;
        let cluster = 1u64 << self.cluster_bits;
        let slot = index(offset % covers / cluster)?;
        let entry = table[if self.extended { slot * 2 } else { slot }];
        if entry & COMPRESSED != 0 {
            let split = 62 - (self.cluster_bits - 8);
            let host = entry & ((1 << split) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> split) + 1;
            return Ok(Piece::Compressed { offset: host, size: index(sectors * 512 - host % 512)? });
        }
        let host = entry & OFFSET_MASK;
        let within = offset % cluster;
        if self.extended {
            let bit = within / (cluster / 32);
            let bitmap = table[slot * 2 + 1];
            let (allocated, zero) = (bitmap >> bit & 1 == 1, bitmap >> (32 + bit) & 1 == 1);
            return Ok(match (allocated && host != 0, zero) {
                (true, _) => Piece::At(host + within),
                (false, true) => Piece::Zero,
                (false, false) => Piece::Absent,
            });
        }
        if self.version >= 3 && entry & ALL_ZERO != 0 {
            return Ok(Piece::Zero);
        }
        if host == 0 {
            return Ok(Piece::Absent);
        }
        Ok(Piece::At(host + within))
    }

    fn table(&self, offset: u64) -> io::Result<Arc<Vec<u64>>> {
        let kept = |tables: &Mutex<HashMap<u64, Arc<Vec<u64>>>>| {
            tables.lock().unwrap_or_else(PoisonError::into_inner).get(&offset).cloned()
        };
        if let Some(table) = kept(&self.tables) {
            return Ok(table);
        }
        let table = Arc::new(read_table(&self.file, offset, 1 << (self.cluster_bits - 3))?);
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.len() >= TABLES_KEPT {
            tables.clear();
        }
        tables.insert(offset, Arc::clone(&table));
        Ok(table)
    }

    fn inflate(&self, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let mut packed = vec![0; size];
        let have = read_up_to(&self.file, &mut packed, offset)?;
        let packed = &packed[..have];
        let mut whole = vec![0; 1 << self.cluster_bits];
        if self.zstd {
            // The size counts whole sectors: what follows the frame is not part of it.
            let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?.single_frame();
            io::Read::read_exact(&mut decoder, &mut whole)?;
        } else {
            let mut inflater = flate2::Decompress::new(false);
            inflater
                .decompress(packed, &mut whole, flate2::FlushDecompress::Finish)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            if inflater.total_out() != whole.len() as u64 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a compressed qcow2 cluster is too short"));
            }
        }
        Ok(whole)
    }
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match file.read_at(&mut buffer[have..], offset.saturating_add(have as u64)) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

fn read_table(file: &File, offset: u64, entries: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; entries * 8];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes.chunks_exact(8).map(|entry| entry.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))).collect())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;

    fn qemu_img(arguments: &[&str], dir: &Path) {
        let output = Command::new("qemu-img").args(arguments).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// 3 MiB and a bit: text that compresses, noise that doesn't, and holes.
    fn sample(dir: &Path) -> (PathBuf, Vec<u8>) {
        let mut bytes = vec![0u8; (3 << 20) + 512];
        let mut state = 1u64;
        for (at, byte) in bytes.iter_mut().enumerate() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = match at >> 18 {
                0 | 5 => u8::try_from(at % 7).unwrap(),
                2 | 12 => state.to_be_bytes()[0],
                _ => 0,
            };
        }
        let path = dir.join("sample.raw");
        std::fs::write(&path, &bytes).unwrap();
        (path, bytes)
    }

    #[test]
    fn reads_what_qemu_writes() {
        let dir = tempfile::tempdir().unwrap();
        let (_, bytes) = sample(dir.path());
        for arguments in [
            &["-O", "qcow2"][..],
            &["-O", "qcow2", "-o", "compat=0.10"],
            &["-O", "qcow2", "-o", "cluster_size=512"],
            &["-O", "qcow2", "-o", "cluster_size=2M"],
            &["-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k"],
            &["-c", "-O", "qcow2"],
            &["-c", "-O", "qcow2", "-o", "compression_type=zstd"],
            &["-c", "-O", "qcow2", "-o", "extended_l2=on,compression_type=zstd"],
        ] {
            let mut all = vec!["convert", "-f", "raw"];
            all.extend(arguments);
            all.extend(["sample.raw", "sample.qcow2"]);
            qemu_img(&all, dir.path());
            let disk = Qcow2::open(File::open(dir.path().join("sample.qcow2")).unwrap()).unwrap();
            assert_eq!(disk.size(), bytes.len() as u64);
            let mut back = vec![0; bytes.len()];
            assert!(disk.read(&mut back, 0).unwrap());
            assert!(back == bytes, "{arguments:?}");
            let mut hole = vec![0; 1000];
            let small_clusters = !arguments.contains(&"cluster_size=2M");
            assert_eq!(disk.read(&mut hole, (1 << 18) + 17).unwrap(), !small_clusters, "{arguments:?}");
        }
    }

    #[test]
    fn a_whole_hole_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        qemu_img(&["create", "-f", "qcow2", "a.qcow2", "40G"], dir.path());
        let disk = Qcow2::open(File::open(dir.path().join("a.qcow2")).unwrap()).unwrap();
        assert_eq!((disk.size(), disk.next_data(0).unwrap()), (40 << 30, None));
    }

    #[test]
    fn a_file_that_names_another_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        sample(dir.path());
        qemu_img(&["create", "-f", "qcow2", "-b", "sample.raw", "-F", "raw", "over.qcow2"], dir.path());
        qemu_img(&["create", "-f", "qcow2", "-o", "data_file=data.raw", "out.qcow2", "1M"], dir.path());
        let open = |name: &str| Qcow2::open(File::open(dir.path().join(name)).unwrap()).unwrap_err();
        assert!(matches!(open("over.qcow2"), Qcow2Error::Backing(name) if name == "sample.raw"));
        assert!(matches!(open("out.qcow2"), Qcow2Error::DataFile));
        assert!(matches!(open("sample.raw"), Qcow2Error::Magic));
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn damage_never_panics(noise in proptest::collection::vec((0usize..600, proptest::prelude::any::<u8>()), 0..20)) {
            let mut bytes = vec![0u8; 4096];
            bytes[..4].copy_from_slice(&MAGIC);
            bytes[7] = 3;
            bytes[23] = 9;
            bytes[29] = 8;
            bytes[39] = 64;
            bytes[46] = 2;
            bytes[103] = 104;
            for (at, value) in noise {
                bytes[at] = value;
            }
            let mut file = tempfile::tempfile().unwrap();
            io::Write::write_all(&mut file, &bytes).unwrap();
            if let Ok(disk) = Qcow2::open(file) {
                let mut buffer = [0; 2000];
                let length = buffer.len().min(usize::try_from(disk.size()).unwrap_or(usize::MAX));
                drop(disk.read(&mut buffer[..length], 0));
            }
        }
    }
}
