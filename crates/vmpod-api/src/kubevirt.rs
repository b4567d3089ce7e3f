//! Machines that `KubeVirt` runs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What runs a pool's machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Substrate {
    /// vmpod's own nodes: a machine is a Pod.
    #[default]
    Pod,
    /// `KubeVirt`: a machine is a `VirtualMachineInstance`.
    Kubevirt,
}

/// How a pool's machines are made on `KubeVirt`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KubeVirt {
    /// An instance type, in place of `resources.cpu` and `resources.memory`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instancetype: Option<TypeName>,
    /// A preference: the kind of devices and firmware that its guest likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<TypeName>,
    /// The class of storage of disks that are clones of a volume (`image: pvc://NAMESPACE/NAME`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
    /// The user data are answers for Windows' own set-up.
    #[serde(default)]
    pub sysprep: bool,
    /// A machine is up when this port of its guest takes connections; 0 as soon as it runs.
    #[serde(default = "ssh")]
    pub ready_port: u16,
}

impl Default for KubeVirt {
    fn default() -> Self {
        Self { instancetype: None, preference: None, storage_class_name: None, sysprep: false, ready_port: ssh() }
    }
}

/// The name of an instance type or a preference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TypeName {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Whether it is one of the pool's namespace, and not of the cluster.
    #[serde(default)]
    pub namespaced: bool,
}

fn ssh() -> u16 {
    22
}
