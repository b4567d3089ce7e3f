//! Processes that belong to a directory.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

/// A process that has something to do with a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its command line.
    pub words: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: String = self.words.chars().take(300).collect();
        write!(f, "{} {words}", self.pid)
    }
}

/// The processes, except this one, that have the directory in their command line, working directory or open files.
#[must_use]
pub fn processes(dir: &Path) -> BTreeSet<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return BTreeSet::new() };
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter_map(|pid| belongs(pid, dir))
        .collect()
}

fn belongs(pid: i32, dir: &Path) -> Option<Process> {
    let root = Path::new("/proc").join(pid.to_string());
    // A dead process that nobody waited for has neither words nor files.
    let words = std::fs::read(root.join("cmdline")).ok()?;
    let words = String::from_utf8_lossy(&words).replace('\0', " ").trim().to_owned();
    let in_words = words.contains(&*dir.to_string_lossy());
    let in_cwd = || std::fs::read_link(root.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
    let in_files = || {
        std::fs::read_dir(root.join("fd")).is_ok_and(|files| {
            files.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(dir)))
        })
    };
    (!words.is_empty() && (in_words || in_cwd() || in_files())).then_some(Process { pid, words })
}

/// The hypervisor processes of a directory.
#[must_use]
pub fn hypervisors(dir: &Path) -> BTreeSet<Process> {
    processes(dir).into_iter().filter(|process| process.words.contains("qemu-system-")).collect()
}

/// Ends every process of a directory at once.
pub fn kill_all(dir: &Path) {
    kill_those(dir, |_| true);
}

/// Ends those processes of a directory at once.
pub(crate) fn kill_those(dir: &Path, which: impl Fn(&Process) -> bool) {
    // A process may start another while it is looked for.
    for _ in 0..10 {
        let left: Vec<_> = processes(dir).into_iter().filter(&which).collect();
        if left.is_empty() {
            return;
        }
        for process in left {
            if let Some(pid) = Pid::from_raw(process.pid) {
                // One that is gone by now is what was wanted.
                kill_process(pid, Signal::KILL).ok();
            }
        }
    }
}
