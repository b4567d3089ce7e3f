//! The supervisor's scripts, run by real shells on this host. They use the directory that a guest would use, so every
//! test has a name of its own and removes what it made.

use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::process::Command;

use super::*;
use crate::guest::{ExecCarrier, Signal};

/// Runs scripts on this host, as an SSH server would: each in a session of its own.
struct Host {
    shell: &'static [&'static str],
}

const SHELLS: [&[&str]; 2] = [&["dash"], &["busybox", "ash"]];

#[async_trait]
impl Runner for Host {
    async fn open(&self, script: &str, words: &[&str], stdin: bool) -> Result<ExecSession, GuestError> {
        let mut command = std::process::Command::new("setsid");
        command.arg("--wait").args(self.shell).args(["-c", script, "vmpod"]).args(words);
        let mut child = Command::from(command)
            .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (control, carrier) = ExecCarrier::pair();
        let session = ExecSession {
            stdin: child.stdin.take().map(|stdin| Box::new(stdin) as _),
            stdout: Box::new(child.stdout.take().unwrap()),
            stderr: Box::new(child.stderr.take().unwrap()),
            control,
        };
        tokio::spawn(async move {
            let status = child.wait().await.unwrap();
            carrier.finish(Ok(ExitStatus::Code(status.code().unwrap_or(255))));
        });
        Ok(session)
    }
}

struct Process {
    host: Arc<Host>,
    name: String,
}

impl Process {
    fn new(shell: &'static [&'static str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self { host: Arc::new(Host { shell }), name: format!("test-{}-{count}", std::process::id()) }
    }

    async fn start(&self, command: &MainCommand) -> Result<Started, GuestError> {
        use tokio::io::AsyncWriteExt;
        self.start_with(run_file(command)?.as_bytes(), |mut stdin| async move { stdin.shutdown().await.unwrap() }).await
    }

    async fn start_with<F: Future<Output = ()>>(
        &self,
        input: &[u8],
        end: impl FnOnce(BoxWrite) -> F,
    ) -> Result<Started, GuestError> {
        use tokio::io::AsyncWriteExt;
        let mut session = self.host.open(&start_script(), &[&self.name], true).await?;
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(input).await.unwrap();
        end(stdin).await;
        started(&mut session, &self.name).await
    }

    async fn wait(&self) -> Result<ExitStatus, GuestError> {
        let session = self.host.open(&wait_script(), &[&self.name], false).await?;
        let (status, out, err) = session.output().await?;
        exit_code(&self.name, &status, &out, &err)
    }

    async fn signal(&self, signal: Signal) -> ExitStatus {
        let session = self.host.open(&signal_script(), &[&self.name, signal.name()], false).await.unwrap();
        session.output().await.unwrap().0
    }

    /// Gives it input, and hears how that ended.
    async fn input(&self, text: &str, last: bool) -> ExitStatus {
        use tokio::io::AsyncWriteExt;
        let words = [self.name.as_str(), if last { "last" } else { "more" }];
        let mut session = self.host.open(&input_script(), &words, true).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        // One that takes none has ended before.
        stdin.write_all(text.as_bytes()).await.ok();
        stdin.shutdown().await.ok();
        drop(stdin);
        session.output().await.unwrap().0
    }

    fn follow(&self, from: Offset) -> BoxStream<'static, Result<OutputChunk, GuestError>> {
        follow(Arc::clone(&self.host), &self.name, from)
    }

    async fn all(&self, from: Offset) -> (String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        let mut at = from;
        let mut chunks = self.follow(from);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.unwrap();
            at = at.after(chunk.stream, chunk.bytes.len());
            assert_eq!(chunk.next, at);
            let text = std::str::from_utf8(&chunk.bytes).unwrap();
            if chunk.stream == StdStream::Stdout { out.push_str(text) } else { err.push_str(text) }
        }
        (out, err)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let script = format!("{FIND}rm -rf \"$m\"");
        std::process::Command::new("sh").args(["-c", &script, "vmpod", &self.name]).status().ok();
    }
}

fn sh(script: &str) -> MainCommand {
    MainCommand { command: ["sh", "-c", script].map(ToOwned::to_owned).to_vec(), ..MainCommand::default() }
}

