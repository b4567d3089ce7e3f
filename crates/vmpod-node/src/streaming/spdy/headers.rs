//! Header blocks: names and values, compressed by one zlib stream a direction that starts from a dictionary.

use bytes::{Buf as _, Bytes};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// The longest block after decompression.
const MAX_BLOCK: usize = 64 * 1024;

/// Header names and values in the order of the frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of a header. Names are lowercase on the wire; case is ignored.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(own, _)| own.eq_ignore_ascii_case(name))?;
        // Several values are separated by NUL.
        value.split('\0').next()
    }

    /// Adds a header.
    pub fn push(&mut self, name: &str, value: &str) {
        self.0.push((name.to_ascii_lowercase(), value.to_owned()));
    }

    fn encode(&self) -> Vec<u8> {
        let mut block = Vec::new();
        let mut put = |number: usize| block.extend(u32::try_from(number).unwrap_or(0).to_be_bytes());
        put(self.0.len());
        for (name, value) in &self.0 {
            for text in [name, value] {
                block.extend(u32::try_from(text.len()).unwrap_or(0).to_be_bytes());
                block.extend_from_slice(text.as_bytes());
            }
        }
        block
    }

    fn parse(mut block: Bytes) -> Result<Self, BlockError> {
        fn text(block: &mut Bytes) -> Result<String, BlockError> {
            let length = block.try_get_u32().map_err(|_| BlockError::Malformed)?;
            let length = usize::try_from(length).map_err(|_| BlockError::Malformed)?;
            if length > block.len() {
                return Err(BlockError::Malformed);
            }
            String::from_utf8(block.split_to(length).into()).map_err(|_| BlockError::Malformed)
        }
        let count = block.try_get_u32().map_err(|_| BlockError::Malformed)?;
        let mut headers = Self::default();
        for _ in 0..count {
            let name = text(&mut block)?;
            let value = text(&mut block)?;
            headers.push(&name, &value);
        }
        if block.is_empty() { Ok(headers) } else { Err(BlockError::Malformed) }
    }
}

/// Why a block could not be read. The connection is lost with it, since both ends share the zlib state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BlockError {
    #[error("a header block is not compressed as SPDY/3 wants it")]
    Compression,
    #[error("a header block is longer than {MAX_BLOCK} bytes")]
    TooLong,
    #[error("a header block is malformed")]
    Malformed,
}

/// Reads the peer's blocks, in order.
pub(super) struct Reader {
    zlib: Decompress,
    dictionary: Vec<u8>,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self { zlib: Decompress::new(true), dictionary: dictionary() }
    }

    pub(super) fn read(&mut self, mut block: &[u8]) -> Result<Headers, BlockError> {
        let mut plain = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let (consumed, produced) = (self.zlib.total_in(), self.zlib.total_out());
            let status = match self.zlib.decompress(block, &mut buffer, FlushDecompress::Sync) {
                Ok(status) => Some(status),
                Err(error) if error.needs_dictionary().is_some() => {
                    self.zlib.set_dictionary(&self.dictionary).map_err(|_| BlockError::Compression)?;
                    None
                }
                Err(_) => return Err(BlockError::Compression),
            };
            let consumed = usize::try_from(self.zlib.total_in() - consumed).unwrap_or(usize::MAX);
            let produced = usize::try_from(self.zlib.total_out() - produced).unwrap_or(usize::MAX);
            block = block.get(consumed..).ok_or(BlockError::Compression)?;
            plain.extend_from_slice(buffer.get(..produced).ok_or(BlockError::Compression)?);
            if plain.len() > MAX_BLOCK {
                return Err(BlockError::TooLong);
            }
            match status {
                // No direction ever ends its stream.
                Some(Status::StreamEnd) => return Err(BlockError::Compression),
                Some(_) if block.is_empty() && produced < buffer.len() => break,
                Some(_) if consumed == 0 && produced == 0 => return Err(BlockError::Compression),
                None | Some(_) => {}
            }
        }
        Headers::parse(plain.into())
    }
}

