//! What the agent must remember of a pod to go on after a crash: one file per pod, written whole.
//!
//! The rule is write-ahead: what can't be repeated or learnt again is on disk before anything follows from it. An attempt is
//! recorded before its machine exists, so no machine is ever without a record; a main process's exit code before its machine
//! is killed, so no code is lost; the end of an attempt before its machine's files go. Everything else is learnt again from
//! the machine itself, which knows whether it ever ran.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::Ipv4Addr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmpod_machine::MachineId;

use crate::{backoff::Backoff, pod::PodUid};

/// Everything durable about one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) uid: PodUid,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// When the pod was accepted (or refused): its start time.
    pub(crate) accepted: Timestamp,
    /// The address of the pod's machines; absent until the first attempt.
    #[serde(default)]
    pub(crate) address: Option<Ipv4Addr>,
    /// Containers run beside its machine.
    #[serde(default)]
    pub(crate) sidecars: bool,
    #[serde(default)]
    pub(crate) attempt: Option<Attempt>,
    /// How the attempt before this one ended.
    #[serde(default)]
    pub(crate) previous: Option<Ended>,
    #[serde(default)]
    pub(crate) backoff: Backoff,
    #[serde(default)]
    pub(crate) stop: Option<Stop>,
    #[serde(default)]
    pub(crate) terminal: Option<Terminal>,
}

/// One life of container 0: one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attempt {
    /// 0 for the first; the restart count.
    pub(crate) number: u32,
    pub(crate) image: ImageChoice,
    /// When the machine was first seen running.
    #[serde(default)]
    pub(crate) started: Option<Timestamp>,
    #[serde(default)]
    pub(crate) main: Main,
    #[serde(default)]
    pub(crate) ended: Option<Ended>,
    /// Its machine couldn't go on from a memory snapshot and boots instead.
    #[serde(default)]
    pub(crate) boots: bool,
    /// The postStart hook has succeeded: it isn't run again.
    #[serde(default)]
    pub(crate) hooked: bool,
    /// It is being ended so that another takes its place.
    #[serde(default)]
    pub(crate) unwell: Option<Unwell>,
}

/// Why a container that runs is ended though its pod goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unwell {
    /// What it failed: a probe or a hook.
    pub(crate) what: String,
    /// When it is killed.
    pub(crate) deadline: Timestamp,
}

/// The image an attempt runs, fixed when it begins: a tag may move later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageChoice {
    /// The name in the pod.
    pub(crate) name: String,
    /// The digest of its manifest.
    pub(crate) digest: String,
}

/// The main process in the guest, when the container has a command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Main {
    /// The start wasn't asked for yet.
    #[default]
    Unstarted,
    /// The guest has been asked, or is about to be. Asking again is safe while the guest hasn't rebooted.
    Asked,
    /// It runs since then.
    Started(Timestamp),
    /// It is over.
    Ended {
        /// The exit code, 128 + n for signal n; none when the guest lost it.
        code: Option<i32>,
        /// When it began, if that is known.
        started: Option<Timestamp>,
        /// When its end was seen.
        at: Timestamp,
        /// What it left to say; or why there is no code, or could be no process.
        why: Option<String>,
    },
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) machine: MachineId,
    pub(crate) exit_code: i32,
    pub(crate) reason: String,
    #[serde(default)]
    pub(crate) message: Option<String>,
    #[serde(default)]
    pub(crate) started: Option<Timestamp>,
    pub(crate) finished: Timestamp,
}

/// The pod is being stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stop {
    pub(crate) why: StopReason,
    /// When whatever still runs is killed.
    pub(crate) deadline: Timestamp,
    /// Why, in words, of a pod that is evicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) message: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StopReason {
    /// Somebody deleted the pod.
    Deleted,
    /// Its `activeDeadlineSeconds` are over.
    Deadline,
    /// The node runs short of something.
    Evicted,
    /// The agent ends and machines aren't kept. The only one that doesn't end the pod as well.
    Agent,
}

