//! One command on one SSH channel.

use bytes::Bytes;
use russh::client::Msg;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::{Exec, ExecCarrier, ExecControl, ExecSession, ExitStatus, GuestError, Request, Signal, shell};

/// How much may wait in each stream between the guest and whoever reads here.
const BUFFER: usize = 128 << 10;

/// A command in the form in which it travels.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Prepared {
    /// For the login shell.
    pub(super) line: String,
    /// Comes before the user's own input.
    pub(super) input: Vec<u8>,
}

/// Turns a command into a line for the guest's login shell, which may be any that knows `exec` and single quotes.
///
/// The environment doesn't go on the line, where every user of the guest could read it in the process list: it is the
/// first line of the input, and the shell reads it from there. POSIX shells read no byte more than the line.
pub(super) fn prepare(exec: &Exec) -> Result<Prepared, GuestError> {
    check(exec)?;
    if exec.env.is_empty() && exec.workdir.is_none() {
        return Ok(Prepared { line: format!("exec {}", shell::join(&exec.command)), input: Vec::new() });
    }
    let mut input = String::new();
    let mut script = String::new();
    if !exec.env.is_empty() {
        input = exports(&exec.env, true)? + "\n";
        script.push_str("vmpod_nl='\n'; IFS= read -r vmpod_env && eval \"$vmpod_env\"; unset vmpod_env vmpod_nl; ");
    }
    script.push_str(&rest(exec));
    Ok(Prepared { line: in_sh(&script), input: input.into_bytes() })
}

/// Refuses what no guest can run.
pub(super) fn check(exec: &Exec) -> Result<(), GuestError> {
    if exec.command.is_empty() {
        return Err(GuestError::Invalid("there is no command to run".to_owned()));
    }
    let texts = exec.command.iter().chain(exec.workdir.iter()).chain(exec.env.iter().flat_map(|(k, v)| [k, v]));
    if texts.into_iter().any(|text| text.contains('\0')) {
        return Err(GuestError::Invalid("a command, its directory and its environment can't hold NUL".to_owned()));
    }
    Ok(())
}

/// The same, with the environment in a file of the guest.
pub(super) fn line_with_file(exec: &Exec, file: &str) -> String {
    let file = shell::quote(file);
    let rest = rest(exec);
    in_sh(&format!(
        "vmpod_nl='\n'; IFS= read -r vmpod_env <{file} && eval \"$vmpod_env\"; rm -f {file}; unset vmpod_env vmpod_nl; {rest}"
    ))
}

fn in_sh(script: &str) -> String {
    format!("exec sh -c {}", shell::quote(script))
}

fn rest(exec: &Exec) -> String {
    let cd = exec.workdir.as_ref().map(|workdir| change_directory(workdir) + "; ").unwrap_or_default();
    format!("{cd}exec {}", shell::join(&exec.command))
}

/// Shell text that changes to a directory, or ends. `cd` must not take it for an option or look for it elsewhere.
pub(super) fn change_directory(path: &str) -> String {
    let path = if path.starts_with('/') { path.to_owned() } else { format!("./{path}") };
    format!("cd {} || exit 126", shell::quote(&path))
}

/// Shell text that exports an environment; on one line when asked, with `$vmpod_nl` for newlines.
pub(super) fn exports(env: &[(String, String)], one_line: bool) -> Result<String, GuestError> {
    let mut parts = vec![":".to_owned()];
    for (name, value) in env {
        let mut bytes = name.bytes();
        let letter = |b: u8| b.is_ascii_alphabetic() || b == b'_';
        let valid = bytes.next().is_some_and(letter) && bytes.all(|b| letter(b) || b.is_ascii_digit());
        if !valid {
            return Err(GuestError::Invalid(format!(
                "\"{name}\" can't name an environment variable in a guest: use letters, digits and '_', no digit first"
            )));
        }
        let mut value = shell::quote(value);
        if one_line {
            value = value.replace('\n', "'\"$vmpod_nl\"'");
        }
        parts.push(format!("export {name}={value}"));
    }
    Ok(parts.join("; "))
}

