//! One line of a log file.

use jiff::{Timestamp, fmt::temporal::DateTimePrinter};

/// Most bytes of content in one record; longer lines are split into `P` records.
pub const MAX_CONTENT: usize = 16 * 1024;

/// Most bytes of a record with its head: anything longer in a log file is damage.
pub const MAX_RECORD: usize = MAX_CONTENT + 256;

/// Which of a process's outputs a record came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// The name in a record.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// How far each output has been written to the log: the place after the last byte that is in it. Each output is
/// numbered for itself, from zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The place in standard output.
    pub stdout: u64,
    /// The place in standard error.
    pub stderr: u64,
}

impl Position {
    /// The place in one output.
    #[must_use]
    pub fn of(self, stream: Stream) -> u64 {
        match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }

    pub(crate) fn set(&mut self, stream: Stream, value: u64) {
        match stream {
            Stream::Stdout => self.stdout = value,
            Stream::Stderr => self.stderr = value,
        }
    }
}

/// A parsed record, borrowing from its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// When it was written.
    pub time: Timestamp,
    /// The timestamp as it stands in the file.
    pub time_text: &'a str,
    /// The output it came from.
    pub stream: Stream,
    /// Whether the content lacks its newline because the line goes on (or never ended).
    pub partial: bool,
    /// How far the outputs were written; absent in files that another runtime wrote.
    pub position: Option<Position>,
    /// The bytes, without a newline.
    pub content: &'a [u8],
}

impl<'a> Record<'a> {
    /// Parses a line that has lost its newline. `None`: not a record.
    #[must_use]
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let (time_text, rest) = split_space(line)?;
        let (stream, rest) = split_space(rest)?;
        // A record without content may lack the space after its tag.
        let (tags, content) = split_space(rest).unwrap_or((rest, &[]));
        let time_text = std::str::from_utf8(time_text).ok()?;
        let time = time_text.parse().ok()?;
        let stream = match stream {
            b"stdout" => Stream::Stdout,
            b"stderr" => Stream::Stderr,
            _ => return None,
        };
        let mut tags = tags.split(|byte| *byte == b':');
        let partial = match tags.next()? {
            b"F" => false,
            b"P" => true,
            _ => return None,
        };
        let position = tags.find_map(parse_position);
        Some(Self { time, time_text, stream, partial, position, content })
    }
}

fn split_space(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|byte| *byte == b' ')?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// `@STDOUT+STDERR`.
fn parse_position(tag: &[u8]) -> Option<Position> {
    let text = std::str::from_utf8(tag.strip_prefix(b"@")?).ok()?;
    let (stdout, stderr) = text.split_once('+')?;
    Some(Position { stdout: stdout.parse().ok()?, stderr: stderr.parse().ok()? })
}

/// Appends a record and its newline to `out`.
pub fn encode(out: &mut Vec<u8>, time: &str, stream: Stream, partial: bool, position: Position, content: &[u8]) {
    out.extend_from_slice(time.as_bytes());
    out.push(b' ');
    out.extend_from_slice(stream.name().as_bytes());
    out.extend_from_slice(if partial { b" P:@" } else { b" F:@" });
    out.extend_from_slice(position.stdout.to_string().as_bytes());
    out.push(b'+');
    out.extend_from_slice(position.stderr.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(content);
    out.push(b'\n');
}

/// The fixed-width RFC 3339 form with nanoseconds, in UTC.
#[must_use]
pub fn time_text(time: Timestamp) -> String {
    const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(9));
    PRINTER.timestamp_to_string(&time)
}
