//! `vmpod exec` and `vmpod cp`: commands in a running machine.

use anyhow::{Context as _, Result, bail};
use futures::SinkExt as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::Api;
use kube::api::{AttachParams, AttachedProcess};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use crate::args;
use crate::client;
use crate::home::Home;
use crate::report::{Exit, Remedy};
use crate::terminal;

/// `vmpod exec`.
pub(crate) async fn exec(home: &Home, args: args::Exec) -> Result<Exit> {
    let api: Api<Pod> = Api::namespaced(client::connect(home).await?, &args.namespace.namespace);
    client::pod(&api, &args.pod).await?;
    let streams = Streams { stdin: args.stdin, tty: args.tty };
    run(&api, &args.pod, args.container, args.command, streams).await
}

/// What of this process's own a command gets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    /// Standard input.
    pub(crate) stdin: bool,
    /// The terminal.
    pub(crate) tty: bool,
}

/// Runs a command in a pod's guest over this process's own streams; its exit code is the result.
pub(crate) async fn run(
    api: &Api<Pod>,
    pod: &str,
    container: Option<String>,
    command: Vec<String>,
    streams: Streams,
) -> Result<Exit> {
    if streams.tty && streams.stdin && !terminal::is_typed() {
        return Err(Remedy::new("-t was given, but standard input is not a terminal", "leave -t out").into());
    }
    let params = AttachParams {
        container,
        stdin: streams.stdin,
        stdout: true,
        // A terminal has one output.
        stderr: !streams.tty,
        tty: streams.tty,
        ..buffers()
    };
    let mut process = start(api, pod, command, &params).await?;
    let raw = if streams.tty && streams.stdin { Some(terminal::Raw::enter()?) } else { None };
    let resizing = streams.tty.then(|| resize(&mut process)).transpose()?.map(tokio::spawn);
    let typing = process.stdin().map(|to| tokio::spawn(feed(tokio::io::stdin(), to)));
    let stdout = process.stdout().map(|from| tokio::spawn(drain(from, tokio::io::stdout())));
    let stderr = process.stderr().map(|from| tokio::spawn(drain(from, tokio::io::stderr())));

    let ended = ended(process, pod, [stdout, stderr]).await;
    for task in [typing.map(|t| t.abort_handle()), resizing.map(|t| t.abort_handle())].into_iter().flatten() {
        task.abort();
    }
    drop(raw);
    ended
}

/// Runs a command in a pod's guest on some input; what it says goes to this process's own streams.
pub(crate) async fn on_input(api: &Api<Pod>, pod: &str, command: Vec<String>, input: Vec<u8>) -> Result<Exit> {
    let params = AttachParams { stdin: true, stdout: true, stderr: true, ..buffers() };
    let mut process = start(api, pod, command, &params).await?;
    let feeding = process.stdin().map(|to| tokio::spawn(feed(std::io::Cursor::new(input), to)));
    let stdout = process.stdout().map(|from| tokio::spawn(drain(from, tokio::io::stdout())));
    let stderr = process.stderr().map(|from| tokio::spawn(drain(from, tokio::io::stderr())));
    let ended = ended(process, pod, [stdout, stderr]).await;
    if let Some(feeding) = feeding {
        feeding.abort();
    }
    ended
}

/// Waits until a command has ended and its output was passed on.
async fn ended(mut process: AttachedProcess, pod: &str, outputs: [Option<JoinHandle<Result<()>>>; 2]) -> Result<Exit> {
    let status = process.take_status().context("the exec has no status")?.await;
    for output in outputs.into_iter().flatten() {
        output.await.context("copying the output panicked")??;
    }
    match status {
        Some(status) => exit_of(&status, pod),
        // The connection ended without a word about the command.
        None => match process.join().await {
            Err(error) => Err(error).with_context(|| format!("the connection to pod {pod} broke")),
            Ok(()) => bail!("the connection to pod {pod} ended before the command did"),
        },
    }
}

