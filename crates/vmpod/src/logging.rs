//! Log lines: to standard error, for people or as JSON.

use std::io::IsTerminal as _;

use anyhow::{Context as _, Result};
use tracing_subscriber::EnvFilter;

use crate::args::LogFormat;
use crate::output::Style;

/// What a command logs when nobody says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// A process that stays: what it does.
    Service,
    /// A command: only what may be wrong.
    Command,
}

/// Starts logging for this process.
pub(crate) fn start(filter: Option<&str>, format: LogFormat, level: Level) -> Result<()> {
    let filter = match (filter, level) {
        (Some(text), _) => EnvFilter::try_new(text).with_context(|| format!("--log {text:?} is not a filter"))?,
        // The SSH library calls a channel that is gone an error; whoever used it tells what it meant.
        (None, Level::Service) => EnvFilter::new(
            "warn,vmpod=info,vmpod_node=info,vmpod_apiserver=info,vmpod_machine=info,vmpod_image=info,vmpod_fleet=info,russh=off",
        ),
        (None, Level::Command) => EnvFilter::new("error,russh=off"),
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
        LogFormat::Human => lines
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal() && Style::stderr().is_coloured())
            .try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("can't start logging: {error}"))
}
