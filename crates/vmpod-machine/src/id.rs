//! The name of a machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A machine's name: 1 to 63 of `a-z`, `0-9` and `-`, neither first nor last a `-`.
///
/// It names a directory, a QEMU guest and a hostname, so nothing else may be in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineId(String);

/// Why a text is no [`MachineId`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{text}\" can't name a machine: use 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends")]
pub struct InvalidMachineId {
    text: String,
}

impl MachineId {
    /// Parses a name.
    pub fn parse(text: impl Into<String>) -> Result<Self, InvalidMachineId> {
        let text = text.into();
        let ok = (1..=63).contains(&text.len())
            && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            && !text.starts_with('-')
            && !text.ends_with('-');
        if ok { Ok(Self(text)) } else { Err(InvalidMachineId { text }) }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The UUID that the hypervisor shows for this machine; always the same for the same name.
    #[must_use]
    pub fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, format!("vmpod:machine:{}", self.0).as_bytes())
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for MachineId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for MachineId {
    type Err = InvalidMachineId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl TryFrom<String> for MachineId {
    type Error = InvalidMachineId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(text)
    }
}

impl From<MachineId> for String {
    fn from(id: MachineId) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_could_escape_a_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "-a", "a-", "A", "a b", "a.b", "ä", &"a".repeat(64)] {
            assert!(MachineId::parse(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "0", "a-b", "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f8a-0", &"a".repeat(63)] {
            assert_eq!(MachineId::parse(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn json_goes_through_the_parser() {
        assert_eq!(serde_json::from_str::<MachineId>("\"a-1\"").unwrap().to_string(), "a-1");
        assert!(serde_json::from_str::<MachineId>("\"../a\"").is_err());
    }

    proptest! {
        #[test]
        fn whatever_parses_is_one_plain_path_component(text in "\\PC{0,70}") {
            if let Ok(id) = MachineId::parse(text.clone()) {
                let path = std::path::Path::new(id.as_str());
                prop_assert_eq!(path.components().count(), 1);
                prop_assert!(matches!(path.components().next(), Some(std::path::Component::Normal(_))));
                prop_assert_eq!(id.as_str(), text);
            }
        }
    }
}
