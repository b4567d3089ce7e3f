//! Fetching bytes: in ranges, in parallel, each range again from where it broke off.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;

use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::report::Reporter;
use crate::blobs::{BlobError, BlobErrorKind, Blobs, Retry};
use crate::digest::{Digest, Hasher};
use crate::format::Blob;

/// The largest range that is fetched with one request.
pub(crate) const SEGMENT: u64 = 8 << 20;
/// Ranges of one stream under way at once.
const AHEAD: usize = 4;
/// What permits count, in bytes.
const UNIT: usize = 4096;

/// Fetched bytes. Memory counts as used until they are dropped.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) bytes: Vec<u8>,
    _permit: OwnedSemaphorePermit,
}

/// Fetches from one source.
pub(crate) struct Fetcher {
    blobs: Arc<dyn Blobs>,
    memory: Arc<Semaphore>,
    retry: Retry,
    report: Arc<Reporter>,
}

impl Fetcher {
    pub(crate) fn new(blobs: Arc<dyn Blobs>, memory: usize, retry: Retry, report: Arc<Reporter>) -> Self {
        Self { blobs, memory: Arc::new(Semaphore::new(memory / UNIT)), retry, report }
    }

    pub(crate) fn place(&self) -> &str {
        self.blobs.place()
    }

    /// Says that what came for `digest` wasn't it.
    pub(crate) fn distrust(&self, digest: Digest) {
        self.blobs.distrust(digest);
    }

    /// All bytes of `blob` from `start` up to `end`, at most [`SEGMENT`].
    pub(crate) async fn segment(&self, blob: Blob, start: u64, end: u64) -> Result<Piece, BlobError> {
        let size = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
        let permits = u32::try_from(size.div_ceil(UNIT)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.memory).acquire_many_owned(permits).await.map_err(|error| {
            BlobError::caused(BlobErrorKind::Fatal, "there is no memory to fetch into".to_owned(), error)
        })?;
        let mut bytes = Vec::with_capacity(size);
        let mut failures = 0;
        while bytes.len() < size {
            let before = bytes.len();
            let result = self.attempt(blob, start, end, &mut bytes).await;
            self.report.advance((bytes.len() - before) as u64);
            let Err(error) = result else { break };
            failures = if bytes.len() > before { 1 } else { failures + 1 };
            self.pause(blob, failures, error).await?;
        }
        Ok(Piece { bytes, _permit: permit })
    }

