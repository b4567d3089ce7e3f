//! The fleet: pools of CI runners that scale to a wait target and never kill a job.
//!
//! It may know `vmpod-api`, and neither machines, images, the node nor the API server.

pub mod estimate;
pub mod gitlab;
mod leader;
pub mod life;
pub mod objects;
pub mod operator;
pub mod plan;
pub mod schedule;
pub mod share;

pub use operator::{OperatorError, Options, run};
