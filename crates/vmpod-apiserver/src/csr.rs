//! Certificate signing requests: kubelets' are approved and signed, others wait for a person.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::FromDer as _;

use crate::auth::authorize::{self, Attributes, Decision};
use crate::identity::Identity;
use crate::kinds::Resource;
use crate::pki::Usage;
use crate::server::Server;
use crate::status::Status;
use crate::store::{Change, EventKind, Object};

/// The storage name of the requests.
pub(crate) const CSRS: &str = "certificatesigningrequests.certificates.k8s.io";
const GROUP: &str = "certificates.k8s.io";
const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
const CLIENT: &str = "kubernetes.io/kube-apiserver-client";

/// Whether the caller may approve or sign for the signer that a request names: Kubernetes asks for the verbs
/// `approve` and `sign` on the resource `signers`, by the signer's name or its domain's.
pub(crate) fn admit(
    server: &Server,
    identity: &Identity,
    resource: &Resource,
    subresource: Option<&str>,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), Status> {
    if !resource.is("certificates.CertificateSigningRequest") {
        return Ok(());
    }
    let before = old.unwrap_or(&Value::Null);
    let verb = match subresource {
        Some("approval") if before["status"]["conditions"] != new["status"]["conditions"] => "approve",
        Some("status") if before["status"] != new["status"] => "sign",
        _ => return Ok(()),
    };
    let signer = new["spec"]["signerName"].as_str().unwrap_or_default();
    let domain = format!("{}/*", signer.split('/').next().unwrap_or_default());
    let may = |name: &str| allowed(server, identity, verb, "signers", "", name);
    if may(signer) || may(&domain) {
        return Ok(());
    }
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    let why = format!("user not permitted to {verb} requests with signerName {signer:?}");
    Err(Status::forbidden(resource, name, &why))
}

fn allowed(server: &Server, identity: &Identity, verb: &str, resource: &str, subresource: &str, name: &str) -> bool {
    let ask = Attributes { verb, group: GROUP, resource, subresource, name, ..Attributes::default() };
    authorize::decide(server, identity, &ask) == Decision::Allow
}

/// Approves and signs requests until `stop` is cancelled.
pub(crate) async fn run(server: Arc<Server>, stop: CancellationToken) {
    loop {
        let (listed, mut feed) = server.store.list_and_watch(CSRS, None);
        for object in &listed.objects {
            step(&server, object).await;
        }
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = feed.events.recv() => event,
            };
            let Some(event) = event else { break };
            if event.kind == EventKind::Put {
                step(&server, &event.object).await;
            }
        }
    }
}

async fn step(server: &Server, object: &Object) {
    let result: Result<_, Status> = server
        .store
        .mutate(object.key(), None, |old, _| {
            let old = old.ok_or_else(Status::no_route)?;
            Ok(plan(server, &old.value(), jiff::Timestamp::now()).map_or(Change::Keep, Change::Put))
        })
        .await;
    if let Err(status) = result
        && status.code != 404
    {
        tracing::warn!(request = %object.key().name, error = %status, "a certificate signing request is not answered");
    }
}

fn has(csr: &Value, kind: &str) -> bool {
    csr["status"]["conditions"]
        .as_array()
        .is_some_and(|list| list.iter().any(|one| one["type"] == kind && one["status"] != "False"))
}

/// The request with the next thing done to it, if there is one.
fn plan(server: &Server, csr: &Value, now: jiff::Timestamp) -> Option<Value> {
    if has(csr, "Denied") || has(csr, "Failed") || csr["status"]["certificate"].is_string() {
        return None;
    }
    let signer = csr["spec"]["signerName"].as_str()?;
    let mut next = csr.clone();
    let mut changed = false;
    if !has(csr, "Approved") {
        if signer != KUBELET_CLIENT || !may_become(server, csr) {
            return None;
        }
        add_condition(
            &mut next,
            "Approved",
            "AutoApproved",
            "Auto approving kubelet client certificate after SubjectAccessReview.",
            now,
        );
        changed = true;
    }
    let usage = match signer {
        KUBELET_CLIENT | CLIENT => Usage::Client,
        KUBELET_SERVING => Usage::Server,
        // Somebody else's to sign.
        _ => return changed.then_some(next),
    };
    let life = csr["spec"]["expirationSeconds"].as_u64().map(Duration::from_secs);
    match signed(server, csr, signer, usage, life) {
        Ok(pem) => next["status"]["certificate"] = STANDARD.encode(pem).into(),
        Err(why) => add_condition(&mut next, "Failed", "SignerValidationFailure", &why, now),
    }
    Some(next)
}

