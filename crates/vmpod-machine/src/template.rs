//! Templates: machines that were booted once and are gone on from many times.
//!
//! A template is a directory named after its [`TemplateKey`]:
//!
//! | file | what |
//! |---|---|
//! | `template.json` | the key, the files with their sizes and digests, when it was made |
//! | `ram` | the guest's memory; copies map it privately and share what they don't change |
//! | `state` | what QEMU knows of the devices, without the memory |
//! | `seed.iso` | the seed disk that its guest saw, with nobody's data |
//! | `disk-N.…` | what its guest wrote to the disks; copies put overlays on top |
//!
//! It appears whole, by a rename, and is checked by digest before the first use in an agent's life and again whenever a file's
//! size, time or inode changed. What is being made and was cut short is removed at the next start.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::directory;
use crate::id::MachineId;
use crate::machines::{MachineError, Machines};
use crate::seed;
use crate::spec::{Accel, Arch, Cpus, DiskFormat, Memory, Seed, SeedForm, Snapshot, Spec};

/// The memory's file, in a template and in the machine that makes one.
pub(crate) const MEMORY: &str = "ram";
/// The devices' state.
pub(crate) const STATE: &str = "state";
const DESCRIPTION: &str = "template.json";
/// Directories of templates that aren't whole.
const NEW: &str = ".new-";
/// Directories that are being removed.
const OLD: &str = ".old-";
/// The form of templates; another one is another key.
const FORM: u32 = 1;

/// Everything that two machines must have in common so that one can go on from the other's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateKey {
    /// The image, by digest.
    pub image: String,
    /// Who may use it, when not everybody: a template of an image that needs a pull secret belongs to one namespace.
    #[serde(default)]
    pub scope: String,
    /// Virtual processors.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Memory,
    /// Processor architecture.
    pub arch: Arch,
    /// What executes it.
    pub accel: Accel,
    /// The hypervisor's version and the processor ([`crate::Hypervisor::snapshots`]).
    pub hypervisor: String,
    /// Sizes of the disks in bytes.
    pub disks: Vec<u64>,
    /// Number of interfaces.
    pub networks: usize,
}

/// A template's name: some hexadecimal digits of its key's digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TemplateId(String);

impl TemplateId {
    /// The name that a text gives, if it is one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.len() == 24 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        hex.then(|| Self(text.to_owned()))
    }

    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for TemplateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl TemplateKey {
    /// The template's name.
    #[must_use]
    pub fn id(&self) -> TemplateId {
        // A key is plain data, which JSON can always hold; a failure would only give another name.
        let text = serde_json::to_vec(&(FORM, self)).unwrap_or_default();
        let mut name = hex(&Sha256::digest(text));
        name.truncate(24);
        TemplateId(name)
    }

    /// The machine that makes the template.
    pub fn machine(&self) -> Result<MachineId, TemplateError> {
        let id = self.id();
        MachineId::parse(format!("template-{id}"))
            .map_err(|error| TemplateError::Unfit { id, why: format!("it can't name a machine: {error}") })
    }
}

/// A template that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its name.
    pub id: TemplateId,
    /// Its directory, for [`Snapshot::From`].
    pub path: PathBuf,
    /// What it was made from.
    pub key: TemplateKey,
    /// Its disks, in order: what copies put their overlays on.
    pub disks: Vec<TemplateDisk>,
    /// When it was made.
    pub made: Timestamp,
    /// Bytes that it takes on the disk, holes left out.
    pub bytes: u64,
    /// When it was last used, as far as that is known.
    pub used: Timestamp,
}

/// A disk of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateDisk {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
}

/// Why a template can't be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// This machine can't become one.
    #[error("no template {id} can be made: {why}")]
    Unfit {
        /// Which one.
        id: TemplateId,
        /// Why.
        why: String,
    },
    /// Its files aren't what was written.
    #[error("template {id} is damaged and was set aside: {why}")]
    Damaged {
        /// Which one.
        id: TemplateId,
        /// What is wrong.
        why: String,
    },
    /// The machine that was to become it failed.
    #[error("the machine that makes template {id} failed")]
    Machine {
        /// Which one.
        id: TemplateId,
        /// Why.
        source: MachineError,
    },
    /// A file.
    #[error("can't {action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::Io { action, path, source }
}

