//! The fleet's operator as plain manifests.

use clap::Args;

/// Print the fleet's operator as manifests for a cluster, for who has no Helm.
///
/// The kinds, the rights and the Deployment that the chart has with its usual values: `vmpod manifests --image IMAGE | kubectl apply
/// --server-side -f -`. The chart has more choices.
#[derive(Debug, Args)]
pub(crate) struct Manifests {
    /// The container image that has vmpod as its entry point
    #[arg(long, value_name = "IMAGE", required_unless_present = "kinds_only")]
    pub(crate) image: Option<String>,
    /// The operator's namespace
    #[arg(long, value_name = "NAME", default_value = "vmpod")]
    pub(crate) namespace: String,
    /// Only the kinds `RunnerPool`, `Runner` and `ImagePrefetch`
    #[arg(long, conflicts_with_all = ["image", "namespace"])]
    pub(crate) kinds_only: bool,
}
