//! The columns of each kind.

use serde_json::{Value, json};

use crate::kinds::{Resource, text};
use crate::openapi::description;

/// A column of a table.
pub(super) struct Column {
    pub(super) name: String,
    kind: String,
    format: String,
    description: String,
    priority: i64,
    /// For custom resources: where the cell comes from.
    pub(super) path: Option<String>,
}

impl Column {
    pub(super) fn definition(&self) -> Value {
        json!({"name": self.name, "type": self.kind, "format": self.format, "description": self.description, "priority": self.priority})
    }

    /// The type of the cells.
    pub(super) fn kind(&self) -> &str {
        &self.kind
    }
}

/// Name, priority, and the type and field whose description it has (or the description itself, after a `=`).
type Row = (&'static str, i64, &'static str);

const NAME: Row = ("Name", 0, "meta.ObjectMeta.name");
const AGE: Row = ("Age", 0, "meta.ObjectMeta.creationTimestamp");

fn rows(resource: &Resource) -> Vec<Row> {
    match resource.kind.as_str() {
        "Pod" => vec![
            NAME,
            ("Ready", 0, "=The aggregate readiness state of this pod for accepting traffic."),
            ("Status", 0, "=The aggregate status of the containers in this pod."),
            (
                "Restarts",
                0,
                "=The number of times the containers in this pod have been restarted and when the last container in this pod has restarted.",
            ),
            AGE,
            ("IP", 1, "core.PodStatus.podIP"),
            ("Node", 1, "core.PodSpec.nodeName"),
            ("Nominated Node", 1, "core.PodStatus.nominatedNodeName"),
            ("Readiness Gates", 1, "core.PodSpec.readinessGates"),
        ],
        "Node" => vec![
            NAME,
            ("Status", 0, "=The status of the node"),
            ("Roles", 0, "=The roles of the node"),
            AGE,
            ("Version", 0, "core.NodeSystemInfo.kubeletVersion"),
            ("Internal-IP", 1, "core.NodeStatus.addresses"),
            ("External-IP", 1, "core.NodeStatus.addresses"),
            ("OS-Image", 1, "core.NodeSystemInfo.osImage"),
            ("Kernel-Version", 1, "core.NodeSystemInfo.kernelVersion"),
            ("Container-Runtime", 1, "core.NodeSystemInfo.containerRuntimeVersion"),
        ],
        "Namespace" => vec![NAME, ("Status", 0, "=The status of the namespace"), AGE],
        "ConfigMap" => vec![NAME, ("Data", 0, "core.ConfigMap.data"), AGE],
        "Secret" => vec![NAME, ("Type", 0, "core.Secret.type"), ("Data", 0, "core.Secret.data"), AGE],
        "Event" => vec![
            ("Last Seen", 0, "core.Event.lastTimestamp"),
            ("Type", 0, "core.Event.type"),
            ("Reason", 0, "core.Event.reason"),
            ("Object", 0, "core.Event.involvedObject"),
            ("Subobject", 1, "core.ObjectReference.fieldPath"),
            ("Source", 1, "core.Event.source"),
            ("Message", 0, "core.Event.message"),
            ("First Seen", 1, "core.Event.firstTimestamp"),
            ("Count", 1, "core.Event.count"),
            ("Name", 1, "meta.ObjectMeta.name"),
        ],
        "Lease" => vec![NAME, ("Holder", 0, "coordination.LeaseSpec.holderIdentity"), AGE],
        "CertificateSigningRequest" => vec![
            NAME,
            AGE,
            ("SignerName", 0, "certificates.CertificateSigningRequestSpec.signerName"),
            ("Requestor", 0, "certificates.CertificateSigningRequestSpec.username"),
            ("RequestedDuration", 0, "certificates.CertificateSigningRequestSpec.expirationSeconds"),
            ("Condition", 0, "certificates.CertificateSigningRequestStatus.conditions"),
        ],
        "RoleBinding" | "ClusterRoleBinding" => vec![
            NAME,
            (
                "Role",
                0,
                if resource.namespaced { "rbac.RoleBinding.roleRef" } else { "rbac.ClusterRoleBinding.roleRef" },
            ),
            AGE,
            ("Users", 1, "=Users in the roleBinding"),
            ("Groups", 1, "=Groups in the roleBinding"),
            ("ServiceAccounts", 1, "=ServiceAccounts in the roleBinding"),
        ],
        "PriorityClass" => vec![
            NAME,
            ("Value", 0, "scheduling.PriorityClass.value"),
            ("Global-Default", 0, "scheduling.PriorityClass.globalDefault"),
            AGE,
            ("PreemptionPolicy", 0, "scheduling.PriorityClass.preemptionPolicy"),
        ],
        "PodDisruptionBudget" => vec![
            NAME,
            ("Min Available", 0, "policy.PodDisruptionBudgetSpec.minAvailable"),
            ("Max Unavailable", 0, "policy.PodDisruptionBudgetSpec.maxUnavailable"),
            ("Allowed Disruptions", 0, "=Calculated number of pods that may be disrupted at this time."),
            AGE,
        ],
        "Role" | "ClusterRole" | "CustomResourceDefinition" => {
            vec![NAME, ("Created At", 0, "meta.ObjectMeta.creationTimestamp")]
        }
        _ => vec![NAME, AGE],
    }
}

/// The columns of a kind.
pub(super) fn of(resource: &Resource) -> Vec<Column> {
    if let Some(custom) = &resource.custom {
        return custom_columns(&custom.columns);
    }
    rows(resource)
        .into_iter()
        .map(|(name, priority, source)| Column {
            name: name.to_owned(),
            kind: match name {
                "Created At" => "date",
                "Value" | "Allowed Disruptions" => "integer",
                "Global-Default" => "boolean",
                _ => "string",
            }
            .to_owned(),
            format: if name == "Name" { "name" } else { "" }.to_owned(),
            description: described(source),
            priority,
            path: None,
        })
        .collect()
}

fn described(source: &str) -> String {
    match source.strip_prefix('=') {
        Some(words) => words.to_owned(),
        None => source.rsplit_once('.').map(|(owner, field)| description(owner, field)).unwrap_or_default(),
    }
}

fn custom_columns(columns: &[Value]) -> Vec<Column> {
    let mut out = vec![Column {
        name: "Name".into(),
        kind: "string".into(),
        format: "name".into(),
        description: described("meta.ObjectMeta.name"),
        priority: 0,
        path: Some(".metadata.name".into()),
    }];
    for column in columns {
        let path = text(column, &["jsonPath"]);
        let own = text(column, &["description"]);
        out.push(Column {
            name: text(column, &["name"]).to_owned(),
            kind: text(column, &["type"]).to_owned(),
            format: text(column, &["format"]).to_owned(),
            description: if own.is_empty() {
                format!("Custom resource definition column (in JSONPath format): {path}")
            } else {
                own.to_owned()
            },
            priority: column["priority"].as_i64().unwrap_or(0),
            path: Some(path.to_owned()),
        });
    }
    if columns.is_empty() {
        out.push(Column {
            name: "Age".into(),
            kind: "date".into(),
            format: String::new(),
            description: described("meta.ObjectMeta.creationTimestamp"),
            priority: 0,
            path: Some(".metadata.creationTimestamp".into()),
        });
    }
    out
}