fn add_condition(csr: &mut Value, kind: &str, reason: &str, message: &str, now: jiff::Timestamp) {
    let now = crate::time::seconds(now);
    let condition = json!({
        "type": kind, "status": "True", "reason": reason, "message": message, "lastUpdateTime": now, "lastTransitionTime": now,
    });
    match csr["status"]["conditions"].as_array_mut() {
        Some(list) => list.push(condition),
        None => csr["status"]["conditions"] = json!([condition]),
    }
}

fn request_pem(csr: &Value) -> Option<String> {
    String::from_utf8(STANDARD.decode(csr["spec"]["request"].as_str()?).ok()?).ok()
}

/// The subject of a request: its only common name, and its organisations.
fn subject(pem: &str) -> Option<(String, Vec<String>)> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    let (_, request) = x509_parser::certification_request::X509CertificationRequest::from_der(&pem.contents).ok()?;
    let name = &request.certification_request_info.subject;
    crate::pki::subject_of(name)
}

fn is_node(subject: &(String, Vec<String>)) -> bool {
    subject.0.starts_with("system:node:") && subject.1 == [crate::identity::NODES]
}

/// The node that a request is for and the right that its author needs: a node for its own certificate,
/// a bootstrapping host for its first.
fn node_wanted(csr: &Value) -> Option<(Identity, &'static str)> {
    let subject = request_pem(csr).and_then(|pem| subject(&pem)).filter(is_node)?;
    let user = csr["spec"]["username"].as_str().unwrap_or_default();
    let groups = csr["spec"]["groups"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
    let author = Identity { user: user.into(), groups: groups.collect(), ..Identity::default() };
    Some((author, if user == subject.0 { "selfnodeclient" } else { "nodeclient" }))
}

fn may_become(server: &Server, csr: &Value) -> bool {
    node_wanted(csr)
        .is_some_and(|(author, right)| allowed(server, &author, "create", "certificatesigningrequests", right, ""))
}

fn signed(server: &Server, csr: &Value, signer: &str, usage: Usage, life: Option<Duration>) -> Result<String, String> {
    let pem = request_pem(csr).ok_or("the request is not PEM")?;
    let subject = subject(&pem).ok_or("the request's subject can't be read")?;
    let kubelet = matches!(signer, KUBELET_CLIENT | KUBELET_SERVING);
    if kubelet && !is_node(&subject) {
        return Err("subject must be system:node:NAME in the organization system:nodes".into());
    }
    if signer == KUBELET_SERVING && csr["spec"]["username"].as_str() != Some(subject.0.as_str()) {
        return Err("a kubelet serving certificate is only for the node itself".into());
    }
    if !kubelet && subject.1.iter().any(|group| group == crate::identity::MASTERS) {
        return Err("system:masters is not given by a signing request".into());
    }
    let issued = server.pki.sign(&pem, usage, life).map_err(|error| error.to_string())?;
    // The signer reads the request by itself: what counts is what it wrote.
    if crate::pki::subject_of_pem(&issued).as_ref() != Some(&subject) {
        return Err("the certificate would name another subject than the request: give one CN and one O".into());
    }
    Ok(issued)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    /// A request with these parts of a subject, in this order. Identifiers that are spelled out let
    /// one type of name be there twice.
    fn request(parts: &[(DnType, &str)]) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in parts {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
    }

    #[test]
    fn a_subject_has_one_common_name() {
        let again = DnType::CustomDnType(vec![2, 5, 4, 3]);
        let group = (DnType::OrganizationName, crate::identity::NODES);
        let one = request(&[group.clone(), (DnType::CommonName, "system:node:n1")]);
        assert_eq!(subject(&one), Some(("system:node:n1".into(), vec![crate::identity::NODES.into()])));
        let two = request(&[group.clone(), (DnType::CommonName, "system:node:n1"), (again, "system:node:n2")]);
        assert_eq!(subject(&two), None);
        let csr = json!({ "spec": {
            "request": STANDARD.encode(two), "username": "system:node:n1", "groups": [crate::identity::NODES],
        }});
        assert!(node_wanted(&csr).is_none());
        assert_eq!(subject(&request(&[group])), None);
    }
}
