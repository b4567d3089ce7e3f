//! The way into guests whose image names none.

use std::path::PathBuf;

use clap::{Args, ValueHint};

#[derive(Clone, Debug, Default, Args)]
pub(crate) struct GuestLogin {
    /// The user of guests whose image reads no seed and names no password (those of macOS-vz-kubelet)
    #[arg(long, value_name = "NAME")]
    pub(crate) guest_user: Option<String>,
    /// A file with that user's password
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "guest_key_file")]
    pub(crate) guest_password_file: Option<PathBuf>,
    /// A file with a private key for that user, in OpenSSH's format
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) guest_key_file: Option<PathBuf>,
}
