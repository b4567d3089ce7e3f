//! The fleet: pools of CI runners that scale to a wait target and never kill a job.
//!
//! It may know `vmpod-api`, and neither machines, images, the node nor the API server.

pub mod estimate;
pub mod gitlab;
pub mod keda;
pub mod kubevirt;
mod leader;
pub mod life;
mod limit;
pub mod metrics;
pub mod objects;
pub mod operator;
pub mod plan;
pub mod provider;
pub mod provision;
pub mod queue;
pub mod schedule;
pub mod share;
pub mod user_data;

pub use metrics::Metrics;
pub use operator::{Clock, OperatorError, Options, run};

/// An error with its reasons, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}
