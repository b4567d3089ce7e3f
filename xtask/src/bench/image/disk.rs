//! The disk that is measured with.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::Result;

const MIB: u64 = 1 << 20;
/// Data and holes alternate in stripes of this many MiB.
const STRIPE: u64 = 64;
/// What vmpod's format cuts such a disk into.
const WINDOW: u64 = 4 << 20;

/// Half holes; of the data one MiB in four is noise, the rest a guest's file system.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Bytes.
    pub(super) size: u64,
}

impl Shape {
    /// Writes the disk; returns the bytes of data.
    pub(super) fn write(self, rootfs: &Path, to: &Path) -> Result<u64> {
        let source = Rootfs::open(rootfs)?;
        let file = File::create(to)?;
        file.set_len(self.size)?;
        let mut data = 0;
        for number in self.data() {
            let part = if number % 4 == 3 { noise(number, 1 << 20) } else { source.part(data / MIB)? };
            file.write_all_at(&part, number * MIB)?;
            data += MIB;
        }
        Ok(data)
    }

    /// Changes a few bytes in so many percent of the windows that hold data.
    pub(super) fn change(self, disk: &Path, percent: u64) -> Result<()> {
        let file = File::options().write(true).open(disk)?;
        let windows = self.data().filter(|number| (number * MIB).is_multiple_of(WINDOW));
        for number in
            windows.enumerate().filter(|(index, _)| (*index as u64).is_multiple_of(100 / percent)).map(|(_, n)| n)
        {
            file.write_all_at(b"a new version", number * MIB + 4321)?;
        }
        Ok(())
    }

    /// The numbers of the mebibytes that hold data.
    fn data(self) -> impl Iterator<Item = u64> {
        (0..self.size / MIB).filter(|number| (number / STRIPE).is_multiple_of(2))
    }
}

/// The data of a guest's disk, as often as it takes.
struct Rootfs {
    file: File,
    /// The numbers of the mebibytes that hold something.
    parts: Vec<u64>,
}

impl Rootfs {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut parts = Vec::new();
        let mut buffer = vec![0; 1 << 20];
        for number in 0..size / MIB {
            file.read_exact_at(&mut buffer, number * MIB)?;
            // Parts that are mostly empty would make the disk smaller than it says.
            if buffer.iter().filter(|byte| **byte != 0).count() > buffer.len() / 4 {
                parts.push(number);
            }
        }
        Ok(Self { file, parts })
    }

    fn part(&self, number: u64) -> Result<Vec<u8>> {
        let count = self.parts.len() as u64;
        let (turn, index) = (number / count, usize::try_from(number % count)?);
        let mut buffer = vec![0; 1 << 20];
        self.file.read_exact_at(&mut buffer, self.parts[index] * MIB)?;
        // The same file system again, moved a little, so that no window is equal to one of an earlier turn.
        buffer.rotate_left(usize::try_from(turn * 4096 % MIB)?);
        Ok(buffer)
    }
}

/// Bytes that don't pack.
pub(super) fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}
