//! Annotations that a user sets on a Pod.

/// Cloud-init user data for the guest, inline (`#cloud-config …` or a script).
pub const USER_DATA: &str = "vmpod.dev/user-data";
/// Name of a Secret in the Pod's namespace whose key `userdata` holds the user data.
pub const USER_DATA_SECRET: &str = "vmpod.dev/user-data-secret";
/// The network mode of the machine: `user`, `nat` or `bridge:NAME`; the node's usual one without it.
pub const NETWORK: &str = "vmpod.dev/network";
/// `true` keeps other machines of a `nat` network from this one, and this one from them.
pub const NETWORK_ISOLATED: &str = "vmpod.dev/network-isolated";
/// Name of a Secret in the Pod's namespace with which to log in to the guest, in place of what the image says: of type
/// `kubernetes.io/basic-auth` (`username`, `password`) or `kubernetes.io/ssh-auth` (`ssh-privatekey`, and `username` if it isn't the image's).
pub const GUEST_LOGIN_SECRET: &str = "vmpod.dev/guest-login-secret";
/// How the machine starts: `auto`, `boot` or `snapshot`.
pub const START: &str = "vmpod.dev/start";
/// Whose identifier a macOS guest has as a Mac: `image` (the usual), the one of its image; or `new`, one of its own. What was activated
/// or signed in under the image's identifier is so only with that.
pub const MAC_IDENTIFIER: &str = "vmpod.dev/mac-identifier";
/// Names of containers beside the machine, separated by commas, that start only when its guest answers: what configures the guest.
pub const AFTER_MACHINE: &str = "vmpod.dev/after-machine";