#[tokio::test]
async fn output_and_exit_code_arrive_and_the_streams_stay_apart() {
    for shell in SHELLS {
        let process = Process::new(shell);
        let command = MainCommand {
            env: vec![("A".to_owned(), "it's\n\"x\" $HOME".to_owned())],
            workdir: Some("/".to_owned()),
            ..sh("printf '%s' \"$A\"; pwd; umask; echo err >&2; exit 3")
        };
        assert_eq!(process.start(&command).await.unwrap(), Started::Now);
        let mask = String::from_utf8(std::process::Command::new("sh").args(["-c", "umask"]).output().unwrap().stdout);
        let (out, err) = process.all(Offset::default()).await;
        assert_eq!(out, format!("it's\n\"x\" $HOME/\n{}", mask.unwrap()));
        assert_eq!(err, "err\n");
        assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(3));
        // A second look, and one from the middle.
        assert_eq!(process.all(Offset { stdout: 5, stderr: 2 }).await.1, "r\n");
        assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(3));
    }
}

#[tokio::test]
async fn it_is_started_once_however_many_try() {
    for shell in SHELLS {
        let process = Process::new(shell);
        let command = sh("echo once; sleep 0.3; exit 7");
        let tries = futures::future::join_all((0..6).map(|_| process.start(&command))).await;
        let now = tries.into_iter().map(Result::unwrap).filter(|started| *started == Started::Now).count();
        assert_eq!(now, 1);
        assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(7));
        assert_eq!(process.all(Offset::default()).await.0, "once\n");
        assert_eq!(process.start(&command).await.unwrap(), Started::Before);
    }
}

#[tokio::test]
async fn a_command_that_was_cut_short_is_not_started() {
    for shell in SHELLS {
        let process = Process::new(shell);
        let whole = run_file(&sh("echo never")).unwrap();
        let half = &whole.as_bytes()[..whole.len() - 4];
        let error = process.start_with(half, |stdin| async move { drop(stdin) }).await.unwrap_err();
        assert!(error.to_string().contains("cut short"), "{error}");
        assert_eq!(process.start(&sh("exit 0")).await.unwrap(), Started::Now, "the lock must not be taken");
        assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(0));
    }
}

#[tokio::test]
async fn output_is_seen_while_it_runs_and_a_lost_reader_goes_on() {
    for shell in SHELLS {
        let process = Process::new(shell);
        let command = sh("echo one; while [ ! -e \"$GO\" ]; do sleep 0.1; done; echo two");
        let dir = tempfile::tempdir().unwrap();
        let go = dir.path().join("go");
        let command = MainCommand { env: vec![("GO".to_owned(), go.to_str().unwrap().to_owned())], ..command };
        process.start(&command).await.unwrap();
        let mut chunks = process.follow(Offset::default());
        let first = tokio::time::timeout(Duration::from_secs(10), chunks.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(first.bytes, "one\n");
        drop(chunks);
        std::fs::write(&go, "").unwrap();
        assert_eq!(process.all(first.next).await, ("two\n".to_owned(), String::new()));
    }
}

#[tokio::test]
async fn signals_reach_the_command_itself() {
    for shell in SHELLS {
        let process = Process::new(shell);
        process.start(&sh("trap 'echo caught; exit 9' TERM; while :; do sleep 0.05; done")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(process.signal(Signal::Term).await, ExitStatus::Code(0));
        assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(9));
        assert_eq!(process.all(Offset::default()).await.0, "caught\n");
        assert_eq!(process.signal(Signal::Kill).await, ExitStatus::Code(0), "an ended process is no error");

        let interrupted = Process::new(shell);
        interrupted.start(&MainCommand { command: vec!["sleep".to_owned(), "60".to_owned()], ..sh("") }).await.unwrap();
        assert_eq!(interrupted.signal(Signal::Int).await, ExitStatus::Code(0));
        assert_eq!(interrupted.wait().await.unwrap(), ExitStatus::Code(130), "INT must not be ignored");
    }
}

#[tokio::test]
async fn a_killed_supervisor_is_told_from_an_exit() {
    for shell in SHELLS {
        let process = Process::new(shell);
        process.start(&sh("sleep 60")).await.unwrap();
        let script = format!(
            "{FIND}while [ ! -s \"$m/pid\" ]; do :; done; p=$(cat \"$m/pid\"); \
             kill -9 \"$(cut -d' ' -f4 /proc/$p/stat)\" \"$p\""
        );
        process.host.open(&script, &[&process.name], false).await.unwrap().output().await.unwrap();
        let error = process.wait().await.unwrap_err();
        assert!(matches!(&error, GuestError::MainLost { why, .. } if why.contains("killed")), "{error}");
    }
}

/// Kills every `cat` that reads from the main process's `live`.
async fn kill_watchers(process: &Process) {
    let script = format!(
        "{FIND}for p in /proc/[0-9]*; do [ \"$(readlink $p/fd/0)\" = \"$m/live\" ] && kill -9 \"${{p#/proc/}}\"; done; :"
    );
    process.host.open(&script, &[&process.name], false).await.unwrap().output().await.unwrap();
}

#[tokio::test]
async fn a_killed_watcher_is_no_end() {
    for shell in SHELLS {
        let process = Process::new(shell);
        process.start(&sh("echo one; sleep 3; echo two; exit 4")).await.unwrap();
        let all = process.all(Offset::default());
        let killed = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            kill_watchers(&process).await;
        };
        let (waited, (out, _), ()) = tokio::join!(process.wait(), all, killed);
        assert!(matches!(waited, Err(GuestError::Lost { .. })), "{waited:?}");
        assert_eq!(out, "one\ntwo\n", "whoever reads goes on");
        assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(4));
    }
}

