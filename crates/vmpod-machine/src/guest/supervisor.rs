//! The main process's supervisor: a few lines of POSIX shell in the guest.
//!
//! For main process NAME there is a directory `/run/vmpod/NAME@BOOT` (for a login user other than root, in `/tmp`), BOOT
//! being the guest's boot id, so that a reboot can't be mistaken for the same life:
//!
//! | file | what |
//! |---|---|
//! | `run` | the command with its environment, 0600 |
//! | `out`, `err` | all it ever printed |
//! | `pid` | its process number |
//! | `exit` | its exit code, renamed into place |
//! | `live` | a pipe held open by the supervisor for as long as it lives |
//! | `in` | the process's input, when it has one: a pipe held open by the process in `holder`, so that it ends with that |
//!
//! *Started at most once*: the directory is made by `mkdir`, which succeeds for one caller only, and only after the whole
//! command has arrived. *Nobody polls for the end*: who waits reads from `live`, and the kernel ends that read when the
//! supervisor is gone, whether it finished or was killed. *Output without loss*: the process writes into files, never into
//! a pipe that a dead agent doesn't empty.

use std::collections::VecDeque;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::io::AsyncReadExt;

use super::main_process::{MainCommand, Offset, OutputChunk, Started, StdStream};
use super::{BoxRead, BoxWrite, ExecSession, ExitStatus, GuestError, carry, shell};

/// How long until a script that was lost in the guest, and not with the connection, is run again.
pub(super) const AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// Finds the directory `$m` of the main process `$1`, for this boot.
const FIND: &str = r#"
name=$1
user=$(id -u)
if [ "$user" = 0 ] && [ -w /run ]; then base=/run/vmpod
elif [ "$user" = 0 ] && [ -w /var/run ]; then base=/var/run/vmpod
else base=/tmp/vmpod-$user
fi
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || sysctl -n kern.bootsessionuuid 2>/dev/null || echo boot)
m=$base/$name@$boot
"#;