/// The pod is over, for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terminal {
    pub(crate) succeeded: bool,
    #[serde(default)]
    pub(crate) reason: Option<String>,
    #[serde(default)]
    pub(crate) message: Option<String>,
    /// The API showed it before this agent knew the pod: its status isn't ours to write.
    #[serde(default)]
    pub(crate) shown_before: bool,
}

impl Record {
    /// A pod that was just accepted.
    pub(crate) fn new(uid: PodUid, namespace: &str, name: &str, accepted: Timestamp) -> Self {
        Self {
            uid,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            accepted,
            address: None,
            sidecars: false,
            attempt: None,
            previous: None,
            backoff: Backoff::default(),
            stop: None,
            terminal: None,
        }
    }

    /// The number of the next attempt.
    pub(crate) fn next_attempt(&self) -> u32 {
        self.attempt.as_ref().map_or(0, |attempt| attempt.number + 1)
    }

    /// The current attempt's machine.
    pub(crate) fn machine(&self) -> Option<MachineId> {
        Some(self.uid.machine(self.attempt.as_ref()?.number))
    }
}

/// Why a record can't be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// An operation on one of the agent's files failed.
    #[error("could not {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::File { action, path, source }
}

/// The records of all pods: `DIR/node/pods/<uid>/record.json`, with each pod's logs beside its record.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    root: PathBuf,
}

/// What is on disk of one pod.
#[derive(Debug)]
pub(crate) enum Kept {
    Record(Box<Record>),
    /// A directory without a (readable) record: what it is of, and why. Its pod can only be cleaned away.
    Damaged(String),
}

impl Records {
    pub(crate) fn open(dir: &Path) -> Result<Self, RecordError> {
        let root = dir.join("pods");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .map_err(file_error("make the directory", &root))?;
        Ok(Self { root })
    }

    /// The directory of all pods.
    pub(crate) fn dir_root(&self) -> &Path {
        &self.root
    }

    /// The directory of a pod.
    pub(crate) fn dir(&self, uid: &PodUid) -> PathBuf {
        self.root.join(uid.as_str())
    }

    /// What a pod's machine and the containers beside it share, each volume by its name.
    pub(crate) fn shared(&self, uid: &PodUid) -> PathBuf {
        self.dir(uid).join("shared")
    }

    /// The file in which an attempt of a container beside the machine may leave a message.
    pub(crate) fn last_words(&self, uid: &PodUid, container: &str, attempt: u32) -> PathBuf {
        self.dir(uid).join(container).join(format!("{attempt}.said"))
    }

    /// The log of a container's attempt.
    pub(crate) fn log(&self, uid: &PodUid, container: &str, attempt: u32) -> PathBuf {
        self.dir(uid).join(container).join(format!("{attempt}.log"))
    }