fn buffers() -> AttachParams {
    AttachParams::default().max_stdin_buf_size(64 << 10).max_stdout_buf_size(64 << 10).max_stderr_buf_size(64 << 10)
}

async fn start(api: &Api<Pod>, pod: &str, command: Vec<String>, params: &AttachParams) -> Result<AttachedProcess> {
    let words = command.join(" ");
    api.exec(pod, command, params).await.with_context(|| format!("can't run `{words}` in pod {pod}"))
}

/// The exit that the API's last word on a command stands for.
fn exit_of(status: &Status, pod: &str) -> Result<Exit> {
    if status.status.as_deref() == Some("Success") {
        return Ok(Exit::Done);
    }
    let message = status.message.clone().unwrap_or_default();
    if status.reason.as_deref() == Some("NonZeroExitCode") {
        let causes = status.details.as_ref().and_then(|d| d.causes.as_deref()).unwrap_or_default();
        let code = causes.iter().find(|c| c.reason.as_deref() == Some("ExitCode")).and_then(|c| c.message.as_deref());
        if let Some(code) = code.and_then(|code| code.parse::<i32>().ok()) {
            return Ok(Exit::Command(low_byte(code)));
        }
    }
    bail!("the command in pod {pod} has no exit code: {message}")
}

/// An exit code as this system can pass it on.
pub(crate) fn low_byte(code: i32) -> u8 {
    u8::try_from(code & 0xff).unwrap_or(u8::MAX)
}

/// Sends the terminal's size, now and whenever it changes.
fn resize(process: &mut AttachedProcess) -> Result<impl Future<Output = ()> + use<>> {
    let mut sizes = process.terminal_size().context("the exec has no terminal")?;
    let mut changed = signal(SignalKind::window_change()).context("can't listen for changes of the terminal")?;
    Ok(async move {
        loop {
            if let Some(size) = terminal::size()
                && sizes.send(size).await.is_err()
            {
                return;
            }
            if changed.recv().await.is_none() {
                return;
            }
        }
    })
}

/// Copies input to a command until either has enough; the command sees the end.
async fn feed(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    // A command that stops reading is no failure of ours; its exit code tells.
    if let Err(error) = tokio::io::copy(&mut from, &mut to).await {
        tracing::debug!(%error, "standard input was not read to its end");
    }
    if let Err(error) = to.shutdown().await {
        tracing::debug!(%error, "the end of standard input could not be passed on");
    }
}

/// Copies output to its end. A reader that went away is no failure.
async fn drain(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut gone = false;
    loop {
        let n = from.read(&mut buffer).await.context("can't read the command's output")?;
        if n == 0 {
            return Ok(());
        }
        if gone {
            continue;
        }
        let written = async {
            to.write_all(&buffer[..n]).await?;
            to.flush().await
        };
        match written.await {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => gone = true,
            other => other.context("can't pass the command's output on")?,
        }
    }
}

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Local(String),
    Remote { pod: String, path: String },
}

impl End {
    /// `POD:PATH` is in a machine; a path with a slash before the colon, or without one, is here.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((pod, path)) if !pod.is_empty() && !pod.contains('/') && !path.is_empty() => {
                Self::Remote { pod: pod.into(), path: path.into() }
            }
            _ => Self::Local(text.into()),
        }
    }
}

/// Puts standard input where `$1` says, in place of what is there, or into it if it is a directory (as `$2`). Fewer bytes than `$3`
/// are the beginning of a file whose rest didn't come.
const RECEIVE: &str = r#"set -e; to=$1; if [ -d "$to" ]; then to=$to/$2; fi; part=$to.vmpod-part; cat > "$part"
if [ "$(wc -c < "$part")" -lt "$3" ]; then rm -f "$part"; echo "the file did not come whole" >&2; exit 1; fi
mv -f "$part" "$to""#;

