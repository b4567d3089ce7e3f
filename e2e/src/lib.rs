//! Helpers for the end-to-end tests: real `vmpod`, real `kubectl`, real guests.
//!
//! A test makes a [`Home`], starts `vmpod up` on it ([`Home::up`]) and drives it with [`Up::kubectl`] and
//! [`Home::vmpod`]. Everything a test starts has the home's path in its command line, its working directory or its open
//! files, so nothing can hide: [`Home::assert_clean`] looks for it, and dropping the home ends it, also when the test
//! panics.
//!
//! What a test needs and isn't there makes the test fail with the name of the make target that provides it; nothing is
//! skipped.

pub mod command;
pub mod docker;
pub mod gitlab;
pub mod home;
pub mod host;
pub mod leaks;
pub mod namespace;
pub mod patience;
pub mod pods;
pub mod prerequisites;
pub mod queue;
pub mod registry;
pub mod up;

pub use command::{Ran, run};
pub use docker::Docker;
pub use home::Home;
pub use patience::{eventually, eventually_within};
pub use up::Up;
