//! Who is calling.

use std::collections::BTreeMap;

/// An authenticated caller, as Kubernetes' `UserInfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The user name, such as `admin` or `system:node:n1`.
    pub user: String,
    /// The unique id of the user, when there is one (a service account's UID).
    pub uid: Option<String>,
    /// The groups, in the order of the credential.
    pub groups: Vec<String>,
    /// More facts, as in `UserInfo.extra`.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// The group whose members may do everything.
pub const MASTERS: &str = "system:masters";
/// The group of kubelets.
pub const NODES: &str = "system:nodes";
/// The group of everyone who proved who they are.
pub const AUTHENTICATED: &str = "system:authenticated";
/// The group of everyone who didn't.
pub const UNAUTHENTICATED: &str = "system:unauthenticated";

impl Identity {
    /// A user in some groups; `system:authenticated` is added.
    pub fn new(user: impl Into<String>, groups: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let mut groups: Vec<String> = groups.into_iter().map(Into::into).collect();
        if !groups.iter().any(|g| g == AUTHENTICATED) {
            groups.push(AUTHENTICATED.into());
        }
        Self { user: user.into(), groups, ..Self::default() }
    }

    /// The administrator: user `admin` in `system:masters`.
    #[must_use]
    pub fn admin() -> Self {
        Self::new("admin", [MASTERS])
    }

    /// The kubelet of one node.
    #[must_use]
    pub fn node(name: &str) -> Self {
        Self::new(format!("system:node:{name}"), [NODES])
    }

    /// A caller who showed no credential.
    #[must_use]
    pub fn anonymous() -> Self {
        Self { user: "system:anonymous".into(), groups: vec![UNAUTHENTICATED.into()], ..Self::default() }
    }

    /// Whether the caller is in a group.
    #[must_use]
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// The namespace and name when the caller is a service account.
    #[must_use]
    pub fn service_account(&self) -> Option<(&str, &str)> {
        self.user.strip_prefix("system:serviceaccount:")?.split_once(':')
    }

    /// The node's name when the caller is a kubelet (`system:node:NAME` in `system:nodes`).
    #[must_use]
    pub fn node_name(&self) -> Option<&str> {
        self.user.strip_prefix("system:node:").filter(|name| !name.is_empty() && self.in_group(NODES))
    }
}
