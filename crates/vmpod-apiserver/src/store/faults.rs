//! The store on a file that fails: what was acknowledged is there after the next start, and the server
//! says that it can't write.
//!
//! The file is kept twice: as the process sees it, and as the disk has it. Only a sync carries the one to
//! the other. At a power loss any of the writes since the last sync may have reached the disk, in any
//! order, and one of them only in part.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proptest::prelude::*;
use redb::StorageBackend;
use serde_json::json;

use super::*;

#[derive(Clone, Debug)]
enum Write {
    Bytes(u64, Vec<u8>),
    Length(u64),
}

fn apply(file: &mut Vec<u8>, write: &Write) {
    match write {
        Write::Length(length) => file.resize(usize::try_from(*length).unwrap(), 0),
        Write::Bytes(offset, bytes) => {
            let (from, to) = (usize::try_from(*offset).unwrap(), usize::try_from(*offset).unwrap() + bytes.len());
            if file.len() < to {
                file.resize(to, 0);
            }
            file[from..to].copy_from_slice(bytes);
        }
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing.
    None,
    /// A sync fails, and the system forgets what it should have written.
    Sync,
    /// The disk is full: the file can't grow.
    Full,
    /// A write reaches the disk by half and fails.
    Torn,
}

#[derive(Debug)]
struct Medium {
    seen: Vec<u8>,
    kept: Vec<u8>,
    pending: Vec<Write>,
    fault: Fault,
}

/// A file whose disk outlives the process that uses it.
#[derive(Clone, Debug)]
struct Shaky(Arc<Mutex<Medium>>);

impl Shaky {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Medium {
            seen: Vec::new(),
            kept: Vec::new(),
            pending: Vec::new(),
            fault: Fault::None,
        })))
    }

    fn medium(&self) -> MutexGuard<'_, Medium> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file as it is after a power loss: of the writes since the last sync those that `survivors` tells, the
    /// one at `torn` only by half.
    fn after_power_loss(&self, survivors: &[bool], torn: usize) -> Self {
        let medium = self.medium();
        let mut kept = medium.kept.clone();
        for (index, write) in medium.pending.iter().enumerate() {
            match write {
                Write::Bytes(offset, bytes) if index == torn => {
                    apply(&mut kept, &Write::Bytes(*offset, bytes[..bytes.len() / 2].to_vec()));
                }
                write if survivors.get(index).copied().unwrap_or_default() => apply(&mut kept, write),
                _ => {}
            }
        }
        let after = Self::new();
        *after.medium() = Medium { seen: kept.clone(), kept, pending: Vec::new(), fault: Fault::None };
        after
    }
}