/// Begins to carry a command whose `exec` request was sent.
pub(super) fn start(
    channel: Channel<Msg>,
    before: Vec<u8>,
    stdin: bool,
    tty: bool,
    control: ExecControl,
    carrier: ExecCarrier,
) -> ExecSession {
    let (read, write) = channel.split();
    let (ours, theirs) = tokio::io::duplex(BUFFER);
    let (stdout, stdout_theirs) = tokio::io::duplex(BUFFER);
    let (stderr, stderr_theirs) = tokio::io::duplex(BUFFER);
    tokio::spawn(carry(read, write, before, stdin.then_some(theirs), tty, stdout_theirs, stderr_theirs, carrier));
    ExecSession {
        stdin: stdin.then(|| Box::new(ours) as _),
        stdout: Box::new(stdout),
        stderr: Box::new(stderr),
        control,
    }
}

#[expect(clippy::too_many_arguments, reason = "the ends of one command; a struct would only name them twice")]
async fn carry(
    mut read: ChannelReadHalf,
    write: ChannelWriteHalf<Msg>,
    before: Vec<u8>,
    stdin: Option<DuplexStream>,
    tty: bool,
    mut stdout: DuplexStream,
    mut stderr: DuplexStream,
    mut carrier: ExecCarrier,
) {
    let mut writer = write.make_writer();
    let feed = async {
        let mut fed = before.is_empty() || writer.write_all(&before).await.is_ok();
        if let Some(mut stdin) = stdin {
            let mut buffer = vec![0; 32 << 10];
            while fed {
                match stdin.read(&mut buffer).await {
                    Ok(length @ 1..) => fed = writer.write_all(&buffer[..length]).await.is_ok(),
                    Ok(0) | Err(_) => break,
                }
            }
        }
        drop(writer);
        write.eof().await.ok();
        // Nothing more to feed; the other branches decide when it is over.
        std::future::pending::<()>().await;
    };
    let requests = async {
        while let Some(request) = carrier.requests.recv().await {
            match request {
                Request::Resize(size) => write.window_change(size.cols.into(), size.rows.into(), 0, 0).await.ok(),
                Request::Signal(signal) => write.signal(sig(&signal)).await.ok(),
            };
        }
        // Nobody holds the command any more. One with a terminal ends with its terminal, as when a window is closed.
        if tty {
            write.close().await.ok();
        }
        std::future::pending::<()>().await;
    };
    let output = async {
        let mut status = None;
        let mut refused = false;
        while let Some(message) = read.wait().await {
            match message {
                // A reader that went away is no reason to stop the command.
                ChannelMsg::Data { data } => give(&mut stdout, data).await,
                ChannelMsg::ExtendedData { data, ext: 1 } => give(&mut stderr, data).await,
                ChannelMsg::ExitStatus { exit_status } => {
                    status = Some(ExitStatus::Code(i32::try_from(exit_status).unwrap_or(-1)));
                }
                ChannelMsg::ExitSignal { signal_name, .. } => status = Some(ExitStatus::Signal(signal(&signal_name))),
                ChannelMsg::Failure => refused = true,
                ChannelMsg::Close => break,
                _ => {}
            }
        }
        (status, refused)
    };
    let (status, refused) = tokio::select! {
        end = output => end,
        () = async { tokio::join!(feed, requests); } => (None, false),
    };
    // Readers see the end of the output before anybody sees the exit.
    drop((stdout, stderr));
    carrier.finish(match status {
        Some(status) => Ok(status),
        None if refused => Err("the guest's SSH server refused to run the command".to_owned()),
        None => Err("the connection ended before the command did".to_owned()),
    });
    write.close().await.ok();
}

async fn give(to: &mut DuplexStream, data: Bytes) {
    to.write_all(&data).await.ok();
}

