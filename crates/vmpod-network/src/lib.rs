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
pub mod watch;

pub use address::{MacAddr, Subnet};
#[cfg(target_os = "linux")]
pub use link::attach;

/// Makes an interface of this host a port of a bridge.
#[cfg(not(target_os = "linux"))]
#[expect(clippy::unused_async, reason = "as where it can be done")]
pub async fn attach(_interface: &str, _bridge: &str) -> Result<(), NetworkError> {
    Err(NetworkError::Unsupported)
}

/// Whether an interface of this host is a bridge; `None` when there is no such interface.
#[must_use]
pub fn is_bridge(interface: &str) -> Option<bool> {
    let path = std::path::Path::new("/sys/class/net").join(interface);
    path.exists().then(|| path.join("bridge").exists())
}

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
    /// The firewall's program isn't there.
    #[error("nft isn't installed: install the package nftables")]
    NoFirewall,
    /// The firewall refused.
    #[error("can't change the firewall with nft: {0}")]
    Firewall(String),
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
    #[error("bridges need Linux: on this host machines are on the network user")]
    Unsupported,
}
