//! The store's file: one redb database with the objects and the revision.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError, TableDefinition};

use super::{Event, EventKind, Key, Object};

/// `resource NUL namespace NUL name` → the object as JSON.
const OBJECTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("objects");
/// `format` and `revision`.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// `version`: that of the program which wrote last. Since format 2.
const WRITER: TableDefinition<'_, &str, &str> = TableDefinition::new("writer");

/// The layout this program writes. A file with a larger number was written by a newer one.
const FORMAT: u64 = 2;
/// The version of this program.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The page cache: all objects are in memory anyway.
const CACHE: usize = 8 << 20;

/// Why the store couldn't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("the store {} is in use by another process", path.display())]
    InUse {
        /// The store's file.
        path: PathBuf,
    },
    /// A newer program wrote it.
    #[error("the store {} has format {found}, written by {writer}, and this version reads up to {FORMAT}: use a newer vmpod, or another directory", path.display())]
    Newer {
        /// The store's file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The program that wrote it.
        writer: String,
    },
    /// The file is damaged.
    #[error("the store {} is damaged: {what}; restore it from a backup, or move it away to begin anew", path.display())]
    Damaged {
        /// The store's file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The file couldn't be read or written.
    #[error("can't open the store {}", path.display())]
    Io {
        /// The store's file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<redb::Error>,
    },
    /// The commit thread couldn't be started.
    #[error("can't start the store's writer")]
    Thread {
        /// The cause.
        source: std::io::Error,
    },
}

pub(super) struct Disk {
    database: Database,
}

pub(super) struct Loaded {
    pub(super) revision: u64,
    pub(super) objects: Vec<Arc<Object>>,
}

fn encode(key: &Key) -> Vec<u8> {
    [key.resource.as_bytes(), key.namespace.as_bytes(), key.name.as_bytes()].join(&0)
}

fn decode(bytes: &[u8]) -> Option<Key> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut parts = text.split('\0');
    let (resource, namespace, name) = (parts.next()?, parts.next()?, parts.next()?);
    parts.next().is_none().then(|| Key { resource: resource.into(), namespace: namespace.into(), name: name.into() })
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
    builder
}

/// The programs' name in a message.
fn writer_name(version: Option<&str>) -> String {
    version.map_or_else(|| "an unknown version".into(), |version| format!("vmpod {version}"))
}

impl Disk {
    pub(super) fn open(path: &Path) -> Result<(Self, Loaded), OpenError> {
        let fresh = !path.exists();
        let database = builder().create(path);
        Self::with(database, fresh, path)
    }

    /// The store on another kind of file.
    #[cfg(test)]
    pub(super) fn on(backend: impl redb::StorageBackend) -> Result<(Self, Loaded), OpenError> {
        let database = builder().create_with_backend(backend);
        Self::with(database, false, Path::new("/"))
    }

