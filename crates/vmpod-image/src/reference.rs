//! Names of images.
//!
//! `host[:port]/repository[:tag][@digest]` names an image in a registry. A name whose first component has no dot and no
//! colon and isn't `localhost` is *local*: it lives in the store and is never looked for in any registry, so a typing
//! mistake never turns into a download from a public registry.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::{Digest, DigestError};

/// The longest repository path that registries accept.
const LONGEST_REPOSITORY: usize = 255;
/// The longest tag that registries accept.
const LONGEST_TAG: usize = 128;

/// The name of an image, normalised: without a digest it always has a tag (`latest` unless given).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: Option<String>,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a string is not the name of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing there.
    #[error("the image name is empty")]
    Empty,
    /// A URL where a name was expected.
    #[error("image name {name:?} has a scheme: write HOST/REPOSITORY:TAG without {scheme:?}")]
    Scheme {
        /// The name as given.
        name: String,
        /// The scheme found.
        scheme: String,
    },
    /// The registry's host or port.
    #[error("image name {name:?}: {host:?} is not a host name, an address or HOST:PORT")]
    Registry {
        /// The name as given.
        name: String,
        /// The part that should be a host.
        host: String,
    },
    /// A registry with nothing after it.
    #[error("image name {0:?} names a registry but no repository in it")]
    NoRepository(String),
    /// A component of the repository path.
    #[error(
        "image name {name:?}: {component:?} must be lower-case letters and digits, with single '.', '_', '__' or '-' between them"
    )]
    Repository {
        /// The name as given.
        name: String,
        /// The component that doesn't fit.
        component: String,
    },
    /// A repository path beyond 255 bytes.
    #[error("image name {0:?} is longer than {LONGEST_REPOSITORY} characters")]
    TooLong(String),
    /// The tag.
    #[error(
        "image name {name:?}: tag {tag:?} must be 1 to {LONGEST_TAG} letters, digits, '_', '.' or '-', not starting with '.' or '-'"
    )]
    Tag {
        /// The name as given.
        name: String,
        /// The tag that doesn't fit.
        tag: String,
    },
    /// The digest.
    #[error("image name {name:?} has a bad digest")]
    Digest {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        source: DigestError,
    },
}

impl Reference {
    /// Reads a name.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(ReferenceError::Scheme { name: text.to_owned(), scheme: format!("{scheme}://") });
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let digest =
                    digest.parse().map_err(|source| ReferenceError::Digest { name: text.to_owned(), source })?;
                (rest, Some(digest))
            }
        };
        let (registry, rest) = match rest.split_once('/') {
            Some((first, rest)) if is_registry(first) => (Some(registry_host(text, first)?), rest),
            _ => (None, rest),
        };
        let (repository, tag) = match rest.rsplit_once(':') {
            Some((repository, tag)) if !tag.contains('/') => (repository, Some(tag)),
            _ => (rest, None),
        };
        if repository.is_empty() {
            return Err(match registry {
                Some(_) => ReferenceError::NoRepository(text.to_owned()),
                None => ReferenceError::Empty,
            });
        }
        if repository.len() > LONGEST_REPOSITORY {
            return Err(ReferenceError::TooLong(text.to_owned()));
        }
        if let Some(component) = repository.split('/').find(|component| !is_component(component)) {
            return Err(ReferenceError::Repository { name: text.to_owned(), component: component.to_owned() });
        }
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(ReferenceError::Tag { name: text.to_owned(), tag: tag.to_owned() });
        }
        let tag = match (tag, digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some("latest".to_owned()),
        };
        Ok(Self { registry, repository: repository.to_owned(), tag, digest })
    }

    /// Whether this is a name of the local store that no registry is asked for.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.registry.is_none()
    }

    /// `host[:port]` of the registry, lower-case; none for a local name.
    #[must_use]
    pub fn registry(&self) -> Option<&str> {
        self.registry.as_deref()
    }

    /// The repository's path in its registry, or the local name.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, `latest` when neither tag nor digest was given.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, which wins over the tag when both are given.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same repository at exactly `digest`.
    #[must_use]
    pub fn at(&self, digest: Digest) -> Self {
        Self { registry: self.registry.clone(), repository: self.repository.clone(), tag: None, digest: Some(digest) }
    }

    /// What is asked of a registry's `manifests/` endpoint: the digest, else the tag.
    #[must_use]
    pub fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

