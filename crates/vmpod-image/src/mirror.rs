//! A repository and its mirrors, as one source.
//!
//! Mirrors are asked first, in the order in which they were named, for tags as for everything else. One that can't answer is passed
//! over, and one that failed several times in a row isn't asked again during this pull. The origin has the last word: only
//! its errors are shown.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::blobs::{BlobError, BlobErrorKind, Blobs, Body};
use crate::digest::Digest;
use crate::format::Blob;
use crate::reference::Reference;
use crate::registry::{Access, RegistryError, Repository};

/// Failures in a row after which a mirror is left alone.
const PATIENCE: u32 = 3;

/// A registry that has copies of another one's images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The registry whose images it has: `host[:port]`.
    pub of: String,
    /// Where they are: `host[:port]`, with a path if the copies have one before their repository's name.
    pub at: String,
}

/// Why a text is no [`Mirror`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no mirror: REGISTRY=HOST[:PORT][/PATH] is wanted, without a scheme")]
pub struct InvalidMirror(String);

impl FromStr for Mirror {
    type Err = InvalidMirror;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || InvalidMirror(text.to_owned());
        let (of, at) = text.split_once('=').ok_or_else(bad)?;
        let at = at.trim_end_matches('/');
        let is_host =
            |host: &str| Reference::parse(&format!("{host}/x")).is_ok_and(|name| name.registry() == Some(host));
        let host = at.split('/').next().unwrap_or_default();
        if !is_host(of) || !is_host(host) || Reference::parse(&format!("{at}/x")).is_err() {
            return Err(bad());
        }
        Ok(Self { of: of.to_owned(), at: at.to_owned() })
    }
}

impl Mirror {
    /// The name of an image there; none if this mirrors another registry.
    fn name(&self, reference: &Reference) -> Option<Reference> {
        if reference.registry() != Some(self.of.as_str()) {
            return None;
        }
        let mut name = format!("{}/{}", self.at, reference.repository());
        if let Some(tag) = reference.tag() {
            name = format!("{name}:{tag}");
        }
        if let Some(digest) = reference.digest() {
            name = format!("{name}@{digest}");
        }
        Reference::parse(&name).ok()
    }
}

/// Where an image can be had: its mirrors, and last its own registry.
#[derive(Debug)]
pub(crate) struct Sources {
    all: Vec<Source>,
    /// How many sources sent wrong bytes for a blob.
    distrusted: Mutex<HashMap<Digest, usize>>,
}

#[derive(Debug)]
struct Source {
    repository: Repository,
    failures: AtomicU32,
}

impl Source {
    fn note(&self, worked: bool) {
        if worked {
            self.failures.store(0, Ordering::Relaxed);
        } else {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Sources {
    pub(crate) async fn open(
        reference: &Reference,
        mirrors: &[Mirror],
        access: &Access,
    ) -> Result<Self, RegistryError> {
        let mut all = Vec::new();
        for name in mirrors.iter().filter_map(|mirror| mirror.name(reference)) {
            match Repository::open(&name, access, false, None).await {
                Ok(repository) => all.push(Source { repository, failures: AtomicU32::new(0) }),
                Err(error) => tracing::warn!(mirror = %name, %error, "a mirror can't be used"),
            }
        }
        let repository = Repository::open(reference, access, false, None).await?;
        all.push(Source { repository, failures: AtomicU32::new(0) });
        Ok(Self { all, distrusted: Mutex::default() })
    }

    fn origin(&self) -> Option<&Source> {
        self.all.last()
    }

    /// Asks each source until one answers. The origin's error counts.
    async fn first<'a, T, F: Future<Output = Result<T, BlobError>> + 'a>(
        &'a self,
        skip: usize,
        ask: impl Fn(&'a Repository) -> F,
    ) -> Result<T, BlobError> {
        let last = self.all.len().saturating_sub(1);
        let mut result = Err(BlobError::new(BlobErrorKind::Fatal, "there is no source".to_owned()));
        for (index, source) in self.all.iter().enumerate().skip(skip.min(last)) {
            if index < last && source.failures.load(Ordering::Relaxed) >= PATIENCE {
                continue;
            }
            result = ask(&source.repository).await;
            match &result {
                Ok(_) => {
                    source.note(true);
                    return result;
                }
                Err(error) => {
                    // That a mirror lacks an image says nothing against it.
                    source.note(error.kind == BlobErrorKind::Missing);
                    if index < last {
                        tracing::debug!(mirror = source.repository.host(), %error, "asking the next");
                    }
                }
            }
        }
        result
    }

    pub(crate) async fn manifest(&self, version: &str) -> Result<Vec<u8>, BlobError> {
        self.first(0, |source| source.manifest(version)).await
    }

    pub(crate) async fn blob(&self, digest: Digest) -> Result<Vec<u8>, BlobError> {
        self.first(0, |source| source.blob(digest)).await
    }
}

#[async_trait::async_trait]
impl Blobs for Sources {
    async fn open(&self, blob: Blob, start: u64, end: u64) -> Result<Body, BlobError> {
        let skip =
            self.distrusted.lock().unwrap_or_else(PoisonError::into_inner).get(&blob.digest).copied().unwrap_or(0);
        self.first(skip, |source| source.open(blob, start, end)).await
    }

    fn has_ranges(&self) -> bool {
        self.all.iter().all(|source| source.repository.has_ranges())
    }

    fn place(&self) -> &str {
        self.origin().map_or("", |origin| origin.repository.place())
    }

    fn distrust(&self, digest: Digest) {
        *self.distrusted.lock().unwrap_or_else(PoisonError::into_inner).entry(digest).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_a_registry_and_a_place() {
        for good in ["docker.io=mirror.example.com", "r.example:5000=localhost:5000/cache/r", "r.example=10.0.0.1:80"] {
            good.parse::<Mirror>().unwrap();
        }
        for bad in [
            "",
            "docker.io",
            "=m.example",
            "docker.io=",
            "docker.io=https://m.example",
            "nohost=m.example",
            "r.example=UPPER/../x",
        ] {
            assert!(bad.parse::<Mirror>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_mirrored_registry_is_looked_for_there() {
        let mirror: Mirror = "r.example=m.example/cache".parse().unwrap();
        let there = |name: &str| mirror.name(&Reference::parse(name).unwrap()).map(|name| name.to_string());
        assert_eq!(there("r.example/ci/x:1").as_deref(), Some("m.example/cache/ci/x:1"));
        let digest = Digest::of(b"");
        assert_eq!(there(&format!("r.example/x@{digest}")), Some(format!("m.example/cache/x@{digest}")));
        assert_eq!(there("other.example/ci/x:1"), None);
        assert_eq!(there("x:1"), None);
    }
}
