//! Apple's LZ4 framing, which isn't LZ4's own.
//!
//! A stream is a run of blocks: `bv41`, raw size, packed size (32 bits each, little endian) and an LZ4 block; or `bv4-`, size and the
//! bytes as they are; or `bv4$`, the end. Matches reach back into earlier blocks, 64 KiB at most.

use std::io::{self, Read};

/// How far matches reach back.
const WINDOW: usize = 64 << 10;
/// Apple's library makes blocks of 64 KiB or so; what says more than this lies.
const LARGEST_BLOCK: usize = 16 << 20;

/// Decodes a stream, or several one after another.
pub(crate) struct AppleLz4<R> {
    source: R,
    /// What came before the present block, at most [`WINDOW`] bytes. It begins as zeros, as some encoders have it.
    history: Vec<u8>,
    block: Vec<u8>,
    at: usize,
    packed: Vec<u8>,
    /// Whether a stream is open: it may end only with its end mark.
    open: bool,
}

impl<R: Read> AppleLz4<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { source, history: vec![0; WINDOW], block: Vec::new(), at: 0, packed: Vec::new(), open: false }
    }

    /// Reads the next block; false at the end of everything.
    fn next_block(&mut self) -> io::Result<bool> {
        loop {
            self.remember();
            let mut magic = [0; 4];
            let have = read_up_to(&mut self.source, &mut magic)?;
            if have == 0 && !self.open {
                return Ok(false);
            }
            if have < 4 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.open = true;
            match &magic {
                b"bv41" => {
                    let (size, packed) = (self.size()?, self.size()?);
                    self.packed.resize(packed, 0);
                    self.source.read_exact(&mut self.packed)?;
                    self.block.resize(size, 0);
                    let written =
                        lz4_flex::block::decompress_into_with_dict(&self.packed, &mut self.block, &self.history)
                            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                    if written != size {
                        return Err(invalid("an LZ4 block has another size than it says"));
                    }
                }
                b"bv4-" => {
                    let size = self.size()?;
                    self.block.resize(size, 0);
                    self.source.read_exact(&mut self.block)?;
                }
                b"bv4$" => {
                    self.open = false;
                    self.history.fill(0);
                    continue;
                }
                _ => return Err(invalid("this is no block of Apple's LZ4 framing")),
            }
            if !self.block.is_empty() {
                return Ok(true);
            }
        }
    }

    /// Moves the finished block into the history.
    fn remember(&mut self) {
        if self.block.len() >= WINDOW {
            self.history.clear();
            self.history.extend_from_slice(&self.block[self.block.len() - WINDOW..]);
        } else if !self.block.is_empty() {
            self.history.drain(..self.block.len());
            self.history.extend_from_slice(&self.block);
        }
        self.block.clear();
        self.at = 0;
    }

    fn size(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 4];
        self.source.read_exact(&mut bytes)?;
        match usize::try_from(u32::from_le_bytes(bytes)) {
            Ok(size) if size <= LARGEST_BLOCK => Ok(size),
            _ => Err(invalid("an LZ4 block is larger than any encoder makes it")),
        }
    }
}

impl<R: Read> Read for AppleLz4<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() && !self.next_block()? {
            return Ok(0);
        }
        let left = &self.block[self.at..];
        let step = left.len().min(buffer.len());
        buffer[..step].copy_from_slice(&left[..step]);
        self.at += step;
        Ok(step)
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Reads until the buffer is full or the source ends.
fn read_up_to(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match source.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        AppleLz4::new(bytes).read_to_end(&mut out)?;
        Ok(out)
    }

    fn le(value: usize) -> [u8; 4] {
        u32::try_from(value).unwrap().to_le_bytes()
    }

    #[test]
    fn a_match_reaches_into_the_block_before() {
        let mut stream = b"bv4-".to_vec();
        stream.extend(le(5));
        stream.extend(b"hello");
        // No literal, a match of 4+6 bytes 5 back, then the last literal.
        let block = [0x06, 5, 0, 0x10, b'!'];
        stream.extend(b"bv41");
        stream.extend(le(11));
        stream.extend(le(block.len()));
        stream.extend(block);
        stream.extend(b"bv4$");
        assert_eq!(decode(&stream).unwrap(), b"hellohellohello!");
        let twice = [stream.clone(), stream.clone()].concat();
        assert_eq!(decode(&twice).unwrap(), b"hellohellohello!hellohellohello!");
        for cut in 1..stream.len() {
            assert!(decode(&stream[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_history_of_zeros_is_there_from_the_beginning() {
        let block = [0x06, 0, 0x10, 0x10, b'!'];
        let mut stream = b"bv41".to_vec();
        stream.extend(le(11));
        stream.extend(le(block.len()));
        stream.extend(block);
        stream.extend(b"bv4$");
        assert_eq!(decode(&stream).unwrap(), b"\0\0\0\0\0\0\0\0\0\0!");
    }

    proptest! {
        #[test]
        fn blocks_of_any_size_come_back(blocks in proptest::collection::vec((any::<bool>(), proptest::collection::vec(0u8..4, 0..70_000)), 0..5)) {
            let mut stream = Vec::new();
            let mut all = Vec::new();
            for (packed, bytes) in &blocks {
                if *packed {
                    // With what went before as dictionary, as Apple's encoder does.
                    let start = all.len() - all.len().min(WINDOW);
                    let block = lz4_flex::block::compress_with_dict(bytes, &all[start..]);
                    stream.extend(b"bv41");
                    stream.extend(le(bytes.len()));
                    stream.extend(le(block.len()));
                    stream.extend(block);
                } else {
                    stream.extend(b"bv4-");
                    stream.extend(le(bytes.len()));
                    stream.extend(bytes);
                }
                all.extend(bytes);
            }
            stream.extend(b"bv4$");
            prop_assert!(decode(&stream).unwrap() == all);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0usize..3) {
            let mut stream = [&b"bv41"[..], b"bv4-", b""][kind].to_vec();
            stream.extend(bytes);
            drop(decode(&stream));
        }
    }
}