/// Writes our blocks; frames must be sent in the order in which their blocks were made.
pub(super) struct Writer {
    zlib: Compress,
}

impl Writer {
    pub(super) fn new() -> Self {
        let mut zlib = Compress::new(Compression::default(), true);
        let set = zlib.set_dictionary(&dictionary());
        debug_assert!(set.is_ok(), "a new stream takes a dictionary");
        Self { zlib }
    }

    pub(super) fn write(&mut self, headers: &Headers) -> Result<Bytes, BlockError> {
        let plain = headers.encode();
        // Deflate never grows by more than this, and the flush marker is 5 bytes.
        let mut block = Vec::with_capacity(plain.len() + plain.len() / 16 + 64);
        let before = self.zlib.total_in();
        self.zlib.compress_vec(&plain, &mut block, FlushCompress::Sync).map_err(|_| BlockError::Compression)?;
        if self.zlib.total_in() - before != plain.len() as u64 || block.len() == block.capacity() {
            return Err(BlockError::Compression);
        }
        Ok(block.into())
    }
}

/// The words that SPDY/3's dictionary holds, each after its length.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding \
    content-language content-length content-location content-md5 content-range content-type date etag expect \
    expires from host if-match if-modified-since if-none-match if-range if-unmodified-since last-modified \
    location max-forwards pragma proxy-authenticate proxy-authorization range referer retry-after server te \
    trailer transfer-encoding upgrade user-agent vary via warning www-authenticate method get status 200_OK \
    version HTTP/1.1 url public set-cookie keep-alive origin";

/// What follows them.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized\
    403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,\
    text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// The dictionary of the SPDY/3 draft, section 2.6.10.1.
fn dictionary() -> Vec<u8> {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS.split_whitespace() {
        let word = word.replace('_', " ");
        dictionary.extend(u32::try_from(word.len()).unwrap_or(0).to_be_bytes());
        dictionary.extend_from_slice(word.as_bytes());
    }
    dictionary.extend_from_slice(TAIL.as_bytes());
    dictionary
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_dictionary_is_spdy_3s() {
        // The DICTID that peers announce: the Adler-32 of the dictionary.
        let (mut a, mut b) = (1_u32, 0_u32);
        for byte in dictionary() {
            a = (a + u32::from(byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
        assert_eq!(dictionary().len(), 1423);
    }

    #[test]
    fn a_block_that_inflates_without_end_is_refused() {
        let mut headers = Headers::default();
        headers.push("x", &"a".repeat(MAX_BLOCK));
        let block = Writer::new().write(&headers).unwrap();
        assert!(block.len() < 1000);
        assert_eq!(Reader::new().read(&block), Err(BlockError::TooLong));
    }

    #[test]
    fn a_header_has_the_first_of_its_values() {
        let mut headers = Headers::default();
        headers.push("Port", "80\x0081");
        assert_eq!(headers.get("port"), Some("80"));
        assert_eq!(headers.get("streamtype"), None);
    }

    proptest! {
        #[test]
        fn blocks_come_back_in_order(blocks in proptest::collection::vec(
            proptest::collection::vec(("[a-z:]{0,9}", "\\PC{0,40}"), 0..6), 0..6)
        ) {
            let (mut writer, mut reader) = (Writer::new(), Reader::new());
            for pairs in blocks {
                let mut headers = Headers::default();
                for (name, value) in &pairs {
                    headers.push(name, value);
                }
                let block = writer.write(&headers).unwrap();
                prop_assert_eq!(reader.read(&block).unwrap(), headers);
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(
            block in proptest::collection::vec(any::<u8>(), 0..200), flip in any::<(u8, u8)>(),
        ) {
            let _headers = Reader::new().read(&block);
            let _headers = Headers::parse(block.into());
            let mut headers = Headers::default();
            headers.push("streamtype", "stdout");
            let mut block = Writer::new().write(&headers).unwrap().to_vec();
            let at = usize::from(flip.0) % block.len();
            block[at] ^= flip.1;
            let _headers = Reader::new().read(&block);
        }
    }
}