fn failure(code: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(code)
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl StorageBackend for Shaky {
    fn len(&self) -> Result<u64, std::io::Error> {
        Ok(u64::try_from(self.medium().seen.len()).unwrap())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        let medium = self.medium();
        let from = usize::try_from(offset).unwrap();
        let bytes = medium.seen.get(from..from + out.len()).ok_or_else(|| failure(EIO))?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> Result<(), std::io::Error> {
        let mut medium = self.medium();
        if medium.fault == Fault::Full && usize::try_from(length).unwrap() > medium.seen.len() {
            return Err(failure(ENOSPC));
        }
        let write = Write::Length(length);
        apply(&mut medium.seen, &write);
        medium.pending.push(write);
        Ok(())
    }

    fn sync_data(&self) -> Result<(), std::io::Error> {
        let mut medium = self.medium();
        if medium.fault == Fault::Sync {
            medium.pending.clear();
            return Err(failure(EIO));
        }
        let pending = std::mem::take(&mut medium.pending);
        for write in &pending {
            apply(&mut medium.kept, write);
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), std::io::Error> {
        let mut medium = self.medium();
        if medium.fault == Fault::Torn {
            let write = Write::Bytes(offset, bytes[..bytes.len() / 2].to_vec());
            apply(&mut medium.seen, &write);
            apply(&mut medium.kept, &write);
            return Err(failure(EIO));
        }
        let write = Write::Bytes(offset, bytes.to_vec());
        apply(&mut medium.seen, &write);
        medium.pending.push(write);
        Ok(())
    }
}

fn open(file: &Shaky) -> Result<Store, OpenError> {
    let (disk, loaded) = Disk::on(file.clone())?;
    Store::start(disk, loaded)
}

fn key(name: &str) -> Key {
    Key::new("configmaps", Some("t"), name)
}

async fn put(store: &Store, name: &str, data: &str) -> Result<u64, StoreError> {
    let value = json!({ "metadata": { "name": name, "namespace": "t", "uid": name }, "data": { "k": data } });
    let outcome: Result<_, StoreError> = store.mutate(&key(name), None, |_, _| Ok(Change::Put(value.clone()))).await;
    outcome.map(|outcome| outcome.object.revision())
}

fn data(store: &Store, name: &str) -> Option<String> {
    store.get(&key(name)).map(|object| object.value()["data"]["k"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_failing_disk_is_told_and_loses_nothing_acknowledged() {
    for fault in [Fault::Sync, Fault::Full, Fault::Torn] {
        let file = Shaky::new();
        let store = open(&file).unwrap();
        let mut acknowledged = Vec::new();
        for number in 0..20 {
            let name = format!("before-{number}");
            acknowledged.push((name.clone(), put(&store, &name, "x").await.unwrap()));
        }
        file.medium().fault = fault;
        // The file has room of its own: a full disk is met when it is used up.
        let large = "x".repeat(256 << 10);
        let mut refused = None;
        for number in 0..200 {
            let name = format!("during-{number}");
            match put(&store, &name, &large).await {
                Ok(revision) => acknowledged.push((name, revision)),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        let refused = refused.unwrap_or_else(|| panic!("{fault:?} was never met"));
        assert!(matches!(refused, StoreError::Disk(_)), "{fault:?}: {refused:?}");
        assert!(refused.to_string().starts_with("the store can't be written: "), "{refused}");
        // Writes are refused from now on, readiness says why, and reads go on with what is durable.
        assert!(put(&store, "after", "x").await.is_err(), "{fault:?}");
        assert!(store.failure().is_some(), "{fault:?}");
        let shown = store.list("configmaps", None).objects.len();
        assert_eq!(shown, acknowledged.len(), "{fault:?}");
        file.medium().fault = Fault::None;
        let after = file.after_power_loss(&[], usize::MAX);
        drop(store);
        let store = open(&after).unwrap();
        for (name, revision) in &acknowledged {
            let found = store.get(&key(name)).unwrap_or_else(|| panic!("{fault:?}: {name} is lost"));
            assert_eq!(found.revision(), *revision);
        }
        assert!(store.failure().is_none());
        put(&store, "again", "x").await.unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The power goes while a write is under way, at any write of it, whatever reached the disk.
    #[test]
    fn a_power_loss_at_any_write_loses_nothing_acknowledged(
        before in proptest::collection::vec((0..6_u8, 0..2000_usize), 1..12),
        survivors in proptest::collection::vec(any::<bool>(), 64),
        torn in 0..64_usize,
        size in 0..20_000_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let outcome: Result<(), TestCaseError> = runtime.block_on(async {
            let file = Shaky::new();
            let store = open(&file).unwrap();
            let mut wanted = std::collections::BTreeMap::new();
            for (name, length) in &before {
                let text = "x".repeat(*length);
                put(&store, &name.to_string(), &text).await.unwrap();
                wanted.insert(name.to_string(), text);
            }
            let last = store.revision();
            // The next write is stopped at its sync, when all its bytes are on their way.
            let moment = Arc::new(Mutex::new(None));
            let watched = Stopped { file: file.clone(), moment: moment.clone(), survivors: survivors.clone(), torn };
            drop(store);
            let (disk, loaded) = Disk::on(watched).unwrap();
            let store = Store::start(disk, loaded).unwrap();
            *moment.lock().unwrap() = None;
            let text = "y".repeat(size);
            put(&store, "0", &text).await.unwrap();
            let after = moment.lock().unwrap().take().expect("a write was synced");
            drop(store);
            let store = open(&after).unwrap();
            for (name, value) in &wanted {
                let found = data(&store, name);
                let fits = found.as_deref() == Some(value) || (name == "0" && found.as_deref() == Some(&text));
                prop_assert!(fits, "{name} is lost");
            }
            prop_assert!(store.revision() >= last);
            prop_assert!(put(&store, "again", "x").await.is_ok());
            Ok(())
        });
        outcome?;
    }
}

/// Keeps what a power loss at the first sync would have left.
#[derive(Debug)]
struct Stopped {
    file: Shaky,
    moment: Arc<Mutex<Option<Shaky>>>,
    survivors: Vec<bool>,
    torn: usize,
}

impl StorageBackend for Stopped {
    fn len(&self) -> Result<u64, std::io::Error> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        self.file.read(offset, out)
    }

    fn set_len(&self, length: u64) -> Result<(), std::io::Error> {
        self.file.set_len(length)
    }

    fn sync_data(&self) -> Result<(), std::io::Error> {
        let mut moment = self.moment.lock().unwrap_or_else(PoisonError::into_inner);
        if moment.is_none() {
            *moment = Some(self.file.after_power_loss(&self.survivors, self.torn));
        }
        self.file.sync_data()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), std::io::Error> {
        self.file.write(offset, bytes)
    }
}
