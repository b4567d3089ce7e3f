//! Who is calling, and what they may do.

pub(crate) mod authorize;
pub(crate) mod node;
pub(crate) mod token;
