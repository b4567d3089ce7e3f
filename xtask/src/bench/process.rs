//! Processes that a benchmark starts and looks at, through /proc.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// The unit of times in /proc, per second: the same on every Linux.
const TICKS: f64 = 100.0;

/// A process that is killed when the benchmark lets go of it.
pub(crate) struct Owned {
    child: Child,
    name: String,
}

impl Owned {
    /// Starts a program in a group of its own, quietly: what it says goes to `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let file = std::fs::File::create(log).with_context(|| format!("can't make {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("{name} did not start"))?;
        Ok(Self { child, name })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Asks it to end and waits up to `limit`.
    pub(crate) fn end(mut self, limit: Duration) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process has a number")?;
        kill_process(pid, Signal::TERM).with_context(|| format!("can't end {}", self.name))?;
        let until = Instant::now() + limit;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                bail!("{} did not end within {} s", self.name, limit.as_secs());
            }
            pause(20);
        }
        Ok(())
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Already gone is as good.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Waits; a benchmark that plays the part of a polling script has nothing better.
#[expect(clippy::disallowed_methods, reason = "the peer that is measured polls; so does waiting for a foreign process")]
pub(crate) fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// Resident memory of a process in MiB.
pub(crate) fn resident_mib(pid: u32) -> Result<f64> {
    memory_mib(pid, "VmRSS:")
}

/// The part of it that is no file's, in MiB: the pages of its program are the page cache's, and are there once for all.
pub(crate) fn own_mib(pid: u32) -> Result<f64> {
    memory_mib(pid, "RssAnon:")
}

fn memory_mib(pid: u32, name: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
        .with_context(|| format!("process {pid} has no {name}"))?;
    Ok(kib / 1024.0)
}

/// Resident and proportional memory, in MiB, of the process whose working directory is `dir` and whose program is called
/// like `program`.
pub(crate) fn memory_in(dir: &Path, program: &str) -> Result<(f64, f64)> {
    let (root, _) = process_in(dir, program)?;
    let rollup = std::fs::read_to_string(root.join("smaps_rollup"))?;
    let mib = |name: &str| -> Result<f64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        let kib: f64 = line
            .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
            .with_context(|| format!("{} has no {name}", root.display()))?;
        Ok(kib / 1024.0)
    };
    Ok((mib("Rss:")?, mib("Pss:")?))
}

/// The processor seconds that a process has used, and the most memory that it had resident, in MiB.
pub(crate) fn used(pid: u32) -> Result<(f64, f64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold spaces; what follows it doesn't.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
        .with_context(|| format!("process {pid} has no VmHWM"))?;
    Ok(((ticks(11) + ticks(12)) / TICKS, peak / 1024.0))
}

/// The command line of the process whose working directory is `dir` and whose program is called like `program`.
pub(crate) fn command_line_in(dir: &Path, program: &str) -> Result<Vec<OsString>> {
    Ok(process_in(dir, program)?.1)
}

/// Such a process's directory in /proc, and its command line.
fn process_in(dir: &Path, program: &str) -> Result<(std::path::PathBuf, Vec<OsString>)> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let at = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words: Vec<OsString> =
            words.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
        // The list ends with a separator.
        words.pop();
        let is_it = words.first().is_some_and(|first| first.to_string_lossy().contains(program));
        if at == dir && is_it {
            return Ok((entry.path(), words));
        }
    }
    bail!("no {program} runs in {}", dir.display())
}