    /// Removes the logs of a container's attempts before `first`, with what was rotated of them.
    pub(crate) fn forget_logs(&self, uid: &PodUid, container: &str, first: u32) -> io::Result<()> {
        let dir = self.dir(uid).join(container);
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let attempt = name.to_str().and_then(|name| name.split_once(".log")?.0.parse::<u32>().ok());
            if attempt.is_some_and(|attempt| attempt < first) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    pub(crate) fn save(&self, record: &Record) -> Result<(), RecordError> {
        let dir = self.dir(&record.uid);
        let new = !dir.exists();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(file_error("make the directory", &dir))?;
        let path = dir.join(FILE);
        let bytes = serde_json::to_vec_pretty(record).map_err(io::Error::from).map_err(file_error("encode", &path))?;
        write_whole(&path, &bytes).map_err(file_error("write", &path))?;
        if new {
            File::open(&self.root).and_then(|root| root.sync_all()).map_err(file_error("make durable", &self.root))?;
        }
        Ok(())
    }

    /// Removes everything of a pod. Nothing there is no error.
    pub(crate) fn forget(&self, uid: &PodUid) -> Result<(), RecordError> {
        let dir = self.dir(uid);
        // The record goes first: a directory without one is known to be rubbish.
        for result in [fs::remove_file(dir.join(FILE)), fs::remove_dir_all(&dir)] {
            match result {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file_error("remove", &dir)(error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Everything that is there.
    pub(crate) fn load(&self) -> Result<Vec<(PodUid, Kept)>, RecordError> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(file_error("read the directory", &self.root))? {
            let entry = entry.map_err(file_error("read the directory", &self.root))?;
            let Ok(uid) = PodUid::parse(&entry.file_name().to_string_lossy()) else { continue };
            let path = entry.path().join(FILE);
            let kept = match fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<Record>(&bytes)?)) {
                Ok(record) if record.uid == uid => Kept::Record(Box::new(record)),
                Ok(record) => Kept::Damaged(format!("{} is of pod {}", path.display(), record.uid)),
                Err(error) if is_damage(&error) => Kept::Damaged(format!("{}: {error}", path.display())),
                // A disk that fails for a moment must not cost a pod its record.
                Err(error) => return Err(file_error("read", &path)(error)),
            };
            all.push((uid, kept));
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }
}

const FILE: &str = "record.json";

/// Whether a file that couldn't be read is not what it should be, and will not be later.
fn is_damage(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotADirectory, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | NotADirectory | InvalidData | UnexpectedEof)
}

/// Writes a private file so that after a crash it is there entirely or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("a file needs a directory"))?;
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temporary, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str) -> Record {
        let mut record = Record::new(PodUid::parse(uid).unwrap(), "ns", "p", Timestamp::UNIX_EPOCH);
        record.attempt = Some(Attempt {
            number: 2,
            image: ImageChoice { name: "tiny".to_owned(), digest: "sha256:00".to_owned() },
            started: None,
            main: Main::Ended { code: Some(3), started: None, at: Timestamp::UNIX_EPOCH, why: None },
            ended: None,
            boots: false,
            hooked: false,
            unwell: None,
        });
        record
    }

    #[test]
    fn a_record_survives_and_is_forgotten_whole() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let record = record("a-1");
        records.save(&record).unwrap();
        fs::create_dir_all(records.dir(&record.uid).join("vm")).unwrap();
        let all = records.load().unwrap();
        assert!(
            matches!(&all[..], [(uid, Kept::Record(kept))] if uid.as_str() == "a-1" && **kept == record),
            "{all:?}"
        );
        records.forget(&record.uid).unwrap();
        records.forget(&record.uid).unwrap();
        assert!(records.load().unwrap().is_empty());
        assert!(!records.dir(&record.uid).exists());
    }

    #[test]
    fn logs_of_attempts_long_past_go() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let uid = PodUid::parse("a").unwrap();
        records.forget_logs(&uid, "vm", 7).unwrap();
        let vm = records.dir(&uid).join("vm");
        fs::create_dir_all(&vm).unwrap();
        for name in ["2.log", "2.log.000001", "9.log", "10.log", "10.log.000001", "11.log", "note"] {
            fs::write(vm.join(name), "").unwrap();
        }
        records.forget_logs(&uid, "vm", 10).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(vm).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["10.log", "10.log.000001", "11.log", "note"]);
    }

    #[test]
    fn damage_is_told_and_stops_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        records.save(&record("good")).unwrap();
        records.save(&record("torn")).unwrap();
        fs::write(records.dir(&PodUid::parse("torn").unwrap()).join(FILE), "{").unwrap();
        fs::create_dir(dir.path().join("pods/empty")).unwrap();
        let kinds: Vec<_> = records
            .load()
            .unwrap()
            .into_iter()
            .map(|(uid, kept)| (uid.to_string(), matches!(kept, Kept::Record(_))))
            .collect();
        assert_eq!(kinds, [("empty".to_owned(), false), ("good".to_owned(), true), ("torn".to_owned(), false)]);
    }

    #[test]
    fn a_record_that_can_not_be_read_now_is_not_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let file = records.dir(&PodUid::parse("a").unwrap()).join(FILE);
        // Not to be read by anybody, root included.
        fs::create_dir_all(&file).unwrap();
        let error = records.load().unwrap_err();
        assert!(error.to_string().contains("record.json"), "{error}");
    }

    #[test]
    fn the_form_on_disk_is_stable() {
        insta::assert_json_snapshot!(record("a-1"));
    }
}
