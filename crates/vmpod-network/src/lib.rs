//! The host's side of the networks of virtual machines.
//!
//! [`nat::Nat`] is a network of the host's own: a bridge with a gateway address, to which each machine's interface is attached;
//! a DHCP server that gives each machine the address that was reserved for it before it booted; a DNS forwarder; masquerading
//! by nftables on the way out, and forwarded ports on the way in. It exists from the first machine to the last, and belongs
//! to one process at a time: whoever comes after one that died finds bridge, interfaces and rules as they are and goes on
//! with them.
//!
//! On a bridge that somebody else keeps, a machine's address comes from a DHCP server that isn't ours, or from the guest's own
//! configuration. [`learn`] tells it from what passes the machine's interface.
//!
//! What decides is pure and builds everywhere: [`dhcp::answer`], [`rules::ruleset`], [`advert`]. What acts is for Linux.

pub mod address;
pub mod advert;
pub mod dhcp;
pub mod dns;
pub mod learn;
#[cfg(target_os = "linux")]
mod link;
pub mod nat;
pub mod rules;
#[cfg(target_os = "linux")]
mod serve;
#[cfg(target_os = "linux")]
pub mod watch;

pub use address::{MacAddr, Subnet};
#[cfg(target_os = "linux")]
pub use link::{attach, is_bridge};

/// Why something couldn't be done with the host's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused.
    #[error("can't {action}: {why}")]
    Kernel {
        /// What was being done.
        action: String,
        /// The kernel's word, with what to do where it is known.
        why: String,
    },
    /// Something of that name exists and isn't ours.
    #[error("{0} exists and vmpod didn't make it: choose another name for the bridge with --nat-bridge, or remove it")]
    Foreign(String),
    /// Another process has the network.
    #[error(
        "another vmpod agent on this host has the bridge {0}: give this one its own with --nat-bridge and --nat-subnet"
    )]
    Taken(String),
    /// The addresses are in use.
    #[error("the addresses {subnet} overlap with {address} on {interface}: choose others with --nat-subnet")]
    Overlap {
        /// The network's addresses.
        subnet: Subnet,
        /// The address that is in the way.
        address: String,
        /// The interface that has it.
        interface: String,
    },
    /// Another machine has the port.
    #[error("port {port} of this host leads to another machine already ({owner})")]
    PortTaken {
        /// The port.
        port: u16,
        /// Whose it is: a pod's UID.
        owner: String,
    },
    /// A program that is needed.
    #[error("can't run {program}: {why}")]
    Program {
        /// Which.
        program: &'static str,
        /// Why not, and what to do.
        why: String,
    },
    /// A socket of the network's services.
    #[error("can't serve {what} on {bridge}: {source}")]
    Serve {
        /// DHCP, DNS or router advertisements.
        what: &'static str,
        /// Where.
        bridge: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Not on this system.
    #[error("networks of the kind nat need Linux; on this host machines are on the network user")]
    Unsupported,
}
