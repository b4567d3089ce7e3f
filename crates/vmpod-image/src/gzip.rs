//! Gzip on all processors: each block is a member of its own, and a file of several members is a gzip file like any other
//! (RFC 1952, 2.2). The same bytes always pack to the same bytes.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;

/// The bytes of a member.
const BLOCK: usize = 1 << 20;
const MOST_THREADS: usize = 16;

/// Packs what is written to it. [`ParallelGzip::finish`] writes the rest.
#[derive(Debug)]
pub(crate) struct ParallelGzip<W> {
    out: W,
    waiting: Vec<u8>,
    /// Bytes packed at once.
    batch: usize,
}

impl<W: Write> ParallelGzip<W> {
    pub(crate) fn new(out: W) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        Self { out, waiting: Vec::new(), batch: threads * 4 * BLOCK }
    }

    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.pack()?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn pack(&mut self) -> io::Result<()> {
        let blocks: Vec<&[u8]> = self.waiting.chunks(BLOCK).collect();
        let threads = (self.batch / BLOCK / 4).max(1);
        let packed: io::Result<Vec<Vec<Vec<u8>>>> = std::thread::scope(|scope| {
            let each = blocks.len().div_ceil(threads).max(1);
            let workers: Vec<_> = blocks
                .chunks(each)
                .map(|part| scope.spawn(move || part.iter().map(|block| member(block)).collect::<io::Result<Vec<_>>>()))
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|_| Err(io::Error::other("packing failed"))))
                .collect()
        });
        for part in packed?.iter().flatten() {
            self.out.write_all(part)?;
        }
        self.waiting.clear();
        Ok(())
    }
}

fn member(block: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(block.len() / 2), Compression::default());
    encoder.write_all(block)?;
    encoder.finish()
}

impl<W: Write> Write for ParallelGzip<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let step = bytes.len().min(self.batch - self.waiting.len());
        self.waiting.extend_from_slice(&bytes[..step]);
        if self.waiting.len() == self.batch {
            self.pack()?;
        }
        Ok(step)
    }

    fn flush(&mut self) -> io::Result<()> {
        // A shorter member would make other bytes of the same content.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn any_reader_unpacks_it_and_writes_of_any_size_give_the_same_bytes() {
        let mut bytes: Vec<u8> = (0..5_000_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        bytes.resize(9 << 20, 7);
        let pack = |step: usize| {
            let mut gzip = ParallelGzip::new(Vec::new());
            for part in bytes.chunks(step) {
                gzip.write_all(part).unwrap();
            }
            gzip.finish().unwrap()
        };
        let packed = pack(bytes.len());
        assert_eq!(packed, pack(123_457));
        assert!(packed.len() < bytes.len());
        let mut back = Vec::new();
        flate2::bufread::MultiGzDecoder::new(packed.as_slice()).read_to_end(&mut back).unwrap();
        assert!(back == bytes);
        let mut child = std::process::Command::new("gzip")
            .args(["-dc"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || input.write_all(&packed).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.stdout == bytes, "gzip itself reads all members");
    }
}
