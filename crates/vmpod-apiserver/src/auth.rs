//! Who is calling, and what they may do.

pub(crate) mod authorize;
pub(crate) mod bootstrap;
pub(crate) mod defaults;
pub(crate) mod node;
pub(crate) mod policy;
pub(crate) mod rbac;
pub(crate) mod token;
