#![expect(clippy::panic, reason = "tests fail by panicking")]
//! Network namespaces: each test in one of its own, with others inside for guests and the world.

use std::{
    future::Future,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const INSIDE: &str = "VMPOD_TEST_IN_NAMESPACE";

/// Runs a test in a network namespace, with the rights of root there: by running this program once more.
pub(crate) fn in_namespace(test: &str, body: impl Future<Output = ()>) {
    if inside() {
        shell("ip link set lo up");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        return runtime.block_on(body);
    }
    let root = rustix::process::geteuid().is_root();
    let kind: &[&str] = if root { &["--net"] } else { &["--user", "--map-root-user", "--net"] };
    let status = Command::new("unshare")
        .args(kind)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} in a network namespace: {status}");
}

fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs a script here; its output.
pub(crate) fn shell(script: &str) -> String {
    finish(script, Command::new("sh").args(["-c", script])).unwrap_or_else(|why| panic!("{why}"))
}

/// The same; none when it fails.
pub(crate) fn try_shell(script: &str) -> Option<String> {
    finish(script, Command::new("sh").args(["-c", script])).ok()
}

fn finish(script: &str, command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    Err(format!("{script}: {}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// What there still is of a network here; nothing when it was removed whole.
pub(crate) fn leftovers(bridge: &str) -> String {
    let sockets = shell("busybox netstat -lnu; busybox netstat -lnt");
    let serving = sockets.lines().filter(|line| line.contains(":67 ") || line.contains(":53 "));
    let links = shell("ip -o link");
    let links = links.lines().filter(|line| line.contains(bridge) || line.contains("vmp"));
    let rules = shell("nft list ruleset");
    serving.chain(links).chain(rules.lines()).collect::<Vec<_>>().join("\n")
}

/// This process's memory.
pub(crate) fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A process that is ended with this value, and what it started with it.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn wait(&mut self) {
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process_group(pid, rustix::process::Signal::KILL).ok();
        self.0.wait().ok();
    }
}

/// One more network namespace.
pub(crate) struct Namespace(Running);

impl Namespace {
    pub(crate) fn new() -> Self {
        use std::os::unix::process::CommandExt as _;
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo here; exec cat"])
            // Its end of the pipe closes when this process ends, however it ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "here\n");
        Self(Running(holder))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.0.id()
    }

    fn enter(&self, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.pid())).args(["sh", "-c", script]);
        command
    }

    pub(crate) fn shell(&self, script: &str) -> String {
        finish(script, &mut self.enter(script)).unwrap_or_else(|why| panic!("{why}"))
    }

    pub(crate) fn try_shell(&self, script: &str) -> Option<String> {
        finish(script, &mut self.enter(script)).ok()
    }

    pub(crate) fn spawn(&self, script: &str) -> Running {
        use std::os::unix::process::CommandExt as _;
        Running(self.enter(script).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0).spawn().unwrap())
    }

    /// Waits until a script succeeds.
    pub(crate) fn until(&self, script: &str) {
        let began = Instant::now();
        while self.try_shell(script).is_none() {
            assert!(began.elapsed() < Duration::from_secs(10), "not within 10 s: {script}");
        }
    }
}