#[tokio::test]
async fn what_was_never_started_is_said_to_be_so() {
    for shell in SHELLS {
        let process = Process::new(shell);
        assert!(matches!(process.wait().await, Err(GuestError::MainLost { .. })));
        let first = process.follow(Offset::default()).next().await;
        assert!(matches!(first, Some(Err(GuestError::MainLost { .. }))), "{first:?}");
    }
    assert!(check_name("../x").is_err() && check_name("").is_err() && check_name("main").is_ok());
}

#[tokio::test]
async fn much_output_arrives_whole() {
    for shell in SHELLS {
        let process = Process::new(shell);
        process.start(&sh("i=0; while [ $i -lt 20000 ]; do echo \"line $i\"; i=$((i+1)); done")).await.unwrap();
        let (out, _) = process.all(Offset::default()).await;
        let wanted = (0..20000).map(|i| format!("line {i}\n")).collect::<Vec<_>>().concat();
        assert!(out == wanted, "{} of {} bytes", out.len(), wanted.len());
    }
}

#[tokio::test]
async fn input_arrives_from_many_and_ends_with_the_last() {
    for shell in SHELLS {
        let process = Process::new(shell);
        let command = MainCommand { stdin: true, ..sh("while read -r word; do echo \"got $word\"; done; echo end") };
        assert_eq!(process.start(&command).await.unwrap(), Started::Now);
        assert_eq!(process.input("one\n", false).await, ExitStatus::Code(0));
        assert_eq!(process.input("two\nthree\n", false).await, ExitStatus::Code(0));
        let running = tokio::time::timeout(Duration::from_millis(300), process.wait());
        assert!(running.await.is_err(), "{shell:?}: it ended with an input that wasn't the last");
        assert_eq!(process.input("four\n", true).await, ExitStatus::Code(0));
        assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(0), "{shell:?}");
        assert_eq!(process.all(Offset::default()).await.0, "got one\ngot two\ngot three\ngot four\nend\n", "{shell:?}");
        assert_eq!(process.input("five\n", false).await, ExitStatus::Code(66), "{shell:?}: nobody reads it");
    }
}

#[tokio::test]
async fn a_process_with_an_input_leaves_nobody_behind() {
    for shell in SHELLS {
        let process = Process::new(shell);
        let command = MainCommand { stdin: true, ..sh("read -r word; exit 3") };
        process.start(&command).await.unwrap();
        assert_eq!(process.input("x\n", false).await, ExitStatus::Code(0));
        assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(3));
        let script = format!("{FIND}cat \"$m/holder\"");
        let holder = process.host.open(&script, &[&process.name], false).await.unwrap().output().await.unwrap().1;
        let holder = std::path::PathBuf::from(format!("/proc/{}", String::from_utf8(holder).unwrap().trim()));
        for _ in 0..100 {
            if !holder.exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!holder.exists(), "{shell:?}");
        // Without an input it reads the end at once.
        let process = Process::new(shell);
        process.start(&sh("cat; echo end")).await.unwrap();
        assert_eq!(process.all(Offset::default()).await.0, "end\n");
        assert_eq!(process.input("x\n", false).await, ExitStatus::Code(66));
    }
}