fn signal(sig: &Sig) -> Signal {
    match sig {
        Sig::ABRT => Signal::Abrt,
        Sig::ALRM => Signal::Alrm,
        Sig::FPE => Signal::Fpe,
        Sig::HUP => Signal::Hup,
        Sig::ILL => Signal::Ill,
        Sig::INT => Signal::Int,
        Sig::KILL => Signal::Kill,
        Sig::PIPE => Signal::Pipe,
        Sig::QUIT => Signal::Quit,
        Sig::SEGV => Signal::Segv,
        Sig::TERM => Signal::Term,
        Sig::USR1 => Signal::Usr1,
        Sig::Custom(name) => Signal::from_name(name),
    }
}

fn sig(signal: &Signal) -> Sig {
    match signal {
        Signal::Abrt => Sig::ABRT,
        Signal::Alrm => Sig::ALRM,
        Signal::Fpe => Sig::FPE,
        Signal::Hup => Sig::HUP,
        Signal::Ill => Sig::ILL,
        Signal::Int => Sig::INT,
        Signal::Kill => Sig::KILL,
        Signal::Pipe => Sig::PIPE,
        Signal::Quit => Sig::QUIT,
        Signal::Segv => Sig::SEGV,
        Signal::Term => Sig::TERM,
        Signal::Usr1 => Sig::USR1,
        Signal::Usr2 | Signal::Other(_) => Sig::Custom(signal.name().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    /// Runs a prepared command as an SSH server would, in a login shell.
    fn run(shell: &[&str], prepared: &Prepared, input: &[u8]) -> Vec<u8> {
        let mut child = Command::new(shell[0])
            .args(&shell[1..])
            .args(["-c", &prepared.line])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(&prepared.input).unwrap();
        stdin.write_all(input).unwrap();
        drop(stdin);
        child.wait_with_output().unwrap().stdout
    }

    const SHELLS: [&[&str]; 2] = [&["dash"], &["busybox", "ash"]];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn environment_and_input_arrive_as_they_are(value in "[^\0]{0,40}", input in "[^\0]{0,40}") {
            let exec = Exec {
                env: vec![("A".to_owned(), value.clone()), ("B_2".to_owned(), "b".to_owned())],
                workdir: Some("/tmp".to_owned()),
                ..Exec::new(["sh", "-c", "printf '%s|%s|%s|' \"$A\" \"$B_2\" \"$PWD\"; cat"])
            };
            let prepared = prepare(&exec).unwrap();
            prop_assert!(!prepared.line.contains("export A"));
            for shell in SHELLS {
                let output = String::from_utf8(run(shell, &prepared, input.as_bytes())).unwrap();
                prop_assert_eq!(&output, &format!("{value}|b|/tmp|{input}"));
            }
        }
    }

    #[test]
    fn an_environment_in_a_file_is_read_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        let exec =
            Exec { env: vec![("A".to_owned(), "x\ny'z".to_owned())], ..Exec::new(["sh", "-c", "printf '%s' \"$A\""]) };
        std::fs::write(&file, prepare(&exec).unwrap().input).unwrap();
        let line = line_with_file(&exec, file.to_str().unwrap());
        let output = run(&["dash"], &Prepared { line, input: Vec::new() }, b"");
        assert_eq!(output, b"x\ny'z");
        assert!(!file.exists());
    }

    #[test]
    fn a_plain_command_stays_plain() {
        let prepared = prepare(&Exec::new(["echo", "a b"])).unwrap();
        assert_eq!(prepared, Prepared { line: "exec echo 'a b'".to_owned(), input: Vec::new() });
    }

    #[test]
    fn what_no_guest_can_take_is_refused() {
        assert!(prepare(&Exec::new(Vec::<String>::new())).is_err());
        assert!(prepare(&Exec::new(["a\0b"])).is_err());
        let odd = Exec { env: vec![("a b".to_owned(), String::new())], ..Exec::new(["true"]) };
        insta::assert_snapshot!(
            prepare(&odd).unwrap_err(),
            @r#""a b" can't name an environment variable in a guest: use letters, digits and '_', no digit first"#
        );
    }
}
