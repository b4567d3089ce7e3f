//! Key pairs for guests.

use std::io;
use std::path::PathBuf;

use russh::keys::ssh_key::LineEnding;
use russh::keys::{Algorithm, PrivateKey};

use crate::directory::{MachineDir, write_whole};

/// The private key's file in a machine's directory.
pub(crate) const FILE: &str = "id_ed25519";

/// A key of somebody else's.
pub(crate) const GIVEN: &str = "login_key";

/// The public half of a private key, if that can be used: without a passphrase, in OpenSSH's format.
pub(crate) fn check(pem: &str) -> io::Result<String> {
    let key = PrivateKey::from_openssh(pem).map_err(io::Error::other)?;
    if key.is_encrypted() {
        return Err(io::Error::other("it is encrypted: give one without a passphrase"));
    }
    key.public_key().to_openssh().map_err(io::Error::other)
}

/// A machine's key pair for its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshKey {
    /// The private key's file, in OpenSSH's format, mode 0600.
    pub path: PathBuf,
    /// The public key in OpenSSH's one-line form.
    pub public: String,
}

/// The machine's key pair; a new one when it has none yet.
pub(crate) fn ensure(dir: &MachineDir) -> io::Result<SshKey> {
    let path = dir.file(FILE);
    let key = match std::fs::read(&path) {
        Ok(pem) => PrivateKey::from_openssh(pem).map_err(io::Error::other)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).map_err(io::Error::other)?;
            key.set_comment(format!("vmpod {}", dir.id()));
            let pem = key.to_openssh(LineEnding::LF).map_err(io::Error::other)?;
            write_whole(&path, pem.as_bytes())?;
            key
        }
        Err(error) => return Err(error),
    };
    let public = key.public_key().to_openssh().map_err(io::Error::other)?;
    Ok(SshKey { path, public })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::id::MachineId;

    #[test]
    fn a_key_is_made_once_and_private() {
        let root = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(root.path(), &MachineId::parse("a").unwrap());
        dir.make().unwrap();
        let first = ensure(&dir).unwrap();
        assert_eq!(ensure(&dir).unwrap(), first);
        assert!(first.public.starts_with("ssh-ed25519 ") && first.public.ends_with(" vmpod a"), "{}", first.public);
        assert_eq!(std::fs::metadata(&first.path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&first.path).unwrap();
        assert!(text.starts_with("-----BEGIN OPENSSH PRIVATE KEY-----\n"));
        let other = MachineDir::new(root.path(), &MachineId::parse("b").unwrap());
        other.make().unwrap();
        assert_ne!(ensure(&other).unwrap().public, first.public);
    }

    #[test]
    fn a_key_that_can_not_be_used_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(root.path(), &MachineId::parse("a").unwrap());
        dir.make().unwrap();
        let own = ensure(&dir).unwrap();
        let pem = std::fs::read_to_string(own.path).unwrap();
        assert_eq!(check(&pem).unwrap(), own.public);
        assert!(check("rubbish").is_err());
        let key = PrivateKey::from_openssh(&pem).unwrap().encrypt(&mut rand::rng(), "secret").unwrap();
        let locked = key.to_openssh(LineEnding::LF).unwrap();
        assert!(check(&locked).unwrap_err().to_string().contains("passphrase"));
    }

    #[test]
    fn a_damaged_key_is_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(root.path(), &MachineId::parse("a").unwrap());
        dir.make().unwrap();
        std::fs::write(dir.file(FILE), "rubbish").unwrap();
        assert!(ensure(&dir).is_err());
        assert_eq!(std::fs::read_to_string(dir.file(FILE)).unwrap(), "rubbish");
    }
}
