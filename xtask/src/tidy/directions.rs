//! Which crate may know which: the table of ARCHITECTURE.md, enforced.

use serde_json::Value;

use super::Finding;

/// For each crate, the workspace crates that it may depend on.
const ALLOWED: &[(&str, &[&str])] = &[
    ("vmpod-api", &[]),
    ("vmpod-network", &[]),
    ("vmpod-machine", &["vmpod-network"]),
    ("vmpod-image", &[]),
    ("vmpod-apiserver", &[]),
    ("vmpod-node", &["vmpod-api", "vmpod-image", "vmpod-machine", "vmpod-network"]),
    ("vmpod-fleet", &["vmpod-api"]),
    (
        "vmpod",
        &["vmpod-api", "vmpod-apiserver", "vmpod-fleet", "vmpod-image", "vmpod-machine", "vmpod-network", "vmpod-node"],
    ),
];

/// Crates of tests and tools: they may use all, and nothing may use them.
const OUTSIDE: &[&str] = &["e2e", "xtask"];

/// For each crate, outside crates that would break its promise not to know a thing.
const FOREIGN: &[(&str, &[&str])] = &[
    ("vmpod-api", &["tokio", "reqwest", "hyper", "axum"]),
    ("vmpod-network", &["kube", "k8s-openapi", "oci-spec", "oci-client"]),
    ("vmpod-machine", &["kube", "k8s-openapi", "oci-spec", "oci-client"]),
    ("vmpod-image", &["kube", "k8s-openapi"]),
    ("vmpod-apiserver", &["kube"]),
];

/// Checks dependencies, lints tables and descriptions in `cargo metadata --no-deps` output.
///
/// Development dependencies are free: a test may put a real peer on the other side.
pub(super) fn check(metadata: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let packages = metadata["packages"].as_array().map_or(&[][..], Vec::as_slice);
    if packages.is_empty() {
        findings.push(Finding::new("Cargo.toml", "cargo metadata names no packages"));
    }
    let ours: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        if package["description"].as_str().unwrap_or_default().is_empty() {
            findings.push(Finding::new(name, "has no description"));
        }
        let normal = package["dependencies"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|dependency| dependency["kind"].as_str() != Some("dev"))
            .filter_map(|dependency| dependency["name"].as_str());
        let allowed = ALLOWED.iter().find(|(member, _)| *member == name).map(|(_, allowed)| *allowed);
        let foreign = FOREIGN.iter().find(|(member, _)| *member == name).map_or(&[][..], |(_, foreign)| *foreign);
        if allowed.is_none() && !OUTSIDE.contains(&name) {
            findings.push(Finding::new(name, "is not in the table of crates (xtask/src/tidy/directions.rs)"));
        }
        for dependency in normal {
            let inside = ours.contains(&dependency);
            if inside && OUTSIDE.contains(&dependency) {
                findings.push(Finding::new(name, format!("depends on {dependency}, which nothing may use")));
            } else if inside && allowed.is_some_and(|allowed| !allowed.contains(&dependency)) {
                findings.push(Finding::new(name, format!("must not know {dependency}")));
            } else if foreign.contains(&dependency) {
                findings
                    .push(Finding::new(name, format!("must not know {dependency}: see its row in ARCHITECTURE.md")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn package(name: &str, dependencies: &[(&str, Option<&str>)]) -> Value {
        let dependencies: Vec<Value> =
            dependencies.iter().map(|(name, kind)| json!({"name": name, "kind": kind})).collect();
        json!({"name": name, "description": "d", "dependencies": dependencies})
    }

    #[test]
    fn allowed_directions_pass() {
        let metadata = json!({"packages": [
            package("vmpod-api", &[("serde", None)]),
            package("vmpod-fleet", &[("vmpod-api", None)]),
            package("e2e", &[("vmpod-fleet", None)]),
        ]});
        assert_eq!(check(&metadata), []);
    }

    #[test]
    fn a_forbidden_direction_is_found() {
        let metadata = json!({"packages": [
            package("vmpod-node", &[]),
            package("vmpod-fleet", &[("vmpod-node", None)]),
        ]});
        assert_eq!(check(&metadata), [Finding::new("vmpod-fleet", "must not know vmpod-node")]);
    }

    #[test]
    fn a_foreign_crate_is_found_but_not_in_tests() {
        let metadata = json!({"packages": [package("vmpod-machine", &[("kube", None), ("k8s-openapi", Some("dev"))])]});
        let findings = check(&metadata);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].what.contains("must not know kube"), "{findings:?}");
    }

    #[test]
    fn unknown_crates_and_missing_descriptions_are_found() {
        let metadata = json!({"packages": [{"name": "vmpod-common", "dependencies": []}]});
        let findings: Vec<String> = check(&metadata).iter().map(ToString::to_string).collect();
        assert_eq!(findings.len(), 2, "{findings:?}");
        assert!(findings[0].contains("no description") && findings[1].contains("not in the table"), "{findings:?}");
    }

    #[test]
    fn nothing_may_use_the_test_crates() {
        let metadata =
            json!({"packages": [package("e2e", &[]), package("xtask", &[]), package("vmpod", &[("e2e", None)])]});
        assert_eq!(check(&metadata), [Finding::new("vmpod", "depends on e2e, which nothing may use")]);
    }

    #[test]
    fn empty_metadata_is_a_finding() {
        assert_eq!(check(&json!({})).len(), 1);
    }
}
