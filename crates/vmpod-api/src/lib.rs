//! The contract with users: annotations, and the place of custom resources.
//!
//! Pure data: nothing here does any I/O.

pub mod annotations;
pub mod kubevirt;
pub mod labels;
pub mod pool;
pub mod prefetch;
pub mod provision;
pub mod runner;

pub use pool::{RunnerPool, RunnerPoolSpec, RunnerPoolStatus};
pub use prefetch::{ImagePrefetch, ImagePrefetchSpec, ImagePrefetchStatus};
pub use runner::{Runner, RunnerSpec, RunnerStatus};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
// The derive of kinds names it.
use serde_json as _;

/// The definitions of vmpod's own kinds, for an API that doesn't have them yet.
#[must_use]
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![RunnerPool::crd(), Runner::crd(), ImagePrefetch::crd()]
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_definitions_are_what_they_were() {
        insta::assert_json_snapshot!(super::definitions());
    }
}