    async fn attempt(&self, blob: Blob, start: u64, end: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError> {
        let size = usize::try_from(end - start).unwrap_or(usize::MAX);
        let mut body = self.blobs.open(blob, start + bytes.len() as u64, end).await?;
        while bytes.len() < size {
            let Some(part) = body.next().await else { return Err(cut(blob)) };
            let part = part?;
            // A server that sends more than asked has its say about the digest, not about memory.
            let fits = part.len().min(size - bytes.len());
            bytes.extend_from_slice(&part[..fits]);
        }
        Ok(())
    }

    async fn pause(&self, blob: Blob, failures: u32, error: BlobError) -> Result<(), BlobError> {
        let BlobErrorKind::Transient(asked) = error.kind else { return Err(error) };
        let spread = blob.digest.first_byte();
        let Some(wait) = self.retry.wait(failures, asked, spread) else { return Err(error) };
        tracing::debug!(blob = %blob.digest, failures, ?wait, %error, "fetching again");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// Sends all bytes of a stream of blobs, in order, until the receiver has enough.
    pub(crate) async fn stream(&self, blobs: &[Blob], sender: mpsc::Sender<Piece>) -> Result<(), (Digest, BlobError)> {
        for &blob in blobs {
            let fail = |error| (blob.digest, error);
            let mut at = SEGMENT.min(blob.size);
            // The first range tells whether the source does ranges at all.
            let first = self.segment(blob, 0, at).await.map_err(fail)?;
            if sender.send(first).await.is_err() {
                return Ok(());
            }
            if !self.blobs.has_ranges() {
                if !self.sequential(blob, at, &sender).await.map_err(fail)? {
                    return Ok(());
                }
                continue;
            }
            let ranges = std::iter::from_fn(move || {
                let start = at;
                at = blob.size.min(at.saturating_add(SEGMENT));
                (start < at).then_some((start, at))
            });
            let mut segments = futures::stream::iter(ranges)
                .map(|(start, end)| self.segment(blob, start, end).boxed())
                .buffered(AHEAD);
            while let Some(piece) = segments.next().await {
                if sender.send(piece.map_err(fail)?).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The rest of a blob in one request, for sources without ranges. False when the receiver has enough.
    async fn sequential(&self, blob: Blob, mut at: u64, sender: &mpsc::Sender<Piece>) -> Result<bool, BlobError> {
        let mut failures = 0;
        while at < blob.size {
            let before = at;
            let result = async {
                let mut body = self.blobs.open(blob, at, blob.size).await?;
                while at < blob.size {
                    let Some(part) = body.next().await else { return Err(cut(blob)) };
                    let part = part?;
                    let fits = part.len().min(usize::try_from(blob.size - at).unwrap_or(usize::MAX));
                    let permits = u32::try_from(fits.div_ceil(UNIT)).unwrap_or(u32::MAX);
                    let permit = Arc::clone(&self.memory).acquire_many_owned(permits).await.map_err(|error| {
                        BlobError::caused(BlobErrorKind::Fatal, "there is no memory to fetch into".to_owned(), error)
                    })?;
                    at += fits as u64;
                    self.report.advance(fits as u64);
                    if sender.send(Piece { bytes: part[..fits].to_vec(), _permit: permit }).await.is_err() {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            .await;
            match result {
                Ok(more) => return Ok(more),
                Err(error) => {
                    failures = if at > before { 1 } else { failures + 1 };
                    self.pause(blob, failures, error).await?;
                }
            }
        }
        Ok(true)
    }
}

fn cut(blob: Blob) -> BlobError {
    BlobError::new(
        BlobErrorKind::Transient(None),
        format!("the connection ended before all {} bytes of the layer came", blob.size),
    )
}

/// Reads pieces as they come, and takes the digest of each blob on the way.
pub(crate) struct PieceReader {
    receiver: mpsc::Receiver<Piece>,
    piece: Option<(Piece, usize)>,
    blobs: VecDeque<Blob>,
    hasher: Hasher,
    /// Bytes of the first of `blobs` that were seen.
    seen: u64,
    wrong: Option<(Digest, String)>,
}

impl PieceReader {
    pub(crate) fn new(receiver: mpsc::Receiver<Piece>, blobs: &[Blob]) -> Self {
        Self {
            receiver,
            piece: None,
            blobs: blobs.iter().copied().collect(),
            hasher: Hasher::new(),
            seen: 0,
            wrong: None,
        }
    }

    /// Reads to the end, so that every digest is known, and says which blob has a wrong one.
    pub(crate) fn wrong(&mut self) -> Option<(Digest, String)> {
        while self.wrong.is_none() && self.next_piece() {}
        self.wrong.clone()
    }

    /// Whether there is one more piece.
    fn next_piece(&mut self) -> bool {
        let Some(piece) = self.receiver.blocking_recv() else { return false };
        self.hasher.update(&piece.bytes);
        self.seen += piece.bytes.len() as u64;
        if let Some(&blob) = self.blobs.front()
            && self.seen >= blob.size
        {
            let found = std::mem::replace(&mut self.hasher, Hasher::new()).finish();
            self.blobs.pop_front();
            self.seen = 0;
            if found != blob.digest {
                self.wrong = Some((blob.digest, format!("their digest is {found}")));
                return false;
            }
        }
        self.piece = Some((piece, 0));
        true
    }
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some((piece, at)) = &mut self.piece {
                let left = &piece.bytes[*at..];
                if !left.is_empty() {
                    let step = left.len().min(buffer.len());
                    buffer[..step].copy_from_slice(&left[..step]);
                    *at += step;
                    return Ok(step);
                }
                self.piece = None;
            }
            if self.wrong.is_some() || !self.next_piece() {
                return Ok(0);
            }
        }
    }
}
