//! Unpacking one stream to its places.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use super::Raw;
use crate::digest::Hasher;
use crate::format::{Encoding, Layer};
use crate::store::files;

/// Bytes handled at once.
const BUFFER: usize = 512 << 10;
/// The largest window that a Zstandard stream may ask for, as a power of two: 128 MiB is what `zstd` itself takes.
const ZSTD_WINDOW: u32 = 27;

/// Why a stream didn't unpack.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    /// It isn't what it should be.
    #[error("it doesn't unpack: {0}")]
    Read(io::Error),
    /// It is longer than it should be: perhaps a bomb.
    #[error("it unpacks to more than the {0} bytes that its manifest says")]
    Long(u64),
    /// It is shorter than it should be.
    #[error("it unpacks to {found} bytes, not to the {expected} that its manifest says")]
    Short {
        /// The bytes there were.
        found: u64,
        /// The bytes there should be.
        expected: u64,
    },
    /// The bytes couldn't be written: no fault of the stream.
    #[error("couldn't write")]
    Write(io::Error),
}

/// Unpacks all of `source` and writes it to each of `sinks`, whose ranges are holes.
pub(crate) fn unpack(source: &mut dyn Read, layer: &Layer, sinks: &[(Arc<File>, u64)]) -> Result<Raw, UnpackError> {
    let mut reader = decoder(source, layer.encoding).map_err(UnpackError::Read)?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let mut size = 0;
    loop {
        let have = fill(&mut reader, &mut buffer).map_err(UnpackError::Read)?;
        if have == 0 {
            break;
        }
        let bytes = &buffer[..have];
        if let Some(expected) = layer.raw_size
            && size + have as u64 > expected
        {
            return Err(UnpackError::Long(expected));
        }
        hasher.update(bytes);
        for (file, offset) in sinks {
            files::write_sparse(file, offset + size, bytes).map_err(UnpackError::Write)?;
        }
        size += have as u64;
    }
    if let Some(expected) = layer.raw_size
        && size < expected
    {
        return Err(UnpackError::Short { found: size, expected });
    }
    Ok(Raw { size, digest: hasher.finish() })
}

fn decoder<'a>(source: &'a mut dyn Read, encoding: Encoding) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match encoding {
        Encoding::Plain => Box::new(source),
        Encoding::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(source)?;
            decoder.window_log_max(ZSTD_WINDOW)?;
            Box::new(decoder)
        }
    })
}

/// Reads until the buffer is full or the stream ends, so that zeros are looked for in whole blocks.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match reader.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}
