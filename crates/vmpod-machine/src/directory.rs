//! A machine's directory: everything about it, in files.
//!
//! | file | what | written by |
//! |---|---|---|
//! | `spec.json` | the [`Spec`](crate::Spec) | `create`, once |
//! | `lock` | held (flock) by whoever is or makes the machine's process | the agent, inherited by the process |
//! | `seed.iso` | `NoCloud` seed | `create` |
//! | `id_ed25519`, `id_ed25519.pub` | key pair for the guest | on request |
//! | `known_host` | the guest's host key | the first connection |
//! | `qmp.sock` | control socket | the process |
//! | `console.sock`, `console.log` | serial console | the process |
//! | `process.log` | what the process itself had to say | the process |
//! | `exit.json` | how it ended | the agent |
//!
//! Files are written whole: a temporary file, fsync, rename, fsync of the directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::id::MachineId;

/// The directory of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineDir {
    id: MachineId,
    path: PathBuf,
}

impl MachineDir {
    /// The directory of `id` under `root`; nothing is touched.
    #[must_use]
    pub fn new(root: &Path, id: &MachineId) -> Self {
        Self { id: id.clone(), path: root.join(id.as_str()) }
    }

    /// Whose it is.
    #[must_use]
    pub fn id(&self) -> &MachineId {
        &self.id
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// `spec.json`.
    #[must_use]
    pub fn spec(&self) -> PathBuf {
        self.file("spec.json")
    }

    /// `exit.json`.
    #[must_use]
    pub fn exit(&self) -> PathBuf {
        self.file("exit.json")
    }

    /// `console.log`.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.file("console.log")
    }

    /// Makes the directory, for its owner only.
    pub(crate) fn make(&self) -> io::Result<()> {
        make_private_dir(&self.path)
    }
}

/// Makes a directory and its parents with mode 0700; one that exists is left as it is.
pub(crate) fn make_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file whole, with mode 0600, so that after a crash it is there entirely or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("a file needs a directory"))?;
    let name = path.file_name().ok_or_else(|| io::Error::other("a file needs a name"))?;
    let temporary = dir.join(format!(".{}.new", name.to_string_lossy()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temporary, path)?;
    File::open(dir)?.sync_all()
}

/// Writes a value as JSON.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    write_whole(path, &bytes)
}

/// Reads a value from JSON; `None` when there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_private_and_replaced_whole() {
        let root = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(root.path(), &MachineId::parse("a").unwrap());
        dir.make().unwrap();
        dir.make().unwrap();
        write_whole(&dir.spec(), b"a long first version").unwrap();
        write_whole(&dir.spec(), b"short").unwrap();
        assert_eq!(fs::read(dir.spec()).unwrap(), b"short");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir.spec()), mode(dir.path())), (0o600, 0o700));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file is left");
    }

    #[test]
    fn absent_is_not_the_same_as_damaged() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.json");
        assert_eq!(read_json::<u32>(&path).unwrap(), None);
        fs::write(&path, "{").unwrap();
        assert!(read_json::<u32>(&path).is_err());
    }
}
