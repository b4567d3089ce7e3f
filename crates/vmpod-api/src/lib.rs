//! The contract with users: annotations, labels and custom resources.
//!
//! Pure data: nothing here does any I/O.

pub mod annotations;
