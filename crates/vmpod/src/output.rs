//! What the program prints: data on standard output, talk on standard error.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::args::Format;

/// Whether text may be coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Style {
    colour: bool,
}

impl Style {
    /// The style of standard error: coloured on a terminal, unless `NO_COLOR` is set.
    pub(crate) fn stderr() -> Self {
        Self { colour: std::io::stderr().is_terminal() && may_colour() }
    }

    /// The style of standard output.
    pub(crate) fn stdout() -> Self {
        Self { colour: std::io::stdout().is_terminal() && may_colour() }
    }

    #[cfg(test)]
    pub(crate) fn plain() -> Self {
        Self { colour: false }
    }

    #[cfg(test)]
    pub(crate) fn coloured() -> Self {
        Self { colour: true }
    }

    pub(crate) fn is_coloured(self) -> bool {
        self.colour
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.paint(text, "1;31")
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.paint(text, "32")
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.paint(text, "33")
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.paint(text, "1")
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.paint(text, "2")
    }

    fn paint(self, text: &str, code: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// <https://no-color.org>: set and not empty means no.
fn may_colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && std::env::var_os("TERM").is_none_or(|v| v != "dumb")
}

/// Writes data to standard output.
///
/// A reader that went away (`vmpod ps | head -1`) is no failure.
pub(crate) fn data(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("can't write to standard output"),
    }
}

/// Says one line on standard error.
pub(crate) fn talk(text: &str) {
    let mut stderr = std::io::stderr().lock();
    // Talk is for whoever listens; nobody has to.
    drop(writeln!(stderr, "{text}"));
}

/// Prints one list of results in the format that was asked for.
pub(crate) fn list<T: Serialize>(
    format: Format,
    items: &[T],
    columns: &[&str],
    row: impl Fn(&T) -> Vec<String>,
    name: impl Fn(&T) -> String,
) -> Result<()> {
    match format {
        Format::Table => data(&table(columns, items.iter().map(row))),
        Format::Name => data(&items.iter().map(|item| name(item) + "\n").collect::<String>()),
        Format::Json | Format::Yaml => value(format, &items),
    }
}

/// Prints one value as JSON or YAML (a table has no shape for it, so it is YAML too).
pub(crate) fn value<T: Serialize>(format: Format, value: &T) -> Result<()> {
    match format {
        Format::Json => {
            let text = serde_json::to_string_pretty(value).context("can't write the result as JSON")?;
            data(&(text + "\n"))
        }
        Format::Yaml | Format::Table | Format::Name => {
            let mut text = serde_saphyr::to_string(value).context("can't write the result as YAML")?;
            if !text.ends_with('\n') {
                text.push('\n');
            }
            data(&text)
        }
    }
}

/// Columns for people: a header, no lines, two spaces between.
pub(crate) fn table(columns: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(columns.iter().map(|c| c.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Bytes for people, in powers of 1024.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn bytes(amount: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (amount as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A duration for people, as kubectl tells ages.
pub(crate) fn age(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..120 => format!("{s}s"),
        120..600 if !s.is_multiple_of(60) => format!("{}m{}s", s / 60, s % 60),
        120..10_800 => format!("{}m", s / 60),
        10_800..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

/// A short time for people: `0.42 s`.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// What goes on, told on a terminal by a spinner or a bar and nowhere else.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A spinner with a message; hidden unless standard error is a terminal.
    pub(crate) fn spinner(message: impl Into<String>) -> Self {
        let bar = ProgressBar::with_draw_target(None, target());
        bar.set_style(spinner_style());
        bar.set_message(message.into());
        if std::io::stderr().is_terminal() {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { bar }
    }

    /// A spinner that is never drawn.
    pub(crate) fn hidden() -> Self {
        Self { bar: ProgressBar::hidden() }
    }

    /// Changes the message.
    pub(crate) fn say(&self, message: impl Into<String>) {
        self.bar.set_message(message.into());
    }

    /// Removes it from the screen.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn target() -> ProgressDrawTarget {
    if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() }
}

fn spinner_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg} ({elapsed})").unwrap_or_else(|_| ProgressStyle::default_spinner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_trailing_spaces() {
        let text =
            table(&["name", "size"], [vec!["a".into(), "1".into()], vec!["longer".into(), String::new()]].into_iter());
        assert_eq!(text, "NAME    SIZE\na       1\nlonger\n");
    }

    #[test]
    fn an_empty_table_is_its_header() {
        assert_eq!(table(&["name"], std::iter::empty()), "NAME\n");
    }

    #[test]
    fn bytes_have_three_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(300 << 20), "300 MiB");
        assert_eq!(bytes(u64::MAX), "16777216 TiB");
    }

    #[test]
    fn ages_are_kubectls() {
        for (s, told) in
            [(0, "0s"), (119, "119s"), (125, "2m5s"), (180, "3m"), (700, "11m"), (10_800, "3h"), (200_000, "2d")]
        {
            assert_eq!(age(Duration::from_secs(s)), told);
        }
    }
}
