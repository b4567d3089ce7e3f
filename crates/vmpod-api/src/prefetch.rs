//! `ImagePrefetch`: images that nodes are to have before any pod asks for them.

#![allow(unreachable_pub, reason = "the derive for rules makes a hidden copy of each type")]
#![allow(clippy::duplicated_attributes, reason = "columns of one type look like one attribute given twice")]

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::provision::ObjectName;

/// Which images, and where.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "vmpod.dev",
    version = "v1alpha1",
    kind = "ImagePrefetch",
    plural = "imageprefetches",
    namespaced,
    category = "vmpod",
    status = "ImagePrefetchStatus",
    derive = "PartialEq",
    doc = "Images that nodes are to have before any pod asks for them",
    printcolumn(name = "Images", type_ = "string", json_path = ".spec.images"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ImagePrefetchSpec {
    /// The images, by full names.
    #[schemars(length(min = 1, max = 64))]
    pub images: Vec<String>,
    /// Labels of the nodes that are to have them; all nodes without.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Secrets of this namespace with which to pull. The nodes must be allowed to read them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub image_pull_secrets: Vec<ObjectName>,
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImagePrefetchStatus {
    /// By node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nodes: BTreeMap<String, NodeImages>,
}

/// The images of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeImages {
    /// How it is as a whole.
    pub phase: PrefetchPhase,
    /// The images that are there, of so many.
    pub images: String,
    /// What went wrong, by image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Since when it is in that phase, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
}

/// How a node's images are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PrefetchPhase {
    /// Some are on their way.
    #[default]
    Pulling,
    /// All are there.
    Ready,
    /// Some can't be had; it is tried again.
    Failed,
}
