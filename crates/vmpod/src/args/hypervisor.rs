//! What runs the machines of this host.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

/// What runs machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// QEMU: guests of Linux, Windows and others.
    Qemu,
    /// Apple's Virtualization framework: guests of macOS and Linux, on a Mac.
    Vz,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Hypervisor {
    /// What runs machines [default: vz on a Mac, else qemu]
    #[arg(long = "hypervisor", value_name = "NAME", value_enum, env = "VMPOD_HYPERVISOR", hide_env_values = true)]
    pub(crate) kind: Option<Kind>,
    /// The QEMU program [default: qemu-system-* of this architecture]
    #[arg(long, value_name = "PROGRAM", env = "VMPOD_QEMU", hide_env_values = true,
          value_hint = ValueHint::CommandName)]
    pub(crate) qemu: Option<PathBuf>,
    /// The program that shares a pod's volumes between its machine and its containers [default: the distribution's]
    #[arg(long, value_name = "PROGRAM", env = "VMPOD_VIRTIOFSD", hide_env_values = true,
          value_hint = ValueHint::CommandName)]
    pub(crate) virtiofsd: Option<PathBuf>,
    /// Another program than this one to be each machine's helper under vz: a stand-in for tests
    #[arg(long, value_name = "PROGRAM", hide = true)]
    pub(crate) vz_helper: Option<PathBuf>,
    /// The leases of the host's DHCP server under vz
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) vmnet_leases: Option<PathBuf>,
}

/// Be the process in which a machine of Apple's Virtualization framework lives.
#[derive(Debug, Args)]
pub(crate) struct MachineVz {
    /// The machine's directory
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
}
