//! The way into guests whose image names none.

use std::path::PathBuf;

use clap::{Args, ValueHint};

#[derive(Clone, Debug, Default, Args)]
pub(crate) struct GuestLogin {
    /// The user of guests whose image reads no seed and names no password (those of macOS-vz-kubelet)
    #[arg(long = "guest-user", value_name = "NAME")]
    pub(crate) user: Option<String>,
    /// A file with that user's password
    #[arg(long = "guest-password-file", value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "key_file")]
    pub(crate) password_file: Option<PathBuf>,
    /// A file with a private key for that user, in OpenSSH's format
    #[arg(long = "guest-key-file", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) key_file: Option<PathBuf>,
}
