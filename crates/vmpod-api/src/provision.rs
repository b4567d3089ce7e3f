//! What configures a pool's machines after their guests answer.

#![allow(unreachable_pub, reason = "the derive for rules makes a hidden copy of each type")]
#![allow(clippy::duplicated_attributes, reason = "rules of one type look like one attribute given twice")]

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A container beside a machine that configures its guest: a playbook of Ansible's, or anything else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.playbook) != (has(self.command) && size(self.command) > 0)").message("provision runs one thing: name either a playbook or a command"))]
#[x_kube(validation = Rule::new("!has(self.port) || (has(self.connection) && self.connection == 'winrm')").message("port is that of connection winrm; SSH is always at the machine's own"))]
pub struct Provision {
    /// The container's image. It has a shell; for a playbook, `ansible-playbook` and what that connects with (an SSH client; for passwords
    /// `sshpass`; for `winrm` pywinrm), and `git` for a playbook of a repository.
    #[schemars(length(min = 1, max = 1024))]
    pub image: String,
    /// The playbook that Ansible runs against the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub playbook: Option<Playbook>,
    /// What runs in place of a playbook. The directory `/vmpod/provision` has an inventory for Ansible and each value in a file of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub command: Vec<String>,
    /// The Secret with `username` and `password` or `ssh-privatekey` with which to log in to the guest. Without it each machine has a key of
    /// its own, for guests that read a seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login_secret_ref: Option<ObjectName>,
    /// The user to log in as, when the Secret doesn't say; `root` without either. With a machine's own key it is the user of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub user: Option<String>,
    /// How to reach the guest.
    #[serde(default)]
    pub connection: Connection,
    /// The guest's port for `winrm`; 5986 without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// Variables of the playbook, beside those that tell of the runner.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub variables: BTreeMap<String, String>,
    /// How often it is tried again when it fails, ten seconds later.
    #[serde(default = "two")]
    #[schemars(range(max = 10))]
    pub retries: u32,
    /// How long it may take in all, in seconds. Then the runner has failed.
    #[serde(default = "half_an_hour")]
    #[schemars(range(min = 10, max = 86400))]
    pub timeout_seconds: u32,
}

/// A playbook, and where it is: one of these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.configMapRef) != has(self.git)").message("a playbook is in one place: name either configMapRef or git"))]
#[x_kube(validation = Rule::new("!has(self.file) || (!self.file.startsWith('/') && !self.file.split('/').exists(part, part == '..'))").message("file is a path below the playbook's place, without '..'"))]
pub struct Playbook {
    /// Its file there.
    #[serde(default = "site")]
    #[schemars(length(min = 1, max = 1024))]
    pub file: String,
    /// A `ConfigMap` in the pool's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<ObjectName>,
    /// A Git repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<GitRepository>,
}

/// A Git repository, cloned once for each machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GitRepository {
    /// Its URL.
    #[schemars(length(min = 1, max = 2048))]
    pub url: String,
    /// A branch or a tag; the repository's usual branch without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[^-]"))]
    pub reference: Option<String>,
    /// The Secret with `username` and `password` for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<ObjectName>,
}

/// How to reach a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Connection {
    /// SSH.
    #[default]
    Ssh,
    /// Windows Remote Management over HTTPS.
    Winrm,
}

/// Something in the pool's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ObjectName {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

fn two() -> u32 {
    2
}

fn half_an_hour() -> u32 {
    1800
}

fn site() -> String {
    "site.yml".to_owned()
}
