//! Signatures of images, as cosign keeps them beside an image in its registry.
//!
//! The manifest of the tag `sha256-HEX.sig` has one layer for each signature: the layer's bytes are what was signed (a "simple
//! signing" document that names the image's digest), its annotation holds the signature. Only keys are believed; nothing is asked
//! of a transparency log or a certificate authority.

use std::path::Path;
use std::path::PathBuf;

use base64::Engine as _;
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;

use crate::blobs::{BlobError, BlobErrorKind, Retry};
use crate::digest::Digest;
use crate::manifest::{Document, Manifest};
use crate::mirror::Sources;
use crate::pull::again;
use crate::reference::Reference;

const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
const KIND: &str = "cosign container image signature";
/// An image has a few signatures.
const MOST_SIGNATURES: usize = 64;
/// What is signed is some hundred bytes.
const LARGEST_PAYLOAD: u64 = 64 << 10;
/// What comes before the point in the DER form of a P-256 key (RFC 5480).
const P256: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// Which images must be signed, and by whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignaturePolicy {
    /// A registry, or a registry and the beginning of a repository's name at a `/`; empty for every registry.
    pub scope: String,
    /// The key.
    pub key: PublicKey,
}

/// An ECDSA P-256 public key, which is what cosign makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(Vec<u8>);

/// Why an image isn't believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// A key's file.
    #[error("couldn't read the public key {path}", path = path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is no key.
    #[error("{path} holds no ECDSA P-256 public key in PEM (as `cosign generate-key-pair` writes to cosign.pub)", path = path.display())]
    Key {
        /// The file.
        path: PathBuf,
    },
    /// There is no signature.
    #[error("{0} is not signed, and the policy wants a signature")]
    Unsigned(Reference),
    /// There are signatures, none by a key of the policy.
    #[error("none of the {count} signatures of {reference} is by a key that the policy names")]
    Untrusted {
        /// The image.
        reference: Reference,
        /// How many there are.
        count: usize,
    },
    /// The signatures couldn't be looked at.
    #[error("couldn't look at the signatures of {reference}")]
    Fetch {
        /// The image.
        reference: Reference,
        /// What happened.
        source: Box<BlobError>,
    },
}

impl PublicKey {
    /// Reads a PEM file.
    pub fn read(path: &Path) -> Result<Self, SignatureError> {
        let pem = std::fs::read(path).map_err(|source| SignatureError::KeyFile { path: path.to_owned(), source })?;
        Self::from_pem(&pem).ok_or_else(|| SignatureError::Key { path: path.to_owned() })
    }

    fn from_pem(pem: &[u8]) -> Option<Self> {
        let der = SubjectPublicKeyInfoDer::from_pem_slice(pem).ok()?;
        let point = der.strip_prefix(&P256)?;
        (point.len() == 65 && point[0] == 4).then(|| Self(point.to_vec()))
    }

    fn signed(&self, payload: &[u8], signature: &[u8]) -> bool {
        let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_ASN1, &self.0);
        key.verify(payload, signature).is_ok()
    }
}

impl SignaturePolicy {
    fn covers(&self, reference: &Reference) -> bool {
        let name = format!("{}/{}", reference.registry().unwrap_or_default(), reference.repository());
        let scope = self.scope.trim_end_matches('/');
        scope.is_empty() || name.strip_prefix(scope).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Signed,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Signed {
    #[serde(rename = "docker-manifest-digest")]
    digest: Digest,
}

/// Whether a payload is about this image.
fn names(payload: &[u8], digest: Digest) -> bool {
    serde_json::from_slice::<Payload>(payload)
        .is_ok_and(|payload| payload.critical.kind == KIND && payload.critical.image.digest == digest)
}

/// Makes sure that a policy's key signed `digest`, if any policy covers the image. Any one of the keys will do.
pub(crate) async fn check(
    policies: &[SignaturePolicy],
    reference: &Reference,
    digest: Digest,
    sources: &Sources,
    retry: Retry,
) -> Result<(), SignatureError> {
    let keys: Vec<&PublicKey> =
        policies.iter().filter(|policy| policy.covers(reference)).map(|policy| &policy.key).collect();
    if keys.is_empty() {
        return Ok(());
    }
    let fetch = |source| SignatureError::Fetch { reference: reference.clone(), source: Box::new(source) };
    let tag = format!("sha256-{}.sig", digest.hex());
    let bytes = match again(retry, || sources.manifest(&tag)).await {
        Ok(bytes) => bytes,
        Err(error) if error.kind == BlobErrorKind::Missing => return Err(SignatureError::Unsigned(reference.clone())),
        Err(error) => return Err(fetch(error)),
    };
    let manifest: Manifest = match Document::parse(&bytes) {
        Ok(Document::Manifest(manifest)) => *manifest,
        _ => return Err(SignatureError::Untrusted { reference: reference.clone(), count: 0 }),
    };
    let signatures: Vec<_> = manifest.layers.iter().filter(|layer| layer.media_type == PAYLOAD).collect();
    for layer in signatures.iter().take(MOST_SIGNATURES).filter(|layer| layer.size <= LARGEST_PAYLOAD) {
        let Some(signature) = layer.annotations.get(SIGNATURE) else { continue };
        let Ok(signature) = base64::engine::general_purpose::STANDARD.decode(signature) else { continue };
        let payload = again(retry, || sources.blob(layer.digest)).await.map_err(fetch)?;
        if names(&payload, digest) && keys.iter().any(|key| key.signed(&payload, &signature)) {
            return Ok(());
        }
    }
    Err(SignatureError::Untrusted { reference: reference.clone(), count: signatures.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(scope: &str) -> SignaturePolicy {
        SignaturePolicy { scope: scope.to_owned(), key: PublicKey(Vec::new()) }
    }

    #[test]
    fn a_scope_ends_at_a_slash() {
        let image = Reference::parse("r.example/ci/ubuntu:24.04").unwrap();
        for scope in ["", "r.example", "r.example/", "r.example/ci", "r.example/ci/ubuntu"] {
            assert!(policy(scope).covers(&image), "{scope:?}");
        }
        for scope in ["r.exampl", "r.example/c", "r.example/ci/ubuntu/x", "other"] {
            assert!(!policy(scope).covers(&image), "{scope:?}");
        }
    }

    #[test]
    fn what_cosign_signed_is_believed_and_nothing_else() {
        // Made with openssl: `ecparam -name prime256v1 -genkey`, `ec -pubout`, `dgst -sha256 -sign`.
        let key = PublicKey::from_pem(include_bytes!("../tests/data/cosign/cosign.pub")).unwrap();
        let payload = include_bytes!("../tests/data/cosign/payload.json");
        let signature = include_bytes!("../tests/data/cosign/signature.der");
        assert!(key.signed(payload, signature));
        let mut other = payload.to_vec();
        other[10] ^= 1;
        assert!(!key.signed(&other, signature));
        assert!(!key.signed(payload, &signature[1..]));
        assert!(names(payload, Digest::of(b"image")));
        assert!(!names(payload, Digest::of(b"another image")));
        assert!(!names(b"{}", Digest::of(b"image")));
        assert!(PublicKey::from_pem(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n").is_none());
    }
}
