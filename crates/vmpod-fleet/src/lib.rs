//! The fleet: pools of CI runners that scale to a wait target and never kill a job.
//!
//! It may know `vmpod-api`, and neither machines, images, the node nor the API server.

pub mod gitlab;
