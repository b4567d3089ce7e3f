//! Service account tokens: JSON web tokens signed with ES256 by the server's own key.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};

use crate::pki::{PkiError, read_if_there, write_private};

/// The issuer, and the audience of tokens for the API itself.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc";

/// A name and UID inside a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reference {
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// The `kubernetes.io` claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bound {
    pub(crate) namespace: String,
    pub(crate) serviceaccount: Reference,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pod: Option<Reference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<Reference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) secret: Option<Reference>,
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claims {
    pub(crate) aud: Vec<String>,
    pub(crate) exp: i64,
    pub(crate) iat: i64,
    pub(crate) iss: String,
    pub(crate) jti: String,
    #[serde(rename = "kubernetes.io")]
    pub(crate) kubernetes: Bound,
    pub(crate) nbf: i64,
    pub(crate) sub: String,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
}

/// Signs and checks tokens.
pub(crate) struct Signer {
    pair: EcdsaKeyPair,
    key_id: String,
    random: SystemRandom,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

impl Signer {
    /// Reads the key from `path`, or makes it.
    pub(crate) fn open(path: &Path) -> Result<Self, PkiError> {
        let pem = if let Some(pem) = read_if_there(path)? {
            pem
        } else {
            let pem = rcgen::KeyPair::generate()
                .map_err(|source| PkiError::Make { subject: "service account tokens".into(), source })?
                .serialize_pem();
            write_private(path, &pem)?;
            pem
        };
        let unusable = || PkiError::Content { what: "private key", path: path.into() };
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| unusable())?;
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_der(), &random)
            .map_err(|_| unusable())?;
        let digest = ring::digest::digest(&ring::digest::SHA256, pair.public_key().as_ref());
        Ok(Self { key_id: URL_SAFE_NO_PAD.encode(digest), pair, random })
    }

    /// A signed token.
    pub(crate) fn sign(&self, claims: &Claims) -> Option<String> {
        let header = serde_json::json!({ "alg": "ES256", "kid": self.key_id, "typ": "JWT" });
        let head = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&header).ok()?);
        let body = URL_SAFE_NO_PAD.encode(serde_json::to_vec(claims).ok()?);
        let text = format!("{head}.{body}");
        let signature = self.pair.sign(&self.random, text.as_bytes()).ok()?;
        Some(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// The claims of a token that this server signed and that is valid at `now`. Whether what it
    /// is bound to still exists is for the caller to check.
    pub(crate) fn verify(&self, token: &str, now: Timestamp) -> Option<Claims> {
        let mut parts = token.split('.');
        let (head, body, signature) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        let header: Header = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(head).ok()?).ok()?;
        if header.alg != "ES256" {
            return None;
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.pair.public_key().as_ref())
            .verify(format!("{head}.{body}").as_bytes(), &signature)
            .ok()?;
        let claims: Claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(body).ok()?).ok()?;
        let now = now.as_second();
        (claims.iss == ISSUER && claims.nbf <= now + 5 && now < claims.exp).then_some(claims)
    }

    /// The public key, as the set of JSON web keys that `/openid/v1/jwks` serves.
    pub(crate) fn jwks(&self) -> serde_json::Value {
        // An uncompressed point: 4, x, y.
        let point = self.pair.public_key().as_ref();
        let (x, y) = point.get(1..).unwrap_or_default().split_at(point.len().saturating_sub(1) / 2);
        serde_json::json!({ "keys": [{
            "use": "sig", "kty": "EC", "kid": self.key_id, "crv": "P-256", "alg": "ES256",
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        }] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Claims {
        Claims {
            aud: vec![ISSUER.into()],
            exp: 2000,
            iat: 1000,
            iss: ISSUER.into(),
            jti: "j".into(),
            kubernetes: Bound {
                namespace: "t".into(),
                serviceaccount: Reference { name: "default".into(), uid: "u".into() },
                pod: None,
                node: None,
                secret: None,
            },
            nbf: 1000,
            sub: "system:serviceaccount:t:default".into(),
        }
    }

    #[test]
    fn tokens_are_valid_until_they_end_and_only_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sa.key");
        let token = Signer::open(&path).unwrap().sign(&claims()).unwrap();
        let signer = Signer::open(&path).unwrap();
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(signer.verify(&token, at(1500)), Some(claims()));
        assert_eq!(signer.verify(&token, at(2000)), None);
        assert_eq!(signer.verify(&token, at(900)), None);
        let (text, signature) = token.rsplit_once('.').unwrap();
        let (head, body) = text.split_once('.').unwrap();
        let forged = URL_SAFE_NO_PAD
            .encode(serde_json::to_vec(&Claims { sub: "system:serviceaccount:t:other".into(), ..claims() }).unwrap());
        assert_eq!(signer.verify(&format!("{head}.{forged}.{signature}"), at(1500)), None);
        let none = URL_SAFE_NO_PAD.encode(br#"{"alg":"none"}"#);
        assert_eq!(signer.verify(&format!("{none}.{body}."), at(1500)), None);
        let other = Signer::open(&dir.path().join("other.key")).unwrap();
        assert_eq!(other.verify(&token, at(1500)), None);
        for junk in ["", ".", "..", "a.b.c", "....", "é.é.é"] {
            assert_eq!(signer.verify(junk, at(1500)), None);
        }
    }
}
