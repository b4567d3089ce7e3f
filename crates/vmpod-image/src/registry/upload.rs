//! Writing to a repository.

use std::fs::File;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, StatusCode, header};
use reqwest::Response;
use reqwest::Url;

use super::Repository;
use crate::blobs::{BlobError, BlobErrorKind, Retry};
use crate::digest::Digest;
use crate::push::read_range;

/// A blob larger than this goes up in parts, and goes on with the part that failed.
const PART: usize = 16 << 20;

/// What a registry said to the question for a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Begun {
    /// It has the blob now, from the other repository.
    Mounted,
    /// It waits for the bytes at this address.
    Upload(Url),
}

impl Repository {
    /// Whether the repository has a blob.
    pub(crate) async fn has_blob(&self, digest: Digest) -> Result<bool, BlobError> {
        let response = self.send(Method::HEAD, &self.url(&format!("blobs/{digest}")), |request| request).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(false);
        }
        self.check(response, &format!("blob {digest}")).await.map(|_| true)
    }

    /// Begins an upload, or spares it when `from`, a repository of the same registry, has the blob.
    pub(crate) async fn begin(&self, digest: Digest, from: Option<&str>) -> Result<Begun, BlobError> {
        let path = match from {
            Some(from) => format!("blobs/uploads/?mount={digest}&from={}", from.replace('/', "%2F")),
            None => "blobs/uploads/".to_owned(),
        };
        let response =
            self.send(Method::POST, &self.url(&path), |request| request.header(header::CONTENT_LENGTH, 0)).await?;
        let response = self.check(response, &format!("an upload of {digest}")).await?;
        if response.status() == StatusCode::CREATED {
            return Ok(Begun::Mounted);
        }
        self.location(&response).map(Begun::Upload)
    }

    /// Sends all bytes of a blob to where an upload was begun.
    pub(crate) async fn upload(&self, mut at: Url, digest: Digest, bytes: Bytes) -> Result<(), BlobError> {
        let what = format!("an upload of {digest}");
        let mut rest = bytes.clone();
        let mut sent = 0;
        while bytes.len() > PART && !rest.is_empty() {
            let part = rest.split_to(rest.len().min(PART));
            let length = part.len() as u64;
            at = self.patch(&at, sent, part, &what).await?;
            sent += length;
        }
        self.finish_upload(at, digest, rest).await
    }

    /// Sends a file to where an upload was begun, in parts. A part that fails is sent again from where the registry has it; `sent` is
    /// told the bytes as they go.
    pub(crate) async fn upload_file(
        &self,
        mut at: Url,
        digest: Digest,
        (file, size): (&Arc<File>, u64),
        retry: Retry,
        sent: impl Fn(u64),
    ) -> Result<(), BlobError> {
        let what = format!("an upload of {digest}");
        let (mut done, mut told, mut failures) = (0, 0, 0);
        while done < size {
            let length = (size - done).min(PART as u64);
            let (from, start) = (Arc::clone(file), done);
            let part = tokio::task::spawn_blocking(move || read_range(&from, start, length))
                .await
                .map_err(std::io::Error::other)
                .and_then(|part| part)
                .map_err(|error| BlobError::caused(BlobErrorKind::Fatal, format!("couldn't read {digest}"), error))?;
            match self.patch(&at, done, Bytes::from(part), &what).await {
                Ok(next) => {
                    (at, done, failures) = (next, done + length, 0);
                    if done > told {
                        sent(done - told);
                        told = done;
                    }
                }
                Err(error) => {
                    failures += 1;
                    let BlobErrorKind::Transient(asked) = error.kind else { return Err(error) };
                    let Some(wait) = retry.wait(failures, asked, 0) else { return Err(error) };
                    tracing::debug!(%digest, failures, ?wait, %error, "sending again");
                    tokio::time::sleep(wait).await;
                    // How much of the part arrived only the registry knows; when it doesn't say, the part is sent again.
                    if let Ok((next, have)) = self.upload_status(&at, &what).await {
                        (at, done) = (next, have.min(size));
                    }
                }
            }
        }
        self.finish_upload(at, digest, Bytes::new()).await
    }

    async fn patch(&self, at: &Url, start: u64, part: Bytes, what: &str) -> Result<Url, BlobError> {
        let range = format!("{start}-{}", start + (part.len() as u64).saturating_sub(1));
        let response = self
            .send(Method::PATCH, at.as_str(), |request| {
                request
                    .header(header::CONTENT_TYPE, "application/octet-stream")
                    .header(header::CONTENT_RANGE, &range)
                    .body(part.clone())
            })
            .await?;
        self.location(&self.check(response, what).await?)
    }

    /// Where an upload goes on, and how many bytes of it are there.
    async fn upload_status(&self, at: &Url, what: &str) -> Result<(Url, u64), BlobError> {
        let response = self.send(Method::GET, at.as_str(), |request| request).await?;
        let response = self.check(response, what).await?;
        let range = response.headers().get(header::RANGE).and_then(|value| value.to_str().ok());
        // `0-N`, both included. Nothing at all is `0-0` by custom, and one byte is no part that was ever sent.
        let end: u64 = range.and_then(|range| range.rsplit_once('-')?.1.parse().ok()).unwrap_or(0);
        Ok((self.location(&response)?, if end == 0 { 0 } else { end + 1 }))
    }

    async fn finish_upload(&self, mut at: Url, digest: Digest, rest: Bytes) -> Result<(), BlobError> {
        at.query_pairs_mut().append_pair("digest", &digest.to_string());
        let response = self
            .send(Method::PUT, at.as_str(), |request| {
                request.header(header::CONTENT_TYPE, "application/octet-stream").body(rest.clone())
            })
            .await?;
        self.check(response, &format!("an upload of {digest}")).await.map(|_| ())
    }

    /// Writes a manifest under a tag or digest.
    pub(crate) async fn put_manifest(&self, version: &str, media_type: &str, bytes: Bytes) -> Result<(), BlobError> {
        let response = self
            .send(Method::PUT, &self.url(&format!("manifests/{version}")), |request| {
                request.header(header::CONTENT_TYPE, media_type).body(bytes.clone())
            })
            .await?;
        self.check(response, &format!("manifest {version}")).await.map(|_| ())
    }

    fn location(&self, response: &Response) -> Result<Url, BlobError> {
        let bad = || {
            BlobError::new(
                BlobErrorKind::Fatal,
                format!("registry {} began an upload without saying where", self.host()),
            )
        };
        let location =
            response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok()).ok_or_else(bad)?;
        let base = Url::parse(&self.base).map_err(|_| bad())?;
        let at = base.join(location).map_err(|_| bad())?;
        // Our token goes with it: not to another host, and not in the clear.
        let same = at.host_str() == base.host_str() && at.port_or_known_default() == base.port_or_known_default();
        if !same || at.scheme() != base.scheme() {
            // Proxies that end TLS are known to say http; the registry is still where it was.
            let mut mended = base.clone();
            if at.host_str() != base.host_str() {
                return Err(BlobError::new(
                    BlobErrorKind::Fatal,
                    format!("registry {} sends uploads to another host, {:?}", self.host(), at.host_str()),
                ));
            }
            mended.set_path(at.path());
            mended.set_query(at.query());
            return Ok(mended);
        }
        Ok(at)
    }
}
