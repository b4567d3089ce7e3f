//! Key pairs for guests.

use std::io;
use std::path::PathBuf;

use crate::directory::MachineDir;

/// The private key's file in a machine's directory.
pub(crate) const FILE: &str = "id_ed25519";

/// A machine's key pair for its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshKey {
    /// The private key's file, in OpenSSH's format, mode 0600.
    pub path: PathBuf,
    /// The public key in OpenSSH's one-line form.
    pub public: String,
}

pub(crate) fn ensure(_dir: &MachineDir) -> io::Result<SshKey> {
    Err(io::Error::other("not built yet"))
}