/// `vmpod cp`.
pub(crate) async fn copy(home: &Home, args: args::Cp) -> Result<Exit> {
    let (pod, sends) = match (End::parse(&args.from), End::parse(&args.to)) {
        (End::Local(_), End::Remote { pod, .. }) => (pod, true),
        (End::Remote { pod, .. }, End::Local(_)) => (pod, false),
        _ => {
            return Err(Remedy::new(
                "one end of a copy must be in a machine, the other here",
                "write `vmpod cp FILE POD:PATH` or `vmpod cp POD:PATH FILE`",
            )
            .into());
        }
    };
    let api: Api<Pod> = Api::namespaced(client::connect(home).await?, &args.namespace.namespace);
    client::pod(&api, &pod).await?;
    match (sends, End::parse(&args.from), End::parse(&args.to)) {
        (true, End::Local(from), End::Remote { path, .. }) => upload(&api, &pod, &from, &path).await,
        (_, End::Remote { path, .. }, End::Local(to)) => download(&api, &pod, &path, &to).await,
        _ => bail!("can't copy {} to {}", args.from, args.to),
    }?;
    Ok(Exit::Done)
}

async fn upload(api: &Api<Pod>, pod: &str, from: &str, to: &str) -> Result<()> {
    let name = std::path::Path::new(from).file_name().map_or("stdin".into(), |n| n.to_string_lossy().into_owned());
    let params = AttachParams { stdin: true, stdout: false, stderr: true, ..buffers() };
    let mut size = 0;
    let source: Box<dyn AsyncRead + Unpin + Send> = if from == "-" {
        Box::new(tokio::io::stdin())
    } else {
        let file = tokio::fs::File::open(from).await.with_context(|| format!("can't open {from}"))?;
        let metadata = file.metadata().await.with_context(|| format!("can't look at {from}"))?;
        if metadata.is_file() {
            size = metadata.len();
        }
        if metadata.is_dir() {
            return Err(Remedy::new(
                format!("{from} is a directory, and only files can be copied"),
                format!("pack it: `tar c {from} | vmpod exec -i {pod} -- tar x`"),
            )
            .into());
        }
        Box::new(file)
    };
    let name = if from == "-" { "stdin" } else { &name };
    let command = ["sh", "-c", RECEIVE, "vmpod", to, name, &size.to_string()].map(str::to_owned);
    let mut process = start(api, pod, command.to_vec(), &params).await?;
    let mut to_guest = process.stdin().context("the exec has no input")?;
    let fed = tokio::select! {
        // The guest's end of it tells more than a pipe that broke.
        biased;
        result = finish(&mut process, pod, to, None) => return result,
        error = unreadable(source, &mut to_guest) => error,
    };
    // Before the input's end can reach the guest, which would take it for the file's.
    process.abort();
    Err(fed).with_context(|| format!("can't read {from}"))
}

/// Copies a file to a command, which sees its end, and never returns unless the file can't be read: then the command sees no end.
async fn unreadable(mut from: impl AsyncRead + Unpin, to: &mut (impl AsyncWrite + Unpin)) -> std::io::Error {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = match from.read(&mut buffer).await {
            Ok(n) => n,
            Err(error) => return error,
        };
        let passed = if n == 0 { to.shutdown().await } else { to.write_all(&buffer[..n]).await };
        if let Err(error) = &passed {
            tracing::debug!(%error, "the command reads no more");
        }
        if n == 0 || passed.is_err() {
            return std::future::pending().await;
        }
    }
}

async fn download(api: &Api<Pod>, pod: &str, from: &str, to: &str) -> Result<()> {
    let command = ["cat", "--", from].map(str::to_owned).to_vec();
    let params = AttachParams { stdin: false, stdout: true, stderr: true, ..buffers() };
    let mut process = start(api, pod, command, &params).await?;
    if to == "-" {
        return finish(&mut process, pod, from, Some(Box::new(tokio::io::stdout()))).await;
    }
    let mut target = std::path::PathBuf::from(to);
    if target.is_dir() {
        let name = std::path::Path::new(from).file_name().with_context(|| format!("{from} names no file"))?;
        target.push(name);
    }
    let dir = match target.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => ".".into(),
    };
    // Whole or not at all: a copy that breaks off leaves what was there.
    let part = tempfile::Builder::new()
        .prefix(".vmpod-")
        .tempfile_in(&dir)
        .with_context(|| format!("can't write in {}", dir.display()))?;
    let file = part.reopen().with_context(|| format!("can't write in {}", dir.display()))?;
    finish(&mut process, pod, from, Some(Box::new(tokio::fs::File::from_std(file)))).await?;
    part.persist(&target).with_context(|| format!("can't write {}", target.display()))?;
    Ok(())
}

