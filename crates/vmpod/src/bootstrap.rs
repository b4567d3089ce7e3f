//! A node's own identity, got by a bootstrap token: a certificate request that the API's side approves and signs.
//!
//! As kubelets do it (Kubernetes documentation, "TLS bootstrapping"): the signer is
//! `kubernetes.io/kube-apiserver-client-kubelet`, the subject `O=system:nodes, CN=system:node:NAME`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::wait::{Condition, await_condition};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use serde_json::json;

use crate::client;
use crate::home;
use crate::output::talk;
use crate::report::Remedy;

const SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// An approval that comes at once isn't worth a word.
const PATIENCE: Duration = Duration::from_secs(3);

/// Makes the kubeconfig `into`, unless it is there already. Waits for as long as nobody approves.
pub(crate) async fn ensure(into: &Path, bootstrap: &Path, name: &str) -> Result<()> {
    if into.exists() {
        return Ok(());
    }
    let client = client::from_file(bootstrap, None).await?;
    let key = KeyPair::generate().context("can't make the node's key")?;
    let requests: Api<CertificateSigningRequest> = Api::all(client);
    let made = requests
        .create(&PostParams::default(), &request(name, &key)?)
        .await
        .with_context(|| format!("can't ask for a certificate with the token of {}", bootstrap.display()))?;
    let certificate = signed(&requests, made.metadata.name.as_deref().unwrap_or_default()).await?;
    let user = json!({
        "client-certificate-data": BASE64.encode(certificate),
        "client-key-data": BASE64.encode(key.serialize_pem()),
    });
    home::write_private(into, &client::kubeconfig_as(bootstrap, &format!("system:node:{name}"), &user)?)?;
    talk(&format!("the node's identity is system:node:{name}, kept in {}", into.display()));
    Ok(())
}

fn request(name: &str, key: &KeyPair) -> Result<CertificateSigningRequest> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{name}"));
    let request = params.serialize_request(key).and_then(|request| request.pem());
    let request = request.context("can't make the certificate request")?;
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("node-csr-".to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(request.into_bytes()),
            signer_name: SIGNER.to_owned(),
            usages: Some(vec!["digital signature".to_owned(), "client auth".to_owned()]),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    None,
    /// The certificate chain, PEM.
    Signed(Vec<u8>),
    /// Why there will be none.
    Refused(String),
}

fn answer(request: Option<&CertificateSigningRequest>) -> Answer {
    let Some(request) = request else { return Answer::Refused("it was deleted".to_owned()) };
    let Some(status) = &request.status else { return Answer::None };
    for condition in status.conditions.iter().flatten() {
        if matches!(condition.type_.as_str(), "Denied" | "Failed") && condition.status != "False" {
            let why = [condition.reason.as_deref(), condition.message.as_deref()];
            let why = why.into_iter().flatten().collect::<Vec<_>>().join(": ");
            return Answer::Refused(format!("{} ({why})", condition.type_));
        }
    }
    match &status.certificate {
        Some(certificate) if !certificate.0.is_empty() => Answer::Signed(certificate.0.clone()),
        _ => Answer::None,
    }
}

struct Answered;

impl Condition<CertificateSigningRequest> for Answered {
    fn matches_object(&self, request: Option<&CertificateSigningRequest>) -> bool {
        answer(request) != Answer::None
    }
}

async fn signed(requests: &Api<CertificateSigningRequest>, name: &str) -> Result<Vec<u8>> {
    let mut waiting = std::pin::pin!(await_condition(requests.clone(), name, Answered));
    let ended = if let Ok(ended) = tokio::time::timeout(PATIENCE, &mut waiting).await {
        ended
    } else {
        talk(&format!("waiting for the certificate request {name}: kubectl certificate approve {name}"));
        waiting.await
    };
    let request = ended.with_context(|| format!("can't watch the certificate request {name}"))?;
    match answer(request.as_ref()) {
        Answer::Signed(certificate) => Ok(certificate),
        Answer::Refused(why) => Err(Remedy::new(
            format!("the certificate request {name} was not granted: {why}"),
            "ask whoever keeps the cluster, and start `vmpod node` again",
        )
        .into()),
        Answer::None => anyhow::bail!("the certificate request {name} has no answer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_asks_for_a_nodes_identity() {
        let key = KeyPair::generate().unwrap();
        let made = request("far", &key).unwrap();
        assert_eq!(made.spec.signer_name, SIGNER);
        let pem = String::from_utf8(made.spec.request.0).unwrap();
        let params = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap().params;
        let name = params.distinguished_name;
        assert_eq!(format!("{:?}", name.get(&DnType::CommonName)).matches("system:node:far").count(), 1);
        assert_eq!(format!("{:?}", name.get(&DnType::OrganizationName)).matches("system:nodes").count(), 1);
    }

    #[test]
    fn an_answer_is_a_certificate_or_a_reason() {
        let with = |status: serde_json::Value| -> CertificateSigningRequest {
            serde_json::from_value(json!({"metadata": {"name": "r"}, "status": status,
                "spec": {"request": "", "signerName": SIGNER}}))
            .unwrap()
        };
        assert_eq!(answer(Some(&with(json!({})))), Answer::None);
        let approved = json!({"conditions": [{"type": "Approved", "status": "True"}]});
        assert_eq!(answer(Some(&with(approved))), Answer::None, "approved isn't signed");
        let denied =
            json!({"conditions": [{"type": "Denied", "status": "True", "reason": "Stranger", "message": "no"}]});
        assert_eq!(answer(Some(&with(denied))), Answer::Refused("Denied (Stranger: no)".to_owned()));
        assert_eq!(answer(Some(&with(json!({"certificate": "YQ=="})))), Answer::Signed(b"a".to_vec()));
        assert!(matches!(answer(None), Answer::Refused(_)));
    }
}
