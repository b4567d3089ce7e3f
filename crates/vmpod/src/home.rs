//! The home: the one directory that holds all of vmpod's state, and the lock on it.
//!
//! | path | what | who writes |
//! |---|---|---|
//! | `lock` | held by the one `vmpod up` or `vmpod node`; says who | that process |
//! | `kubeconfig` | the administrator's, mode 0600 | `vmpod up` |
//! | `api/` | the embedded API: store and certificates | `vmpod up` |
//! | `images/` | the image store | everyone |
//! | `machines/` | a directory per machine | the node agent |
//! | `kvm.json` | whether KVM was seen to work since this host booted | `vmpod up`, `node`, `run`, `doctor` |
//! | `node/` | the node agent's: pods, logs, certificates | the node agent |
//! | `run/ID/` | a home of its own for a `vmpod run` without `vmpod up`; `images/` and `kvm.json` are shared | that `run` |

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::report::Remedy;

/// The state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Home {
    root: PathBuf,
    /// What a private home has in common with the one that it is in.
    common: PathBuf,
}

impl Home {
    /// The home that was named, or the default one.
    pub(crate) fn resolve(named: Option<&Path>) -> Result<Self> {
        let root = match named {
            Some(dir) if dir.as_os_str().is_empty() => {
                return Err(Remedy::new("the home is an empty path", "set --home or VMPOD_HOME to a directory").into());
            }
            // Machines outlive this process and its working directory, so the path must hold anywhere.
            Some(dir) => std::path::absolute(dir).with_context(|| format!("can't make {} absolute", dir.display()))?,
            None => default_home(
                rustix::process::geteuid().is_root(),
                std::env::var_os("XDG_STATE_HOME").map(PathBuf::from),
                std::env::var_os("HOME").map(PathBuf::from),
            )?,
        };
        Ok(Self { common: root.clone(), root })
    }

    /// A fresh private home for one `vmpod run`, which shares this one's images and what is known of KVM.
    pub(crate) fn ephemeral(&self, id: &str) -> Self {
        self.at(self.runs().join(id))
    }

    /// An ephemeral home that exists already.
    fn at(&self, root: PathBuf) -> Self {
        Self { root, common: self.common.clone() }
    }

    /// Makes the directory, for this user only. One that others may enter is made private only if it is empty or a home.
    pub(crate) fn make(&self) -> Result<()> {
        if self.is_foreign().unwrap_or(false) {
            return Err(Remedy::new(
                format!("{} holds other things, and a home is for its user only", self.root.display()),
                "choose a new or empty directory with --home or VMPOD_HOME",
            )
            .into());
        }
        make_private(&self.root).map_err(|error| {
            anyhow::Error::new(error).context(Remedy::new(
                format!("can't make the home {}", self.root.display()),
                "choose a directory that you may write, with --home or VMPOD_HOME",
            ))
        })
    }

    /// Whether the directory is there, open to others, and holds something that isn't vmpod's.
    fn is_foreign(&self) -> std::io::Result<bool> {
        let others = std::fs::metadata(&self.root)?.permissions().mode() & 0o077;
        if others == 0 {
            return Ok(false);
        }
        let is_empty = std::fs::read_dir(&self.root)?.next().is_none();
        let is_locked = || {
            let text = std::fs::read_to_string(self.lock_path()).unwrap_or_default();
            serde_json::from_str::<Holder>(&text).is_ok()
        };
        let has_store = || ["images", "names", "pins"].iter().all(|part| self.root.join("images").join(part).is_dir());
        Ok(!is_empty && !is_locked() && !has_store())
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.root.join("kubeconfig")
    }

    pub(crate) fn api(&self) -> PathBuf {
        self.root.join("api")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.common.join("images")
    }

    pub(crate) fn machines(&self) -> PathBuf {
        self.root.join("machines")
    }

    pub(crate) fn node(&self) -> PathBuf {
        self.root.join("node")
    }