#[derive(Serialize, Deserialize)]
struct Description {
    form: u32,
    key: TemplateKey,
    made: Timestamp,
    files: Vec<Described>,
    disks: Vec<(String, DiskFormat)>,
}

#[derive(Serialize, Deserialize)]
struct Described {
    name: String,
    size: u64,
    sha256: String,
}

/// What says that a file is still the one whose digest was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    size: u64,
    inode: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self { size: metadata.size(), inode: metadata.ino(), changed: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

/// The templates of one directory. One agent has it to itself.
#[derive(Clone, Debug)]
pub struct Templates {
    root: PathBuf,
    machines: Machines,
    checked: Arc<Mutex<HashMap<TemplateId, Vec<Stamp>>>>,
}

impl Templates {
    /// Opens a directory, making it when there is none, and removes what an agent that died left half made.
    pub fn open(root: impl Into<PathBuf>, machines: Machines) -> Result<Self, TemplateError> {
        let root = root.into();
        directory::make_private_dir(&root).map_err(io_error("make the directory", &root))?;
        for entry in fs::read_dir(&root).map_err(io_error("read the directory", &root))? {
            let entry = entry.map_err(io_error("read the directory", &root))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(NEW) || name.starts_with(OLD) {
                fs::remove_dir_all(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        Ok(Self { root, machines, checked: Arc::default() })
    }

    /// The template for a key, checked; none when there is none. Blocks: the first call for a template reads all of it.
    ///
    /// One that is damaged is an error once, and set aside: the next call finds none.
    pub fn find(&self, key: &TemplateKey) -> Result<Option<Template>, TemplateError> {
        let id = key.id();
        let Some((template, description)) = self.read(&id)? else { return Ok(None) };
        let damaged = |why: String| {
            self.remove(&id)?;
            Err(TemplateError::Damaged { id: id.clone(), why })
        };
        if template.key != *key || description.form != FORM {
            return damaged("it was made for another machine".to_owned());
        }
        let mut stamps = Vec::new();
        for file in &description.files {
            let path = template.path.join(&file.name);
            match Stamp::of(&path) {
                Ok(stamp) if stamp.size == file.size => stamps.push(stamp),
                Ok(stamp) => {
                    return damaged(format!("{} has {} bytes instead of {}", file.name, stamp.size, file.size));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return damaged(format!("{} is missing", file.name));
                }
                Err(error) => return Err(io_error("look at", &path)(error)),
            }
        }
        if self.checked().get(&id) != Some(&stamps) {
            for file in &description.files {
                let path = template.path.join(&file.name);
                if digest(&path).map_err(io_error("read", &path))? != file.sha256 {
                    return damaged(format!("the content of {} has changed", file.name));
                }
            }
            self.checked().insert(id.clone(), stamps);
        }
        // For whoever chooses what to remove; a time that can't be set costs a template its place, nothing else.
        let now = std::time::SystemTime::from(Timestamp::now());
        File::open(template.path.join(DESCRIPTION)).and_then(|file| file.set_modified(now)).ok();
        Ok(Some(template))
    }

    /// Every template that is there, by name, unchecked.
    pub fn list(&self) -> Result<Vec<Template>, TemplateError> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io_error("read the directory", &self.root))? {
            let entry = entry.map_err(io_error("read the directory", &self.root))?;
            if let Some(id) = entry.file_name().to_str().and_then(TemplateId::parse)
                && let Some((template, _)) = self.read(&id)?
            {
                all.push(template);
            }
        }
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(all)
    }

    fn read(&self, id: &TemplateId) -> Result<Option<(Template, Description)>, TemplateError> {
        let path = self.root.join(id.as_str());
        let file = path.join(DESCRIPTION);
        let description: Description = match directory::read_json(&file) {
            Ok(Some(description)) => description,
            Ok(None) => return Ok(None),
            Err(error)
                if error.kind() == io::ErrorKind::InvalidData || error.kind() == io::ErrorKind::UnexpectedEof =>
            {
                self.remove(id)?;
                return Err(TemplateError::Damaged { id: id.clone(), why: format!("{DESCRIPTION}: {error}") });
            }
            Err(error) => return Err(io_error("read", &file)(error)),
        };
        let disks = description
            .disks
            .iter()
            .map(|(name, format)| TemplateDisk { path: path.join(name), format: *format })
            .collect();
        let mut bytes = 0;
        for file in &description.files {
            // 512-byte blocks, whatever the file system's own: stat(2).
            bytes += fs::metadata(path.join(&file.name)).map_or(0, |metadata| metadata.blocks() * 512);
        }
        let used = fs::metadata(&file)
            .and_then(|metadata| metadata.modified())
            .ok()
            .and_then(|time| Timestamp::try_from(time).ok())
            .unwrap_or(description.made);
        let (key, made) = (description.key.clone(), description.made);
        Ok(Some((Template { id: id.clone(), path, key, disks, made, bytes, used }, description)))
    }

    /// Removes a template. Machines that came from it must be gone; see [`Templates::used_by`].
    pub fn remove(&self, id: &TemplateId) -> Result<(), TemplateError> {
        self.checked().remove(id);
        let (from, to) = (self.root.join(id.as_str()), self.root.join(format!("{OLD}{id}")));
        match fs::rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("remove", &from)(error)),
            Ok(()) => fs::remove_dir_all(&to).map_err(io_error("remove", &to)),
        }
    }

    /// The known machines that came from a template and aren't over.
    #[must_use]
    pub fn used_by(&self, template: &Template) -> Vec<MachineId> {
        let machines = self.machines.list().into_iter();
        machines
            .filter(|machine| machine.spec().template() == Some(&template.path) && !machine.state().borrow().is_final())
            .map(|machine| machine.id().clone())
            .collect()
    }

    /// Boots a machine once, waits until its guest is ready and rests, and keeps its memory.
    ///
    /// `spec` describes a machine named [`TemplateKey::machine`], whose disks are in that machine's directory already. Its
    /// seed is replaced by one without anybody's data. Whatever happens, the machine is gone afterwards.
    pub async fn make(&self, key: &TemplateKey, mut spec: Spec) -> Result<Template, TemplateError> {
        let (id, machine_id) = (key.id(), key.machine()?);
        let unfit = |why: &str| TemplateError::Unfit { id: id.clone(), why: why.to_owned() };
        if spec.id != machine_id {
            return Err(unfit("its machine has another name"));
        }
        if spec.access.ready_marker.is_none() {
            return Err(unfit("the image names no line that its guest prints when it is ready"));
        }
        if spec.seed.is_some() {
            spec.seed = Some(neutral_seed());
        }
        spec.snapshot = Some(Snapshot::Make);
        let made = self.boot_and_keep(key, &id, spec).await;
        // Also when it worked: what was wanted of it has moved away.
        let removed = self.machines.remove(&machine_id, true).await;
        let template = made?;
        removed.map_err(|source| TemplateError::Machine { id, source })?;
        Ok(template)
    }

    async fn boot_and_keep(&self, key: &TemplateKey, id: &TemplateId, spec: Spec) -> Result<Template, TemplateError> {
        let failed = |source| TemplateError::Machine { id: id.clone(), source };
        // One that an earlier try left.
        let machine = self.machines.create(spec.clone()).await.map_err(failed)?;
        machine.start().await.map_err(failed)?;
        self.machines.hit("template: its machine runs").await;
        machine.snapshot().await.map_err(failed)?;
        self.machines.hit("template: memory saved").await;
        let (templates, key, id, dir) = (self.clone(), key.clone(), id.clone(), machine.dir().path().to_owned());
        let kept = tokio::task::spawn_blocking({
            let id = id.clone();
            move || templates.keep(&key, &id, &spec, &dir)
        });
        let kept = kept.await.map_err(|error| TemplateError::Unfit { id, why: error.to_string() })?;
        self.machines.hit("template: in place").await;
        kept
    }

    /// Moves a stopped machine's files into a template.
    fn keep(&self, key: &TemplateKey, id: &TemplateId, spec: &Spec, from: &Path) -> Result<Template, TemplateError> {
        let new = self.root.join(format!("{NEW}{id}"));
        if new.exists() {
            fs::remove_dir_all(&new).map_err(io_error("remove", &new))?;
        }
        directory::make_private_dir(&new).map_err(io_error("make the directory", &new))?;
        let mut files = vec![(from.join(MEMORY), MEMORY.to_owned()), (from.join(STATE), STATE.to_owned())];
        if spec.seed.is_some() {
            files.push((from.join(seed::FILE), seed::FILE.to_owned()));
        }
        let mut disks = Vec::new();
        for (index, disk) in spec.disks.iter().enumerate() {
            let extension = match disk.format {
                DiskFormat::Raw => "raw",
                DiskFormat::Qcow2 => "qcow2",
            };
            let name = format!("disk-{index}.{extension}");
            disks.push((name.clone(), disk.format));
            files.push((disk.path.clone(), name));
        }
        let mut described = Vec::new();
        for (path, name) in files {
            let to = new.join(&name);
            fs::rename(&path, &to).map_err(io_error("keep", &path))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).map_err(io_error("protect", &to))?;
            let sha256 = digest(&to).map_err(io_error("read", &to))?;
            let file = File::open(&to).map_err(io_error("open", &to))?;
            file.sync_all().map_err(io_error("make durable", &to))?;
            let size = file.metadata().map_err(io_error("look at", &to))?.len();
            described.push(Described { name, size, sha256 });
        }
        let made = Timestamp::now();
        let description = Description { form: FORM, key: key.clone(), made, files: described, disks };
        let file = new.join(DESCRIPTION);
        directory::write_json(&file, &description).map_err(io_error("write", &file))?;
        self.remove(id)?;
        let path = self.root.join(id.as_str());
        fs::rename(&new, &path).map_err(io_error("put in place", &path))?;
        File::open(&self.root).and_then(|dir| dir.sync_all()).map_err(io_error("make durable", &self.root))?;
        let gone = || TemplateError::Damaged { id: id.clone(), why: "it vanished".to_owned() };
        // The digests were taken a moment ago.
        let stamps = description.files.iter().map(|file| Stamp::of(&path.join(&file.name))).collect::<Result<_, _>>();
        self.checked().insert(id.clone(), stamps.map_err(io_error("look at", &path))?);
        Ok(self.read(id)?.ok_or_else(gone)?.0)
    }

    fn checked(&self) -> std::sync::MutexGuard<'_, HashMap<TemplateId, Vec<Stamp>>> {
        self.checked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which templates to remove so that what is left fits `budget` bytes: the ones unused for longest, and never one in use.