    fn with(database: Result<Database, DatabaseError>, fresh: bool, path: &Path) -> Result<(Self, Loaded), OpenError> {
        let database = database.map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => OpenError::InUse { path: path.into() },
            DatabaseError::UpgradeRequired(found) => {
                OpenError::Damaged { path: path.into(), what: format!("it has the unknown file format {found}") }
            }
            DatabaseError::Storage(StorageError::Corrupted(what)) => OpenError::Damaged { path: path.into(), what },
            DatabaseError::Storage(StorageError::Io(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
                OpenError::Damaged { path: path.into(), what: error.to_string() }
            }
            other => OpenError::Io { path: path.into(), source: Box::new(other.into()) },
        })?;
        let disk = Self { database };
        let io = |source: redb::Error| OpenError::Io { path: path.into(), source: Box::new(source) };
        if fresh || disk.format().map_err(io)?.is_none() {
            disk.begin_file(path).map_err(io)?;
        }
        match disk.format().map_err(io)? {
            Some(found) if found > FORMAT => {
                let writer = writer_name(disk.writer().as_deref());
                return Err(OpenError::Newer { path: path.into(), found, writer });
            }
            Some(found) if found < FORMAT => {
                disk.migrate(found).map_err(io)?;
                tracing::info!(store = %path.display(), from = found, to = FORMAT, "the store was brought to a new format");
            }
            _ if disk.writer().as_deref() != Some(VERSION) => disk.migrate(FORMAT).map_err(io)?,
            _ => {}
        }
        let loaded = disk.load(path)?;
        Ok((disk, loaded))
    }

    /// Brings a file of an older format to this program's, in one transaction: it is the one or the other.
    fn migrate(&self, _from: u64) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        {
            // Format 2 has one table more, and the rest as it was.
            write.open_table(WRITER)?.insert("version", VERSION)?;
            write.open_table(META)?.insert("format", FORMAT)?;
        }
        write.commit()?;
        Ok(())
    }

    /// The version that wrote last. A newer program may keep it elsewhere.
    fn writer(&self) -> Option<String> {
        let read = self.database.begin_read().ok()?;
        let version = read.open_table(WRITER).ok()?.get("version").ok()??.value().to_owned();
        Some(version)
    }

    fn format(&self) -> Result<Option<u64>, redb::Error> {
        let read = self.database.begin_read()?;
        match read.open_table(META) {
            Ok(meta) => Ok(meta.get("format")?.map(|value| value.value())),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn begin_file(&self, path: &Path) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        {
            let mut meta = write.open_table(META)?;
            meta.insert("format", FORMAT)?;
            meta.insert("revision", 1)?;
            write.open_table(OBJECTS)?;
            write.open_table(WRITER)?.insert("version", VERSION)?;
        }
        write.commit()?;
        // The file's name must survive a power loss too.
        if let Some(parent) = path.parent() {
            std::fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(redb::Error::Io)?;
        }
        Ok(())
    }

    fn load(&self, path: &Path) -> Result<Loaded, OpenError> {
        let io = |source: redb::Error| OpenError::Io { path: path.into(), source: Box::new(source) };
        let damaged = |what: String| OpenError::Damaged { path: path.into(), what };
        let read = self.database.begin_read().map_err(|e| io(e.into()))?;
        let meta = read.open_table(META).map_err(|e| io(e.into()))?;
        let revision = meta
            .get("revision")
            .map_err(|e| io(e.into()))?
            .map(|value| value.value())
            .ok_or_else(|| damaged("it has no revision".into()))?;
        let table = read.open_table(OBJECTS).map_err(|e| io(e.into()))?;
        let mut objects = Vec::new();
        for row in table.iter().map_err(|e| io(e.into()))? {
            let (key, bytes) = row.map_err(|e| io(e.into()))?;
            let key = decode(key.value()).ok_or_else(|| damaged("a key is not resource, namespace, name".into()))?;
            let object = Object::load(key.clone(), Bytes::copy_from_slice(bytes.value()))
                .map_err(|what| damaged(format!("{} {}/{}: {what}", key.resource, key.namespace, key.name)))?;
            objects.push(Arc::new(object));
        }
        Ok(Loaded { revision, objects })
    }

    /// Writes the events in one transaction; returns when they are on the disk.
    pub(super) fn commit(&self, events: &[Arc<Event>]) -> Result<(), Box<redb::Error>> {
        self.try_commit(events).map_err(Box::new)
    }

    fn try_commit(&self, events: &[Arc<Event>]) -> Result<(), redb::Error> {
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        {
            let mut objects = write.open_table(OBJECTS)?;
            let mut revision = 0;
            for event in events {
                let key = encode(event.object.key());
                match event.kind {
                    EventKind::Put => objects.insert(key.as_slice(), &event.object.bytes()[..])?,
                    EventKind::Delete => objects.remove(key.as_slice())?,
                };
                revision = event.revision;
            }
            write.open_table(META)?.insert("revision", revision)?;
        }
        write.commit()?;
        Ok(())
    }
}