    /// Where the answer to "does KVM work here?" is kept.
    pub(crate) fn kvm(&self) -> PathBuf {
        self.common.join("kvm.json")
    }

    fn runs(&self) -> PathBuf {
        self.root.join("run")
    }

    fn lock_path(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Takes the home for this process, or says who has it.
    ///
    /// Looking at a lock takes it for an instant (see [`Home::holder`]), so one that is busy is tried
    /// for a moment longer.
    pub(crate) async fn lock(&self, role: Role) -> Result<Lock> {
        self.make()?;
        let mut patience = 10_u8;
        loop {
            if let Some(lock) = Lock::try_take(&self.lock_path(), role)? {
                return Ok(lock);
            }
            match self.holder()? {
                Some(holder) if patience == 0 => bail!(self.taken(&holder)),
                _ if patience == 0 => bail!("the lock {} can't be had", self.lock_path().display()),
                _ => patience -= 1,
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Takes a home that exists already, unless another process has it at this moment.
    pub(crate) fn try_lock(&self, role: Role) -> Result<Option<Lock>> {
        Lock::try_take(&self.lock_path(), role)
    }

    fn taken(&self, holder: &Holder) -> Remedy {
        Remedy::new(
            format!(
                "the home {} is in use by `vmpod {}`, process {}",
                self.root.display(),
                holder.role.word(),
                holder.pid
            ),
            format!("stop that one first (kill {}), or choose another home with --home", holder.pid),
        )
    }

    /// The process that holds the home now, if one does.
    pub(crate) fn holder(&self) -> Result<Option<Holder>> {
        let path = self.lock_path();
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("can't open {}", path.display())),
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(None),
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => {}
            Err(error) => return Err(error).with_context(|| format!("can't look at the lock {}", path.display())),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(|| format!("can't read {}", path.display()))?;
        // A holder that has just taken it hasn't said who it is yet.
        Ok(Some(serde_json::from_str(&text).unwrap_or(Holder { pid: 0, role: Role::Up })))
    }

    /// The private homes of `vmpod run`s that are dead: whatever they left can be cleared away.
    pub(crate) fn dead_runs(&self) -> Result<Vec<Home>> {
        let entries = match std::fs::read_dir(self.runs()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("can't list {}", self.runs().display())),
        };
        let mut dead = Vec::new();
        for entry in entries {
            let home = self.at(entry.with_context(|| format!("can't list {}", self.runs().display()))?.path());
            // One that has no lock file yet is being made this moment.
            if home.lock_path().exists() && home.holder()?.is_none() {
                dead.push(home);
            }
        }
        Ok(dead)
    }

    /// Removes the whole directory.
    pub(crate) fn remove(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("can't remove {}", self.root.display()))
            }
            _ => Ok(()),
        }
    }
}

/// What the holder of a home does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Up,
    Node,
    Run,
}

impl Role {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Node => "node",
            Self::Run => "run",
        }
    }
}

/// Who holds a home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holder {
    /// Its process id.
    pub(crate) pid: u32,
    /// What it does.
    pub(crate) role: Role,
}

/// The home, held until this is dropped or the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    fn try_take(path: &Path, role: Role) -> Result<Option<Self>> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("can't open the lock {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("can't lock {}", path.display())),
        }
        let holder = Holder { pid: std::process::id(), role };
        let write = |file: &mut File| -> std::io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(serde_json::to_string(&holder)?.as_bytes())
        };
        write(&mut file).with_context(|| format!("can't write {}", path.display()))?;
        Ok(Some(Self { _file: file }))
    }
}

fn default_home(root: bool, xdg_state: Option<PathBuf>, user_home: Option<PathBuf>) -> Result<PathBuf> {
    if root {
        return Ok("/var/lib/vmpod".into());
    }
    if let Some(dir) = xdg_state.filter(|dir| dir.is_absolute()) {
        return Ok(dir.join("vmpod"));
    }
    match user_home.filter(|dir| dir.is_absolute()) {
        Some(dir) => Ok(dir.join(".local/state/vmpod")),
        None => Err(Remedy::new("there is no home directory to keep state in", "set --home or VMPOD_HOME").into()),
    }
}

