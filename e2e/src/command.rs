//! Programs that run for a bounded time.

use std::fmt;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// How a program ended and what it said.
#[derive(Clone, Debug)]
pub struct Ran {
    /// What was run.
    pub words: String,
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.code.map_or("a signal".to_owned(), |code| code.to_string());
        write!(f, "`{}` ended with {code} after {:.1} s", self.words, self.took.as_secs_f64())?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.trim().is_empty() {
                write!(f, "\n--- {name}\n{}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

impl Ran {
    /// The standard output of a program that must have succeeded.
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == Some(0), "{self}");
        Ok(self.stdout)
    }

    /// Checks the exit code.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "exit code {code} was expected: {self}");
        Ok(self)
    }

    /// Checks that the program failed and that its errors tell `what`.
    pub fn expect_failure(self, what: &str) -> Result<Self> {
        ensure!(self.code != Some(0), "a failure was expected: {self}");
        ensure!(self.stderr.contains(what), "standard error should tell {what:?}: {self}");
        Ok(self)
    }
}

/// Runs a program to its end, which must come within `patience`. It never outlives the call.
pub async fn run(mut command: Command, stdin: Option<&[u8]>, patience: Duration) -> Result<Ran> {
    let std = command.as_std();
    let words: Vec<String> = std::iter::once(std.get_program())
        .chain(std.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let words = words.join(" ");
    command.kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
    let began = tokio::time::Instant::now();
    let mut child = command.spawn().with_context(|| format!("can't run `{words}`"))?;
    let feed = child.stdin.take().zip(stdin.map(<[u8]>::to_vec)).map(|(mut to, bytes)| {
        tokio::spawn(async move {
            // A program that doesn't read all of its input is no failure here.
            drop(to.write_all(&bytes).await);
        })
    });
    let output = match tokio::time::timeout(patience, child.wait_with_output()).await {
        Ok(output) => output.with_context(|| format!("can't wait for `{words}`"))?,
        Err(_) => bail!("`{words}` still runs after {} s", patience.as_secs()),
    };
    if let Some(feed) = feed {
        feed.abort();
    }
    Ok(Ran {
        words,
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: began.elapsed(),
    })
}
