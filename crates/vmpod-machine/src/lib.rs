//! One virtual machine on this host: its directory, its life, its hypervisor process and the way into its guest.
//!
//! This crate knows nothing of Kubernetes or of image formats. A caller describes a machine with a [`Spec`],
//! gives it to [`Machines::create`], starts it, and talks to the system inside through [`Guest`].
//!
//! ```text
//!   Spec ──create──▶ Machine ──start──▶ one operating-system process, outside the agent
//!                       │ state()            ▲
//!                       │ guest() ── SSH ────┘ exec, files, forwarded ports, the main process
//! ```
//!
//! Every machine is one process that outlives the agent. What an agent needs to find it again is in the machine's
//! directory; [`Machines::adopt`] reads it, and proves by a kernel lock and a handshake that the process is the machine.

mod address;
pub mod console;
pub mod directory;
#[cfg(feature = "fake")]
pub mod fake;
pub mod fault;
pub mod guest;
pub mod hypervisor;
pub mod id;
pub mod kvm;
pub mod lifecycle;
mod lock;
pub mod loopback;
mod machine;
pub mod machines;
mod pid;
pub mod qemu;
#[cfg(target_os = "linux")]
mod readable;
pub mod renewal;
pub mod seed;
mod session;
pub mod spec;
pub mod template;
pub mod vmnet;
pub mod vz;

pub use fault::FaultPoints;
pub use guest::main_process::{MainCommand, MainProcess, Offset, OutputChunk, Started, StdStream};
pub use guest::{Exec, ExecControl, ExecSession, ExitStatus, Guest, GuestError, GuestState, Signal, Waiting, Winsize};
pub use hypervisor::{Hypervisor, HypervisorError, Stats};
pub use id::MachineId;
pub use lifecycle::{Exit, ExitCause, State};
pub use machine::Machine;
pub use machines::{Adopted, MachineError, Machines, SshKey};
pub use spec::{
    Accel, Access, Arch, Assigned, Auth, Boot, Cpus, Devices, Disk, DiskFormat, Firmware, Forward, GuestOs, HostPort,
    Mac, MacAddr, Memory, Network, Protocol, Secret, Seed, SeedForm, Share, Snapshot, Spec,
};
pub use template::{Template, TemplateError, TemplateId, TemplateKey, Templates};
pub use vmpod_network::learn::{Learnt, Source as LearntFrom};