/// Waits for a copying command and turns what it complains of into an error.
async fn finish(
    process: &mut AttachedProcess,
    pod: &str,
    path: &str,
    output: Option<Box<dyn AsyncWrite + Unpin + Send>>,
) -> Result<()> {
    let complaints = process.stderr().map(|mut from| {
        tokio::spawn(async move {
            let mut text = Vec::new();
            if let Err(error) = from.read_to_end(&mut text).await {
                tracing::debug!(%error, "the command's errors were not read to their end");
            }
            String::from_utf8_lossy(&text).trim().to_owned()
        })
    });
    let copying = process.stdout().zip(output).map(|(from, to)| tokio::spawn(drain(from, to)));
    let status = process.take_status().context("the exec has no status")?.await;
    if let Some(copying) = copying {
        copying.await.context("copying panicked")??;
    }
    let complaints = match complaints {
        Some(task) => task.await.unwrap_or_default(),
        None => String::new(),
    };
    let status = status.with_context(|| format!("the connection to pod {pod} broke"))?;
    match exit_of(&status, pod)? {
        Exit::Done => Ok(()),
        _ => bail!("can't copy {path} of pod {pod}: {complaints}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(value: serde_json::Value) -> Status {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_exit_code_is_in_the_causes() {
        let ended = status(json!({"status": "Failure", "reason": "NonZeroExitCode", "message": "exit 3",
            "details": {"causes": [{"reason": "ExitCode", "message": "3"}]}}));
        assert_eq!(exit_of(&ended, "p").unwrap(), Exit::Command(3));
        assert_eq!(exit_of(&status(json!({"status": "Success"})), "p").unwrap(), Exit::Done);
        let broken = status(json!({"status": "Failure", "reason": "InternalError", "message": "no guest"}));
        assert!(exit_of(&broken, "p").unwrap_err().to_string().contains("no guest"));
    }

    #[tokio::test]
    async fn a_file_that_can_not_be_read_has_no_end() {
        struct Broken;
        impl AsyncRead for Broken {
            fn poll_read(
                self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                _: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                std::task::Poll::Ready(Err(std::io::Error::other("bad sector")))
            }
        }
        let (mut ours, mut theirs) = tokio::io::duplex(64);
        let error = unreadable((&b"begin"[..]).chain(Broken), &mut ours).await;
        assert_eq!(error.to_string(), "bad sector");
        let mut came = [0; 5];
        theirs.read_exact(&mut came).await.unwrap();
        let end = tokio::time::timeout(std::time::Duration::from_millis(50), theirs.read(&mut came)).await;
        assert!(end.is_err(), "the command must not see an end");
    }

    #[test]
    fn what_did_not_come_whole_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("file");
        let receive = |size: &str| {
            let input = dir.path().join("input");
            std::fs::write(&input, "12345").unwrap();
            let words = ["-c", RECEIVE, "vmpod", to.to_str().unwrap(), "name", size];
            let stdin = std::fs::File::open(input).unwrap();
            std::process::Command::new("sh").args(words).stdin(stdin).output().unwrap().status.success()
        };
        assert!(!receive("6"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing but the input is there");
        assert!(receive("5") && receive("0"));
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "12345");
    }

    #[test]
    fn a_colon_makes_a_machine_unless_a_slash_comes_first() {
        assert_eq!(End::parse("p:/etc/motd"), End::Remote { pod: "p".into(), path: "/etc/motd".into() });
        for local in ["./a:b", "/x/a:b", "file", ":x", "p:"] {
            assert_eq!(End::parse(local), End::Local(local.into()));
        }
    }
}