/// Makes a directory and its parents, itself readable for its owner only.
fn make_private(dir: &Path) -> std::io::Result<()> {
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
        }
        other => other,
    }
}

/// Writes a file whole, readable for its owner only: it is the old one or the new one, never half.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    let dir = path.parent().with_context(|| format!("{} has no directory", path.display()))?;
    let write = || -> std::io::Result<()> {
        // The library makes it mode 0600.
        let mut file = tempfile::Builder::new().prefix(".vmpod-").tempfile_in(dir)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("can't write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_follows_xdg() {
        let path = |s: &str| Some(PathBuf::from(s));
        assert_eq!(default_home(true, path("/x"), path("/h")).unwrap(), PathBuf::from("/var/lib/vmpod"));
        assert_eq!(default_home(false, path("/x"), path("/h")).unwrap(), PathBuf::from("/x/vmpod"));
        assert_eq!(default_home(false, path("relative"), path("/h")).unwrap(), PathBuf::from("/h/.local/state/vmpod"));
        assert!(default_home(false, None, None).is_err());
    }

    #[tokio::test]
    async fn the_second_is_told_who_is_first() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(dir.path())).unwrap();
        assert_eq!(home.holder().unwrap(), None);
        let lock = home.lock(Role::Node).await.unwrap();
        let said = home.lock(Role::Up).await.unwrap_err().to_string();
        assert!(said.contains("`vmpod node`") && said.contains(&std::process::id().to_string()), "{said}");
        assert_eq!(home.holder().unwrap(), Some(Holder { pid: std::process::id(), role: Role::Node }));
        drop(lock);
        assert_eq!(home.holder().unwrap(), None);
        home.lock(Role::Up).await.unwrap();
    }

    #[tokio::test]
    async fn a_dead_run_is_found_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(dir.path())).unwrap();
        let live = home.ephemeral("live");
        let dead = home.ephemeral("dead");
        let _lock = live.lock(Role::Run).await.unwrap();
        drop(dead.lock(Role::Run).await.unwrap());
        assert_eq!(home.dead_runs().unwrap(), vec![dead.clone()]);
        assert_eq!(dead.images(), home.images());
        dead.remove().unwrap();
        assert_eq!(home.dead_runs().unwrap(), Vec::new());
    }

    #[tokio::test]
    async fn whoever_clears_a_dead_run_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(dir.path())).unwrap();
        let dead = home.ephemeral("dead");
        drop(dead.lock(Role::Run).await.unwrap());
        let lock = dead.try_lock(Role::Run).unwrap().unwrap();
        assert_eq!(home.dead_runs().unwrap(), Vec::new());
        assert!(dead.try_lock(Role::Run).unwrap().is_none());
        drop(lock);
        assert_eq!(home.dead_runs().unwrap(), vec![dead]);
    }

    #[tokio::test]
    async fn a_directory_of_others_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let home = Home::resolve(Some(dir.path())).unwrap();
        open(dir.path());
        drop(home.lock(Role::Up).await.unwrap());
        assert_eq!(mode(dir.path()), 0o700, "an empty one is taken");
        open(dir.path());
        home.make().unwrap();
        assert_eq!(mode(dir.path()), 0o700, "a home is taken again");
        std::fs::write(home.lock_path(), "something else").unwrap();
        open(dir.path());
        let error = home.make().unwrap_err().to_string();
        assert!(error.contains("holds other things"), "{error}");
        assert_eq!(mode(dir.path()), 0o755);
    }

    #[test]
    fn private_means_for_the_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(&dir.path().join("a/b"))).unwrap();
        home.make().unwrap();
        let file = home.kubeconfig();
        write_private(&file, "one").unwrap();
        write_private(&file, "two").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(home.root()), mode(&file)), (0o700, 0o600));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "two");
        assert_eq!(std::fs::read_dir(home.root()).unwrap().count(), 1, "a temporary file was left");
    }
}