#[must_use]
pub fn surplus(all: &[Template], budget: u64, in_use: impl Fn(&Template) -> bool) -> Vec<&Template> {
    let mut left: u64 = all.iter().map(|template| template.bytes).sum();
    let mut free: Vec<&Template> = all.iter().filter(|template| !in_use(template)).collect();
    free.sort_by_key(|template| template.used);
    free.into_iter()
        .take_while(|template| {
            let over = left > budget;
            left = left.saturating_sub(template.bytes);
            over
        })
        .collect()
}

/// What a template's own guest is told at its boot: it is nobody yet.
fn neutral_seed() -> Seed {
    Seed {
        form: SeedForm::Nocloud,
        instance_id: "template".to_owned(),
        hostname: "template".to_owned(),
        authorized_keys: Vec::new(),
        user_data: None,
        vendor_data: None,
        // Its interface leads nowhere: nothing is to wait for an address.
        network_config: Some(
            "{\"version\": 2, \"ethernets\": {\"nic0\": {\"match\": {\"name\": \"e*\"}, \"addresses\": [\"10.0.2.15/24\"]}}}\n"
                .to_owned(),
        ),
    }
}

/// The SHA-256 of a file, in hexadecimal digits.
fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            count => hasher.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String can't fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}

#[cfg(feature = "fake")]
#[cfg(test)]
mod tests;
