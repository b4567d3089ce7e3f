//! `vmpod api` and `vmpod token`: what one does with the embedded API itself.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use super::values;

/// Save and restore what the API of `vmpod up` holds.
#[derive(Debug, Args)]
pub(crate) struct Api {
    #[command(subcommand)]
    pub(crate) command: ApiCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ApiCommand {
    /// Write every object as YAML, but for events and leases.
    ///
    /// The archive holds the secrets. A file is made readable for its owner only. While `vmpod up` runs, it is asked; else
    /// its store is read.
    Export {
        /// The file to write [default: standard output]
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
    },
    /// Write every object of an archive into the store.
    ///
    /// Objects of the same names are replaced, others stay. Nothing is written unless the whole archive is good. `vmpod up`
    /// must not be running.
    Import {
        /// The archive; - is standard input
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
}

/// Bootstrap tokens: how another host gets a node's certificate.
#[derive(Debug, Args)]
pub(crate) struct Token {
    #[command(subcommand)]
    pub(crate) command: TokenCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a bootstrap token and print it.
    ///
    /// Whoever shows it may ask for the certificate of a node, and gets it. `vmpod up` must be running. It is a Secret in the
    /// namespace kube-system: delete that to end it sooner.
    Create(TokenCreate),
}

#[derive(Debug, Args)]
pub(crate) struct TokenCreate {
    /// How long it is good
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = values::duration)]
    pub(crate) ttl: std::time::Duration,
    /// What it is for
    #[arg(long, value_name = "TEXT", default_value = "made by vmpod token create")]
    pub(crate) description: String,
    /// Print a kubeconfig with the token, the server and its authority instead
    #[arg(long)]
    pub(crate) kubeconfig: bool,
}
