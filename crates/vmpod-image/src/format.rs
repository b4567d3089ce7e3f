//! Image formats. Each reads a manifest and says, as a [`Plan`], which bytes go where; the pipeline does the rest and
//! knows no format.

use std::collections::{BTreeSet, HashMap};
use std::str::FromStr;

use serde::Deserialize;

use crate::config::Config;
use crate::digest::Digest;
use crate::manifest::{Descriptor, Manifest};
use crate::media;
use crate::store::record::Part;

mod agoda;
pub(crate) mod containerdisk;
mod lume;
pub(crate) mod native;
mod tart;

/// 64 TiB: no disk of a guest is larger, so a manifest that says so lies.
const LARGEST_DISK: u64 = 64 << 40;
/// More layers than any manifest within [`crate::manifest::LARGEST`] needs.
const MOST_LAYERS: usize = 65_536;
/// Documents among the layers; every format that has one has one.
const MOST_DOCUMENTS: usize = 8;

/// What to fetch and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The format's name.
    pub(crate) format: &'static str,
    /// The configuration, translated.
    pub(crate) config: Config,
    /// The files, with their sizes in bytes; none where only the data tells.
    pub(crate) files: Vec<(Part, Option<u64>)>,
    /// The streams to fetch.
    pub(crate) layers: Vec<Layer>,
}

/// One compressed stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    /// The blobs that make up the stream, one after another: nearly always one.
    pub(crate) blobs: Vec<Blob>,
    /// How the stream is packed.
    pub(crate) encoding: Encoding,
    /// What it must unpack to.
    pub(crate) raw_size: Option<u64>,
    /// The digest of what it unpacks to.
    pub(crate) raw_digest: Option<Digest>,
    /// Where what it unpacks to goes.
    pub(crate) target: Target,
}

/// A blob of a registry or a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// How a stream is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Encoding {
    Plain,
    Zstd,
    Gzip,
    /// Apple's LZ4 framing.
    AppleLz4,
    /// Gzip or Zstandard if it begins so, else plain.
    Detect,
}

/// Where a stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    /// To a file, from `offset` on.
    File { part: Part, offset: u64 },
    /// The disk in a tar archive, layer `layer` of a container image.
    Tar { layer: usize },
}

impl Target {
    /// The file in the image's directory, and the offset there.
    pub(crate) fn place(self) -> (String, u64) {
        match self {
            Self::File { part, offset } => (part.file_name(), offset),
            Self::Tar { layer } => (format!("layer-{layer}"), 0),
        }
    }
}

