//! `vmpod service`: this program under the host's service manager.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

/// Run vmpod as a service of this host: under systemd, or launchd on a Mac.
///
/// The service ends and starts anew without its machines: they go on, and the next agent takes them over.
#[derive(Debug, Args)]
pub(crate) struct Service {
    #[command(subcommand)]
    pub(crate) command: ServiceCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// Write the service down, and start it now and at every start of the host
    Install(ServiceInstall),
    /// Stop the service and remove what `install` wrote; machines and all state stay
    Uninstall(ServiceUninstall),
}

/// What runs as a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// `vmpod up`: the API, the node and the fleet, on this machine alone
    Up,
    /// `vmpod node`: the node agent, in a cluster
    Node,
    /// `vmpod controller`: the fleet, in a cluster
    Controller,
}

#[derive(Debug, Args)]
pub(crate) struct ServiceInstall {
    /// What runs
    #[arg(value_enum)]
    pub(crate) part: Part,
    /// Its arguments, as on a command line
    #[arg(last = true, value_name = "ARG")]
    pub(crate) arguments: Vec<String>,
    /// The program that the service runs [default: this one]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) program: Option<PathBuf>,
    /// Print the files instead
    #[arg(long, conflicts_with = "root")]
    pub(crate) print: bool,
    /// Write the files below this directory, for a package, and start nothing
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) root: Option<PathBuf>,
    /// The service manager [default: this host's]
    #[arg(long, value_name = "NAME", value_enum)]
    pub(crate) manager: Option<Manager>,
}

#[derive(Debug, Args)]
pub(crate) struct ServiceUninstall {
    /// What runs
    #[arg(value_enum)]
    pub(crate) part: Part,
    /// Remove the files below this directory, and stop nothing
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) root: Option<PathBuf>,
    /// The service manager [default: this host's]
    #[arg(long, value_name = "NAME", value_enum)]
    pub(crate) manager: Option<Manager>,
}

/// What starts services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Manager {
    /// systemd.
    Systemd,
    /// launchd, of macOS.
    Launchd,
}

impl Manager {
    /// This host's.
    pub(crate) const HERE: Self = if cfg!(target_os = "macos") { Self::Launchd } else { Self::Systemd };
}
