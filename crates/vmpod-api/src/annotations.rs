//! Annotations that a user sets on a Pod.

/// Cloud-init user data for the guest, inline (`#cloud-config …` or a script).
pub const USER_DATA: &str = "vmpod.dev/user-data";
/// Name of a Secret in the Pod's namespace whose key `userdata` holds the user data.
pub const USER_DATA_SECRET: &str = "vmpod.dev/user-data-secret";
/// The network mode of the machine: `user`, `nat` or `bridge:NAME`; the node's usual one without it.
pub const NETWORK: &str = "vmpod.dev/network";
/// `true` keeps other machines of a `nat` network from this one, and this one from them.
pub const NETWORK_ISOLATED: &str = "vmpod.dev/network-isolated";
/// How the machine starts: `auto`, `boot` or `snapshot`.
pub const START: &str = "vmpod.dev/start";