/// Why a manifest isn't an image that can be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// No format's manifest.
    #[error(
        "its manifest is of no known image format (artifact type {artifact_type:?}, configuration {config:?}): it may be an ordinary container image"
    )]
    Unknown {
        /// The manifest's artifact type.
        artifact_type: String,
        /// The media type of its configuration.
        config: String,
    },
    /// The configuration.
    #[error("its configuration can't be read")]
    Config(#[source] serde_json::Error),
    /// A layer without an annotation it needs, or with one that is no number or digest.
    #[error("its layer {layer} has no valid annotation {annotation}")]
    Annotation {
        /// The layer's digest.
        layer: Digest,
        /// The annotation's key.
        annotation: &'static str,
    },
    /// A layer that lies outside its disk, or upon another.
    #[error("its layer {layer} doesn't fit the disk: {why}")]
    Placement {
        /// The layer's digest.
        layer: Digest,
        /// What is wrong.
        why: &'static str,
    },
    /// A layer that is missing, or there twice.
    #[error("it has {count} layers of type {media_type}, where there must be {expected}")]
    Count {
        /// The media type.
        media_type: &'static str,
        /// How many there are.
        count: usize,
        /// How many there must be.
        expected: &'static str,
    },
    /// A layer of a type that isn't known: it may matter, so it isn't skipped.
    #[error("its layer {layer} has the unknown type {media_type:?}: a newer vmpod may read it")]
    Layer {
        /// The layer's digest.
        layer: Digest,
        /// Its media type.
        media_type: String,
    },
    /// A variant of a format that can't be read here.
    #[error("{0}")]
    Unsupported(&'static str),
    /// Something too large to be true.
    #[error("it says that {0}")]
    Bounds(&'static str),
}

/// Small documents that are layers.
pub(crate) type Documents = HashMap<Digest, Vec<u8>>;

/// The layers that must be read before there can be a plan, equal ones once.
pub(crate) fn documents(manifest: &Manifest) -> Result<BTreeSet<Digest>, FormatError> {
    let kinds = [tart::CONFIG, agoda::CONFIG, lume::LEGACY_CONFIG];
    let wanted = |layer: &&Descriptor| kinds.contains(&layer.media_type.as_str());
    let documents: BTreeSet<_> = manifest.layers.iter().filter(wanted).map(|layer| layer.digest).collect();
    if documents.len() > MOST_DOCUMENTS {
        return Err(FormatError::Bounds("it has more configurations than any image needs"));
    }
    Ok(documents)
}

/// Reads a manifest, its configuration and its documents.
pub(crate) fn plan(manifest: &Manifest, config: &[u8], documents: &Documents) -> Result<Plan, FormatError> {
    if manifest.layers.len() > MOST_LAYERS {
        return Err(FormatError::Bounds("it has more layers than any image needs"));
    }
    let plan =
        if manifest.artifact_type.as_deref() == Some(media::ARTIFACT) || manifest.config.media_type == media::CONFIG {
            native::plan(manifest, config)?
        } else if tart::is(manifest) {
            tart::plan(manifest, documents)?
        } else if agoda::is(manifest) {
            agoda::plan(manifest, documents)?
        } else if lume::is(manifest) {
            lume::plan(manifest, config, documents)?
        } else if containerdisk::is(manifest) {
            containerdisk::plan(manifest, config)?
        } else {
            return Err(FormatError::Unknown {
                artifact_type: manifest.artifact_type.clone().unwrap_or_default(),
                config: manifest.config.media_type.clone(),
            });
        };
    check_placement(&plan)?;
    Ok(plan)
}

/// The value of an annotation, if it is there and valid.
fn annotation<T: FromStr>(layer: &Descriptor, annotation: &'static str) -> Result<T, FormatError> {
    let value = layer.annotations.get(annotation).and_then(|value| value.parse().ok());
    value.ok_or(FormatError::Annotation { layer: layer.digest, annotation })
}

/// The only layer of a type.
fn only<'a>(manifest: &'a Manifest, media_type: &'static str) -> Result<&'a Descriptor, FormatError> {
    let layers: Vec<_> = manifest.layers.iter().filter(|layer| layer.media_type == media_type).collect();
    match layers.as_slice() {
        [layer] => Ok(layer),
        layers => Err(FormatError::Count { media_type, count: layers.len(), expected: "one" }),
    }
}

/// A layer that is a file as it is.
fn plain_file(layer: &Descriptor, part: Part) -> Layer {
    Layer {
        blobs: vec![blob(layer)],
        encoding: Encoding::Plain,
        raw_size: Some(layer.size),
        raw_digest: Some(layer.digest),
        target: Target::File { part, offset: 0 },
    }
}

fn blob(layer: &Descriptor) -> Blob {
    Blob { digest: layer.digest, size: layer.size }
}

fn document<'a, T: Deserialize<'a>>(layer: &Descriptor, documents: &'a Documents) -> Result<T, FormatError> {
    let bytes = documents.get(&layer.digest).map_or(&[][..], Vec::as_slice);
    serde_json::from_slice(bytes).map_err(FormatError::Config)
}

/// Refuses windows that overlap or leave their file.
fn check_placement(plan: &Plan) -> Result<(), FormatError> {
    let mut windows = Vec::new();
    for layer in &plan.layers {
        let Target::File { part, offset } = layer.target else { continue };
        let (Some(size), Some(blob)) = (layer.raw_size, layer.blobs.first()) else { continue };
        let place = |why| FormatError::Placement { layer: blob.digest, why };
        let Some(&(_, file_size)) = plan.files.iter().find(|(file, _)| *file == part) else {
            return Err(place("there is no such disk"));
        };
        match offset.checked_add(size) {
            Some(end) if end <= file_size.unwrap_or(LARGEST_DISK) => windows.push((part, offset, end, blob.digest)),
            _ => return Err(place("it reaches past the end")),
        }
    }
    windows.sort_unstable();
    for pair in windows.windows(2) {
        if pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2 {
            return Err(FormatError::Placement { layer: pair[1].3, why: "it overlaps another layer" });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_documents_are_read_and_each_once() {
        let layer = |number: usize| Descriptor::new(tart::CONFIG, Digest::of(&number.to_le_bytes()), 1);
        let config = Descriptor::new(media::CONFIG, Digest::of(b"config"), 1);
        let manifest = |layers: Vec<Descriptor>| {
            let value = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
            serde_json::from_value::<Manifest>(value).unwrap()
        };
        let many = (0..100).map(|number| layer(number % MOST_DOCUMENTS)).collect();
        assert_eq!(documents(&manifest(many)).unwrap().len(), MOST_DOCUMENTS);
        let error = documents(&manifest((0..=MOST_DOCUMENTS).map(layer).collect())).unwrap_err();
        assert!(matches!(error, FormatError::Bounds(_)), "{error}");
    }
}
