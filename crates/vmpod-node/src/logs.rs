//! Container logs: one file per attempt in the CRI format, written crash-exactly, rotated, and read with all of
//! the kubelet's parameters.
//!
//! A line is `RFC3339Nano stdout|stderr TAG CONTENT`. The tag is `F` (a whole line) or `P` (a part of one),
//! followed by a second, colon-separated tag of our own that says how far each output was written with
//! the record: see [`record::Position`]. The CRI format allows such tags, and its readers ignore them.

mod files;
mod options;
mod reader;
pub mod record;
pub mod watch;
mod writer;

use std::path::PathBuf;

use tokio::sync::watch::Receiver;

pub use options::{LogOptions, QueryError};
pub use reader::{open, read};
pub use record::{Position, Stream};
pub use writer::{Limits, LogError, Progress, Writer};

/// Where a container attempt's log is, and how one learns that it grows.
#[derive(Clone, Debug)]
pub struct LogFile {
    /// The current file; rotated ones are beside it.
    pub path: PathBuf,
    /// Who writes it. `None`: nobody any more, the attempt has ended and all its output is in the file.
    pub live: Option<Live>,
}

/// The writer of a log that may still grow.
#[derive(Clone, Debug)]
pub enum Live {
    /// A [`Writer`] in this process: [`Writer::progress`].
    Writer(Receiver<Progress>),
    /// Another process. The value becomes true when the attempt has ended and everything is written.
    Process(Receiver<bool>),
}