/// Starts it. Standard input is the `run` file, whose last line proves that it is whole.
const START: &str = r#"
mask=$(umask)
umask 077
mkdir "$base" 2>/dev/null
if [ -L "$base" ] || ! [ -O "$base" ]; then echo "$base belongs to somebody else" >&2; exit 1; fi
new=$base/.$name.$$
rm -rf "$new"
mkdir "$new" && cat >"$new/run" || exit 1
if [ "$(tail -n 1 "$new/run")" != '# whole' ]; then rm -rf "$new"; echo 'the command was cut short' >&2; exit 1; fi
: >"$new/out"
: >"$new/err"
printf '%s' "$supervise" >"$new/supervise"
mkfifo "$new/live" || exit 1
[ "$(tail -n 2 "$new/run")" != '# input
# whole' ] || mkfifo "$new/in" || exit 1
if ! mkdir "$m" 2>/dev/null; then
  rm -rf "$new"
  [ -d "$m" ] || { echo "can not make $m" >&2; exit 1; }
  echo before
  exit 0
fi
mv "$new"/* "$m"/
rmdir "$new"
exec 9<>"$m/live"
# In a subshell: if nobody listens any more, only the subshell dies of it.
(echo now)
# A shell's own "&" would make the command deaf to INT and QUIT. setsid forks by itself where it must.
if command -v setsid >/dev/null 2>&1; then exec setsid sh "$m/supervise" "$m" "$mask" </dev/null >/dev/null 2>&1; fi
nohup sh "$m/supervise" "$m" "$mask" </dev/null >/dev/null 2>&1 &
"#;

/// The supervisor itself: `$1` is the directory, `$2` the umask; descriptor 9 is `live`.
const SUPERVISE: &str = r#"umask "$2"
input=/dev/null
if [ -p "$1/in" ]; then
  input=$1/in
  # Who opens it to read waits for this; so its number is there before the command runs, and can end.
  sh -c 'echo "$$" >"$1/holder"; exec 8<>"$1/in"; exec sleep 2147483647' hold "$1" </dev/null >/dev/null 2>&1 9>&- &
fi
sh "$1/run" "$1" <"$input" >>"$1/out" 2>>"$1/err" 9>&-
code=$?
[ ! -e "$1/holder" ] || kill "$(cat "$1/holder")" 2>/dev/null
umask 077
echo "$code" >"$1/exit.new" && mv "$1/exit.new" "$1/exit"
"#;

/// Blocks until the supervisor is gone. Opened for both first, because opening to read would wait for a writer.
const UNTIL_GONE: &str = r#"
[ -p "$m/live" ] || { echo 'it was not started since the guest booted' >&2; exit 66; }
exec 8<>"$m/live"
exec 7<"$m/live"
exec 8>&-
cat <&7 >/dev/null || exit 1
"#;

/// Waits and prints the exit code. Only 66 and 67 say that it can't be known any more; with anything else, it is the one
/// who waits that was lost (killed for want of memory, say), and somebody else has to.
const EXIT: &str = r#"
[ -e "$m/exit" ] || { echo 'its supervisor was killed' >&2; exit 67; }
cat "$m/exit"
"#;

/// Prints both outputs from `$2` and `$3` bytes on as they grow, until the supervisor is gone or our input ends. Nothing
/// but the outputs may come out, or offsets would count what a shell or `tail` had to say.
const FOLLOW: &str = r#"
exec 3<&0 4>&2 2>/dev/null
[ -p "$m/live" ] || exit 66
tail -c "+$(($2 + 1))" -f "$m/out" 3<&- 4>&- & a=$!
tail -c "+$(($3 + 1))" -f "$m/err" >&4 3<&- 4>&- & b=$!
exec 4>&-
exec 8<>"$m/live"
exec 7<"$m/live"
exec 8>&-
cat <&7 >/dev/null 3<&- & c=$!
( cat <&3 >/dev/null; kill "$a" "$b" "$c" ) >/dev/null 7<&- & d=$!
exec 3<&-
wait "$c"; code=$?
kill "$a" "$b" "$d"
wait "$a" "$b"
exit "$code"
"#;

/// Prints what is there beyond `$2` and `$3` bytes.
const DRAIN: &str = r#"
exec 4>&2 2>/dev/null
[ -d "$m" ] || exit 66
tail -c "+$(($2 + 1))" "$m/out"
tail -c "+$(($3 + 1))" "$m/err" >&4
exit 0
"#;

/// Sends the signal `$2`, unless the process has ended.
const SIGNAL: &str = r#"
[ -d "$m" ] || { echo 'it was not started since the guest booted' >&2; exit 66; }
n=0
while [ ! -s "$m/pid" ] && [ ! -e "$m/exit" ] && [ "$n" -lt 10 ]; do sleep 1; n=$((n + 1)); done
[ -e "$m/exit" ] && exit 0
kill -s "$2" "$(cat "$m/pid")" 2>/dev/null || [ -e "$m/exit" ] || ! kill -s 0 "$(cat "$m/pid")" 2>/dev/null
"#;

/// Passes its own input on to the process; with `$2` = last, there is none after it. Opened to write alone, which waits until the holder
/// has it open: what was written before that would be lost.
const INPUT: &str = r#"
[ -p "$m/in" ] && [ ! -e "$m/exit" ] || { echo 'it reads no input' >&2; exit 66; }
exec 8>"$m/in"
cat >&8
exec 8>&-
[ "$2" != last ] || { rm -f "$m/in"; kill "$(cat "$m/holder")" 2>/dev/null; }
exit 0
"#;

pub(super) fn input_script() -> String {
    format!("{FIND}{INPUT}")
}

pub(super) fn start_script() -> String {
    format!("{FIND}supervise={}\n{START}", shell::quote(SUPERVISE))
}

pub(super) fn wait_script() -> String {
    format!("{FIND}{UNTIL_GONE}{EXIT}")
}

pub(super) fn signal_script() -> String {
    format!("{FIND}{SIGNAL}")
}

/// The `run` file: becomes the command.
pub(super) fn run_file(command: &MainCommand) -> Result<String, GuestError> {
    if command.command.is_empty() {
        return Err(GuestError::Invalid("there is no command to run".to_owned()));
    }
    let cd = command.workdir.as_deref().map(carry::change_directory).unwrap_or_default();
    let text = format!(
        "echo \"$$\" >\"$1/pid\"\n{}\n{cd}\nexec {}\n{}# whole\n",
        carry::exports(&command.env, false)?,
        shell::join(&command.command),
        if command.stdin { "# input\n" } else { "" },
    );
    if text.contains('\0') {
        return Err(GuestError::Invalid("a command, its directory and its environment can't hold NUL".to_owned()));
    }
    Ok(text)
}

/// A name is part of a path in the guest.
pub(super) fn check_name(name: &str) -> Result<(), GuestError> {
    let ok = !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if ok { Ok(()) } else { Err(GuestError::Invalid(format!("\"{name}\" can't name a main process"))) }
}

/// Reads the answer of [`START`]. The channel isn't waited for: where the supervisor didn't have to fork, it *is* the
/// channel's process.
pub(super) async fn started(session: &mut ExecSession, name: &str) -> Result<Started, GuestError> {
    let mut answer = Vec::new();
    let mut buffer = [0; 64];
    while !answer.contains(&b'\n') {
        match session.stdout.read(&mut buffer).await {
            Ok(length @ 1..) => answer.extend_from_slice(&buffer[..length]),
            Ok(0) | Err(_) => break,
        }
    }
    match answer.as_slice() {
        b"now\n" => Ok(Started::Now),
        b"before\n" => Ok(Started::Before),
        _ => {
            let status = session.wait().await?;
            let mut stderr = String::new();
            session.stderr.read_to_string(&mut stderr).await.ok();
            let why = format!("{} (exit code {})", stderr.trim(), status.code());
            Err(GuestError::Refused { what: format!("to start main process {name}"), why })
        }
    }
}

/// The answer of [`wait_script`].
pub(super) fn exit_code(
    name: &str,
    status: &ExitStatus,
    stdout: &[u8],
    stderr: &[u8],
) -> Result<ExitStatus, GuestError> {
    let code = std::str::from_utf8(stdout).ok().and_then(|text| text.trim().parse().ok());
    match (status, code) {
        (ExitStatus::Code(0), Some(code)) => Ok(ExitStatus::Code(code)),
        (ExitStatus::Code(0), None) => Err(GuestError::Lost { why: "the exit code didn't arrive".to_owned() }),
        (ExitStatus::Code(66 | 67), _) => Err(gone(name, &String::from_utf8_lossy(stderr))),
        (status, _) => Err(GuestError::Lost { why: format!("who waited for its end ended with {}", status.code()) }),
    }
}

fn gone(name: &str, why: &str) -> GuestError {
    GuestError::MainLost { name: name.to_owned(), why: why.trim().to_owned() }
}

/// Something that runs scripts in the guest, waiting for the guest if need be.
#[async_trait]
pub(super) trait Runner: Send + Sync + 'static {
    /// Runs `script` with these words as `$1` and on.
    async fn open(&self, script: &str, words: &[&str], stdin: bool) -> Result<ExecSession, GuestError>;
}

/// Follows the output over lost connections; see [`super::MainProcess::follow`].
pub(super) fn follow<R: Runner>(
    runner: Arc<R>,
    name: &str,
    from: Offset,
) -> BoxStream<'static, Result<OutputChunk, GuestError>> {
    if let Err(error) = check_name(name) {
        return futures::stream::iter([Err(error)]).boxed();
    }
    let follower = Follower {
        runner,
        name: name.to_owned(),
        at: from,
        stage: Stage::Follow,
        reading: None,
        ready: VecDeque::new(),
    };
    futures::stream::unfold(Some(follower), async |follower| {
        let mut follower = follower?;
        match follower.next().await {
            Ok(Some(chunk)) => Some((Ok(chunk), Some(follower))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

struct Follower<R> {
    runner: Arc<R>,
    name: String,
    at: Offset,
    stage: Stage,
    reading: Option<Reading>,
    ready: VecDeque<OutputChunk>,
}

/// What the script that is read does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Follows.
    Follow,
    /// The process has ended; gives what the follower had not given by then.
    Drain,
    /// Everything was given.
    Done,
}

struct Reading {
    session: ExecSession,
    stdout: Option<BoxRead>,
    stderr: Option<BoxRead>,
    /// Held open: the script ends when it ends.
    _stdin: Option<BoxWrite>,
    buffers: [Vec<u8>; 2],
}

impl<R: Runner> Follower<R> {
    async fn next(&mut self) -> Result<Option<OutputChunk>, GuestError> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Ok(Some(chunk));
            }
            match self.advance().await {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(GuestError::Lost { .. } | GuestError::NotReady(_)) => {
                    // From where we are, on the next connection. The keeper hears of the loss a little later than we do.
                    self.reading = None;
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One step; false at the end.
    async fn advance(&mut self) -> Result<bool, GuestError> {
        if self.stage == Stage::Done {
            return Ok(false);
        }
        if self.reading.is_none() {
            self.reading = Some(self.open().await?);
        }
        let Some(reading) = &mut self.reading else { return Ok(false) };
        let [out_buffer, err_buffer] = &mut reading.buffers;
        let (stream, piece) = tokio::select! {
            piece = read(&mut reading.stdout, out_buffer), if reading.stdout.is_some() => (StdStream::Stdout, piece),
            piece = read(&mut reading.stderr, err_buffer), if reading.stderr.is_some() => (StdStream::Stderr, piece),
            else => {
                // Both outputs have ended; now the script's own end.
                let status = reading.session.wait().await?;
                self.reading = None;
                self.stage = match (self.stage, status) {
                    (Stage::Follow, ExitStatus::Code(0)) => Stage::Drain,
                    (_, ExitStatus::Code(0)) => Stage::Done,
                    (_, ExitStatus::Code(66)) => {
                        return Err(gone(&self.name, "it was not started since the guest booted"));
                    }
                    (_, status) => {
                        // A guest that can't run a reader now may be able to in a while.
                        tokio::time::sleep(AGAIN).await;
                        return Err(GuestError::Lost { why: format!("the reader ended with {}", status.code()) });
                    }
                };
                return Ok(true);
            }
        };
        if let Some(bytes) = piece {
            self.at = self.at.after(stream, bytes.len());
            self.ready.push_back(OutputChunk { next: self.at, stream, bytes });
        }
        Ok(true)
    }

    // By mutable reference, because one to share would need what is read to be shareable too.
    async fn open(&mut self) -> Result<Reading, GuestError> {
        let script = format!("{FIND}{}", if self.stage == Stage::Follow { FOLLOW } else { DRAIN });
        let (out, err) = (self.at.stdout.to_string(), self.at.stderr.to_string());
        let mut session = self.runner.open(&script, &[&self.name, &out, &err], self.stage == Stage::Follow).await?;
        let stdin = session.stdin.take();
        let nothing = || Box::new(tokio::io::empty()) as BoxRead;
        let stdout = Some(std::mem::replace(&mut session.stdout, nothing()));
        let stderr = Some(std::mem::replace(&mut session.stderr, nothing()));
        Ok(Reading { session, stdout, stderr, _stdin: stdin, buffers: [vec![0; 32 << 10], vec![0; 32 << 10]] })
    }
}

/// The next piece; `None` (and no more reader) at the end.
async fn read(from: &mut Option<BoxRead>, buffer: &mut [u8]) -> Option<Bytes> {
    let reader = from.as_mut()?;
    if let Ok(length @ 1..) = reader.read(buffer).await {
        return Some(Bytes::copy_from_slice(&buffer[..length]));
    }
    *from = None;
    None
}

#[cfg(test)]
mod tests;
