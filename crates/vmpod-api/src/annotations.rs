//! Annotations that a user sets on a Pod.

/// Cloud-init user data for the guest, inline (`#cloud-config …` or a script).
pub const USER_DATA: &str = "vmpod.dev/user-data";
/// Name of a Secret in the Pod's namespace whose key `userdata` holds the user data.
pub const USER_DATA_SECRET: &str = "vmpod.dev/user-data-secret";
/// The network mode of the machine: `user` (the default), later `nat` and `bridge:IFACE`.
pub const NETWORK: &str = "vmpod.dev/network";
/// How the machine starts: `auto`, `boot` or `snapshot`.
pub const START: &str = "vmpod.dev/start";
