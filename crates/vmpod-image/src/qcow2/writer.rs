//! Writing a disk as a qcow2 file that stands alone, in one go: nothing is written twice, so it can go into a pipe.
//!
//! ```text
//! header │ refcount table │ refcount blocks │ first-level table │ second-level tables │ clusters with data
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;

use super::MAGIC;
use crate::store::files;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of a table of one cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// Clusters that one refcount block counts, 16 bits each.
const REFBLOCK_COVERS: u64 = CLUSTER / 2;
/// The cluster belongs to this file alone.
const COPIED: u64 = 1 << 63;
const HEADER: usize = 104;

/// A raw disk, and which of its clusters hold data.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    disk: &'a File,
    size: u64,
    map: Map,
    layout: Layout,
}

/// One bit for each cluster of the disk.
#[derive(Debug)]
struct Map {
    bits: Vec<u64>,
    clusters: u64,
}

impl Map {
    fn new(clusters: u64) -> io::Result<Self> {
        let words = usize::try_from(clusters.div_ceil(64)).map_err(io::Error::other)?;
        Ok(Self { bits: vec![0; words], clusters })
    }

    fn place(cluster: u64) -> (usize, u64) {
        (usize::try_from(cluster / 64).unwrap_or(usize::MAX), 1 << (cluster % 64))
    }

    fn set(&mut self, cluster: u64) {
        let (word, bit) = Self::place(cluster);
        self.bits[word] |= bit;
    }

    fn has(&self, cluster: u64) -> bool {
        let (word, bit) = Self::place(cluster);
        self.bits.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// The clusters with data, in order.
    fn data(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.clusters).filter(|&cluster| self.has(cluster))
    }

    /// Whether any cluster of a second-level table holds data.
    fn table_has_data(&self, table: u64) -> bool {
        // A table covers a whole number of words.
        let words = usize::try_from(ENTRIES / 64).unwrap_or(usize::MAX);
        let from = usize::try_from(table).unwrap_or(usize::MAX).saturating_mul(words);
        self.bits.iter().skip(from).take(words).any(|word| *word != 0)
    }

    fn tables(&self) -> u64 {
        self.clusters.div_ceil(ENTRIES).max(1)
    }
}

/// How many clusters each part of the file takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Layout {
    fn new(l1_entries: u64, l2: u64, data: u64) -> Self {
        let l1 = (l1_entries * 8).div_ceil(CLUSTER);
        let mut layout = Self { refcount_table: 1, refcount_blocks: 1, l1, l2, data };
        // The counts count themselves: each turn only grows them, and they grow by a thousandth of what they count.
        loop {
            let blocks = layout.clusters().div_ceil(REFBLOCK_COVERS);
            let table = (blocks * 8).div_ceil(CLUSTER);
            if (blocks, table) == (layout.refcount_blocks, layout.refcount_table) {
                return layout;
            }
            (layout.refcount_blocks, layout.refcount_table) = (blocks, table);
        }
    }

    fn clusters(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1 + self.l2 + self.data
    }

    fn refcount_blocks_at(&self) -> u64 {
        1 + self.refcount_table
    }

    fn l1_at(&self) -> u64 {
        self.refcount_blocks_at() + self.refcount_blocks
    }

    fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1
    }

    fn data_at(&self) -> u64 {
        self.l2_at() + self.l2
    }
}

impl<'a> Writer<'a> {
    /// Looks for the data of a raw disk. Reads all of it.
    pub(crate) fn new(disk: &'a File) -> io::Result<Self> {
        let size = disk.metadata()?.len();
        let mut map = Map::new(size.div_ceil(CLUSTER))?;
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while let Some((start, end)) = files::next_data(disk, at, size)? {
            let mut here = start / CLUSTER * CLUSTER;
            while here < end {
                let step = usize::try_from(size - here).unwrap_or(usize::MAX).min(buffer.len());
                let part = &mut buffer[..step];
                disk.read_exact_at(part, here)?;
                for (index, cluster) in part.chunks(1 << CLUSTER_BITS).enumerate() {
                    if !files::is_zero(cluster) {
                        map.set(here / CLUSTER + index as u64);
                    }
                }
                here += step as u64;
            }
            at = here.max(end);
        }
        let tables = map.tables();
        let l2 = (0..tables).filter(|&table| map.table_has_data(table)).count() as u64;
        let layout = Layout::new(tables, l2, map.data().count() as u64);
        Ok(Self { disk, size, map, layout })
    }

    /// The size of the file that [`Writer::write`] writes, bytes.
    pub(crate) fn file_size(&self) -> u64 {
        self.layout.clusters() * CLUSTER
    }

