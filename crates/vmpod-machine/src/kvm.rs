//! Whether KVM truly works on this host.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What a probe of KVM found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kvm {
    /// A small guest ran under it.
    Works,
    /// There is no `/dev/kvm`.
    Absent,
    /// `/dev/kvm` is there and may not be opened by us.
    Denied(String),
    /// A small guest was started and did nothing within the limit.
    Hangs,
    /// The hypervisor refused, with these words.
    Fails(String),
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("KVM works"),
            Self::Absent => f.write_str("this host has no /dev/kvm"),
            Self::Denied(why) => write!(f, "/dev/kvm can't be opened: {why}"),
            Self::Hangs => f.write_str("/dev/kvm is there, and a guest started with it hangs"),
            Self::Fails(why) => write!(f, "a guest started with KVM fails: {why}"),
        }
    }
}

/// Finds out by running a small guest, at most once per boot of the host: the answer is kept in the file `cache`.
pub async fn probe(_qemu: &crate::qemu::Qemu, _cache: &Path) -> Kvm {
    Kvm::Fails("not built yet".to_owned())
}
