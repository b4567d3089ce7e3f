//! The contract with users: annotations, and the place of custom resources.
//!
//! Pure data: nothing here does any I/O.

pub mod annotations;
pub mod labels;
