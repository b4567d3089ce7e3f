//! Labels in an image's configuration that vmpod understands.

/// `"true"` when the guest has the program that takes a new identity after it was restored from a memory snapshot.
pub const RENEWABLE: &str = "vmpod.dev/renewable";
