//! How a run of the program ends: its exit code, and the one printer of errors.

use std::error::Error as StdError;
use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;

use crate::output::Style;

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All went well.
    Done,
    /// It went on, but the answer is no (`doctor` found something broken).
    Failed,
    /// A command inside a machine ended with this code.
    Command(u8),
}

/// The exit code of a failure before the command of `run` or `exec` could start.
pub(crate) const BEFORE_COMMAND: u8 = 125;

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => Self::SUCCESS,
            Exit::Failed => Self::FAILURE,
            Exit::Command(code) => Self::from(code),
        }
    }
}

/// A failure with the way out of it, added to an error's chain.
#[derive(Debug)]
pub(crate) struct Remedy {
    what: String,
    remedy: String,
}

impl Remedy {
    /// `what` failed; `remedy` says what to do.
    pub(crate) fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl StdError for Remedy {}

/// Writes an error to standard error: what failed, each cause on its own line, what to do.
pub(crate) fn print(error: &anyhow::Error) {
    let mut stderr = std::io::stderr().lock();
    // Nobody is left to be told when standard error is gone.
    drop(stderr.write_all(render(error, Style::stderr()).as_bytes()));
}

/// The text that [`print()`] writes.
pub(crate) fn render(error: &anyhow::Error, style: Style) -> String {
    let mut lines: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.trim();
        // Errors of other libraries often repeat their source; said once is enough.
        if text.is_empty() || lines.last().is_some_and(|last| last.ends_with(text)) {
            continue;
        }
        lines.push(text.to_owned());
    }
    let mut out = Vec::new();
    for (depth, line) in lines.iter().enumerate() {
        let line = line.replace('\n', "\n    ");
        if depth == 0 {
            out.push(format!("{}: {line}\n", style.red("error")));
        } else {
            out.push(format!("  {}: {line}\n", style.dim("because")));
        }
    }
    if let Some(remedy) = error.downcast_ref::<Remedy>() {
        out.push(format!("  {}: {}\n", style.green("try"), remedy.remedy.replace('\n', "\n       ")));
    }
    out.concat()
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_whole_chain_is_told_and_nothing_twice() {
        let error = Err::<(), _>(std::io::Error::other("the disk is on fire"))
            .context("reading it: the disk is on fire")
            .context(Remedy::new("image tiny can't be read", "put the fire out,\nthen try again"))
            .unwrap_err();
        insta::assert_snapshot!(render(&error, Style::plain()), @r"
        error: image tiny can't be read
          because: reading it: the disk is on fire
          try: put the fire out,
               then try again
        ");
    }

    #[test]
    fn an_error_alone_is_one_line() {
        assert_eq!(render(&anyhow::anyhow!("no"), Style::plain()), "error: no\n");
    }

    #[test]
    fn colours_are_only_for_terminals() {
        assert!(render(&anyhow::anyhow!("no"), Style::coloured()).contains("\u{1b}["));
    }
}