    /// Writes the file from its first byte to its last.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let layout = &self.layout;
        out.write_all(&self.header())?;
        self.entries(
            out,
            layout.refcount_table,
            (0..layout.refcount_blocks).map(|n| (layout.refcount_blocks_at() + n) * CLUSTER),
        )?;
        self.refcounts(out)?;
        let with_data: Vec<bool> = (0..self.map.tables()).map(|table| self.map.table_has_data(table)).collect();
        let mut next = layout.l2_at();
        let l1 = with_data.iter().map(|has| {
            let entry = if *has { (next * CLUSTER) | COPIED } else { 0 };
            next += u64::from(*has);
            entry
        });
        self.entries(out, layout.l1, l1)?;
        let mut next = layout.data_at();
        for table in (0u64..).zip(&with_data).filter_map(|(table, has)| has.then_some(table)) {
            let entries = (table * ENTRIES..(table + 1) * ENTRIES).map(|cluster| {
                let has = self.map.has(cluster);
                let entry = if has { (next * CLUSTER) | COPIED } else { 0 };
                next += u64::from(has);
                entry
            });
            self.entries(out, 1, entries)?;
        }
        let mut buffer = vec![0; 1 << CLUSTER_BITS];
        for cluster in self.map.data() {
            let start = cluster * CLUSTER;
            let step = usize::try_from((self.size - start).min(CLUSTER)).unwrap_or(buffer.len());
            self.disk.read_exact_at(&mut buffer[..step], start)?;
            buffer[step..].fill(0);
            out.write_all(&buffer)?;
        }
        Ok(())
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(1 << CLUSTER_BITS);
        let be32 = |header: &mut Vec<u8>, value: u32| header.extend(value.to_be_bytes());
        let be64 = |header: &mut Vec<u8>, value: u64| header.extend(value.to_be_bytes());
        header.extend(MAGIC);
        be32(&mut header, 3);
        be64(&mut header, 0); // no backing file
        be32(&mut header, 0);
        be32(&mut header, CLUSTER_BITS);
        be64(&mut header, self.size);
        be32(&mut header, 0); // no encryption
        be32(&mut header, u32::try_from(self.map.tables()).unwrap_or(u32::MAX));
        be64(&mut header, self.layout.l1_at() * CLUSTER);
        be64(&mut header, CLUSTER); // refcount table
        be32(&mut header, u32::try_from(self.layout.refcount_table).unwrap_or(u32::MAX));
        be32(&mut header, 0); // no snapshots
        be64(&mut header, 0);
        be64(&mut header, 0); // incompatible features
        be64(&mut header, 0); // compatible features
        be64(&mut header, 0); // autoclear features
        be32(&mut header, 4); // refcounts of 16 bits
        be32(&mut header, u32::try_from(HEADER).unwrap_or(0));
        header.resize(1 << CLUSTER_BITS, 0); // the end of the extensions is all zero
        header
    }

    /// A table of so many clusters; what `entries` doesn't fill is zero.
    #[expect(clippy::unused_self, reason = "a part of the writing")]
    fn entries(&self, out: &mut dyn Write, clusters: u64, entries: impl Iterator<Item = u64>) -> io::Result<()> {
        let size = usize::try_from(clusters * CLUSTER).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(size);
        for entry in entries {
            bytes.extend(entry.to_be_bytes());
        }
        bytes.resize(size, 0);
        out.write_all(&bytes)
    }

    fn refcounts(&self, out: &mut dyn Write) -> io::Result<()> {
        let total = self.layout.clusters();
        for block in 0..self.layout.refcount_blocks {
            let ones = total.saturating_sub(block * REFBLOCK_COVERS).min(REFBLOCK_COVERS);
            let mut bytes = [0u8, 1].repeat(usize::try_from(ones).map_err(io::Error::other)?);
            bytes.resize(1 << CLUSTER_BITS, 0);
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;
    use crate::qcow2::Qcow2;

    fn written(disk: &File) -> tempfile::NamedTempFile {
        let writer = Writer::new(disk).unwrap();
        let mut file = tempfile::Builder::new().suffix(".qcow2").tempfile().unwrap();
        writer.write(&mut file).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), writer.file_size());
        file
    }

    #[test]
    fn qemu_reads_what_is_written() {
        let mut disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len((3 << 30) + 512).unwrap();
        for (offset, byte) in [(0, 1), (70_000, 2), (1 << 30, 3), ((3 << 30) + 500, 4)] {
            disk.as_file().write_all_at(&[byte; 12], offset).unwrap();
        }
        let file = written(disk.as_file_mut());
        let qemu = |arguments: &[&str]| {
            let output = Command::new("qemu-img").args(arguments).output().unwrap();
            assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        let (disk, file) = (disk.path().to_str().unwrap(), file.path().to_str().unwrap());
        qemu(&["check", "-q", "-f", "qcow2", file]);
        qemu(&["compare", "-f", "raw", "-F", "qcow2", disk, file]);
    }

    #[test]
    fn a_layout_counts_its_own_counts() {
        let layout = Layout::new(1, 1, REFBLOCK_COVERS * 5);
        assert_eq!((layout.refcount_blocks, layout.refcount_table), (6, 1));
        assert!(layout.clusters() <= layout.refcount_blocks * REFBLOCK_COVERS);
        let huge = Layout::new(1 << 17, 1 << 17, 1 << 30);
        assert!(huge.clusters() <= huge.refcount_blocks * REFBLOCK_COVERS);
        assert!(huge.refcount_blocks * 8 <= huge.refcount_table * CLUSTER);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn our_reader_reads_it(size in 1u64..4_000_000, writes in proptest::collection::vec((any::<u64>(), 1u8..), 0..8)) {
            let disk = tempfile::tempfile().unwrap();
            disk.set_len(size.next_multiple_of(512)).unwrap();
            for (at, byte) in writes {
                disk.write_all_at(&[byte], at % size).unwrap();
            }
            let file = written(&disk);
            let reader = Qcow2::open(file.reopen().unwrap()).unwrap();
            prop_assert_eq!(reader.size(), size.next_multiple_of(512));
            let mut expected = vec![0; usize::try_from(reader.size()).unwrap()];
            disk.read_exact_at(&mut expected, 0).unwrap();
            let mut found = vec![0; expected.len()];
            reader.read(&mut found, 0).unwrap();
            prop_assert!(found == expected);
        }
    }
}
