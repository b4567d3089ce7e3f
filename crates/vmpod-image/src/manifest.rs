//! OCI manifests and indexes, as far as images need them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// The largest manifest, index or configuration that is read. Registries take 4 MiB; some take more.
pub(crate) const LARGEST: u64 = 16 << 20;

/// What points to a blob or a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Descriptor {
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            artifact_type: None,
            platform: None,
            annotations: BTreeMap::new(),
        }
    }
}

/// The platform of a manifest in an index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) architecture: String,
}

/// An image manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) schema_version: u32,
    #[serde(default)]
    pub(crate) media_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
    pub(crate) config: Descriptor,
    #[serde(default)]
    pub(crate) layers: Vec<Descriptor>,
    /// The manifest that this one is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// The bytes a registry holds for the layers; equal layers count once.
    pub(crate) fn transfer_bytes(&self) -> u64 {
        let mut seen = std::collections::HashSet::new();
        self.layers
            .iter()
            .filter(|layer| seen.insert(layer.digest))
            .fold(0, |sum, layer| sum.saturating_add(layer.size))
    }
}

/// An index of manifests, also the one of an OCI layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Index {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) media_type: String,
    #[serde(default)]
    pub(crate) manifests: Vec<Descriptor>,
}

/// A manifest or an index: which of them only the content tells for sure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest(Box<Manifest>),
    Index(Index),
}

impl Document {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Probe {
            manifests: Option<serde::de::IgnoredAny>,
        }
        let probe: Probe = serde_json::from_slice(bytes)?;
        Ok(match probe.manifests {
            Some(_) => Self::Index(serde_json::from_slice(bytes)?),
            None => Self::Manifest(Box::new(serde_json::from_slice(bytes)?)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_tells_an_index_from_a_manifest() {
        let digest = Digest::of(b"");
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"a","digest":"{digest}","size":1}},"layers":[
                {{"mediaType":"b","digest":"{digest}","size":2}},{{"mediaType":"b","digest":"{digest}","size":2}}]}}"#
        );
        let Document::Manifest(manifest) = Document::parse(manifest.as_bytes()).unwrap() else { panic!() };
        assert_eq!(manifest.transfer_bytes(), 2);
        let index = Document::parse(br#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
        assert!(matches!(index, Document::Index(index) if index.manifests.is_empty()));
        assert!(Document::parse(b"{}").is_err());
    }
}
