//! Unpacking one stream to its places.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::sync::Arc;

use super::Raw;
use super::lz4::AppleLz4;
use super::tar::TarReader;
use crate::digest::Hasher;
use crate::format::{Encoding, Layer};
use crate::store::files;
use crate::store::record::write_json;

/// Bytes handled at once.
const BUFFER: usize = 512 << 10;
/// The largest window that a Zstandard stream may ask for, as a power of two: 128 MiB is what `zstd` itself takes.
const ZSTD_WINDOW: u32 = 27;

/// 64 TiB: what is longer is a trap.
const LARGEST: u64 = 64 << 40;

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

/// A place that unpacked bytes go to.
#[derive(Debug, Clone)]
pub(crate) struct Sink {
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
    /// The bytes are a tar archive: only its disk goes to the file, and what was found goes here.
    pub(crate) found: Option<PathBuf>,
}

/// Unpacks all of `source` and writes it to each of `sinks`, whose ranges are holes.
pub(crate) fn unpack(source: &mut dyn Read, layer: &Layer, sinks: &[Sink]) -> Result<Raw, UnpackError> {
    let mut reader = decoder(source, layer.encoding).map_err(UnpackError::Read)?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let mut size = 0;
    let mut archives: Vec<_> =
        sinks.iter().filter_map(|sink| Some((TarReader::new(&sink.file), sink.found.as_ref()?))).collect();
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
        for sink in sinks.iter().filter(|sink| sink.found.is_none()) {
            files::write_sparse(&sink.file, sink.offset + size, bytes).map_err(UnpackError::Write)?;
        }
        for (tar, _) in &mut archives {
            tar.push(bytes).map_err(archive_error)?;
        }
        size += have as u64;
        if size > LARGEST {
            return Err(UnpackError::Long(LARGEST));
        }
    }
    if let Some(expected) = layer.raw_size
        && size < expected
    {
        return Err(UnpackError::Short { found: size, expected });
    }
    for (tar, path) in archives {
        let found = tar.finish().map_err(archive_error)?;
        write_json(path, &found).map_err(|error| UnpackError::Write(io::Error::other(error)))?;
    }
    Ok(Raw { size, digest: hasher.finish() })
}

/// What the archive does wrong is the stream's fault; anything else is the disk's.
fn archive_error(error: io::Error) -> UnpackError {
    if error.kind() == io::ErrorKind::InvalidData { UnpackError::Read(error) } else { UnpackError::Write(error) }
}

fn decoder<'a>(source: &'a mut dyn Read, encoding: Encoding) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match encoding {
        Encoding::Plain => Box::new(source),
        Encoding::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(BUFFER, source))),
        Encoding::AppleLz4 => Box::new(AppleLz4::new(BufReader::with_capacity(BUFFER, source))),
        Encoding::Detect => {
            let mut source = BufReader::with_capacity(BUFFER, source);
            match source.fill_buf()? {
                [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
                [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                    let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
                    decoder.window_log_max(ZSTD_WINDOW)?;
                    Box::new(decoder)
                }
                _ => Box::new(source),
            }
        }
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