fn is_registry(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':'])
}

fn registry_host(name: &str, text: &str) -> Result<String, ReferenceError> {
    let bad = || ReferenceError::Registry { name: name.to_owned(), host: text.to_owned() };
    let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
        let (address, port) = bracketed.split_once(']').ok_or_else(bad)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
        (&text[..address.len() + 2], if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(bad)?) })
    } else {
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        };
        let label = |label: &str| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        if !host.split('.').all(label) {
            return Err(bad());
        }
        (host, port)
    };
    let host = host.to_ascii_lowercase();
    match port {
        None => Ok(host),
        Some(port) => match port.parse::<u16>() {
            Ok(number) if number > 0 && port.bytes().all(|byte| byte.is_ascii_digit()) => {
                Ok(format!("{host}:{number}"))
            }
            _ => Err(bad()),
        },
    }
}

fn is_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    bytes
        .split(|&byte| alphanumeric(byte))
        .all(|separator| matches!(separator, [] | b"." | b"_" | b"__") || separator.iter().all(|&byte| byte == b'-'))
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= LONGEST_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(registry) = &self.registry {
            write!(f, "{registry}/")?;
        }
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text)
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(text: &str) -> String {
        match Reference::parse(text) {
            Ok(reference) => reference.to_string(),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn names_are_normalised() {
        assert_eq!(shown("tiny"), "tiny:latest");
        assert_eq!(shown("team/tiny:1"), "team/tiny:1");
        assert_eq!(
            shown("Registry.Example.com:443/ci/Ubuntu".to_lowercase().as_str()),
            "registry.example.com:443/ci/ubuntu:latest"
        );
        assert_eq!(shown("REGISTRY.example.com/ci/ubuntu:24.04"), "registry.example.com/ci/ubuntu:24.04");
        assert_eq!(shown("localhost/a"), "localhost/a:latest");
        assert_eq!(shown("[::1]:5000/a:b"), "[::1]:5000/a:b");
        let digest = Digest::of(b"");
        assert_eq!(shown(&format!("h.example/a@{digest}")), format!("h.example/a@{digest}"));
        assert_eq!(shown(&format!("h.example/a:t@{digest}")), format!("h.example/a:t@{digest}"));
    }

    #[test]
    fn only_a_name_with_a_host_leaves_the_store() {
        for (name, local) in [
            ("tiny", true),
            ("a/b/c:1", true),
            ("tiny:5", true),
            ("localhost/a", false),
            ("h:1/a", false),
            ("a.b/c", false),
        ] {
            assert_eq!(Reference::parse(name).unwrap().is_local(), local, "{name}");
        }
    }

    #[test]
    fn bad_names_say_what_is_wrong() {
        insta::assert_snapshot!(
            [
                "",
                "https://h.example/a",
                "h.example/",
                "h.example:99999/a",
                "h_x.example/a",
                "[::zz]:1/a",
                "Tiny",
                "a//b",
                "a/../b",
                "-a",
                "a:",
                "a:.x",
                "a@sha256:12",
                "a@md5:12",
                "a b",
                ":x",
            ]
            .map(|name| format!("{name:?} → {}", shown(name)))
            .join("\n")
        );
    }

    proptest! {
        #[test]
        fn printing_and_reading_is_the_identity(
            host in proptest::option::of("([a-z][a-z0-9]{0,5}\\.[a-z]{2,4}|localhost)(:[1-9][0-9]{0,3})?"),
            path in "[a-z0-9]{1,6}([._-][a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,6}){0,3}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            digest in proptest::option::of(any::<[u8; 4]>()),
        ) {
            let mut text = String::new();
            if let Some(host) = &host { text = format!("{host}/"); }
            // A local name whose first component has a dot reads as a host, so give it none.
            let path = if host.is_none() { path.replace('.', "-") } else { path };
            text.push_str(&path);
            if let Some(tag) = &tag { text = format!("{text}:{tag}"); }
            if let Some(digest) = digest { text = format!("{text}@{}", Digest::of(&digest)); }
            let reference = Reference::parse(&text).unwrap();
            prop_assert_eq!(reference.is_local(), host.is_none());
            prop_assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
        }

        #[test]
        fn reading_anything_never_panics_and_never_loses_a_path(text in "\\PC{0,40}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert!(!reference.repository().split('/').any(|part| part == ".." || part.is_empty()));
            }
        }
    }
}
