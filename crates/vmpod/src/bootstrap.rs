//! A node's own identity, got by a bootstrap token: a certificate request that the API's side approves and signs.
//!
//! As kubelets do it (Kubernetes documentation, "TLS bootstrapping"): the signer is
//! `kubernetes.io/kube-apiserver-client-kubelet`, the subject `O=system:nodes, CN=system:node:NAME`. The certificate of the kubelet API is
//! asked for in the same way, of the signer `kubernetes.io/kubelet-serving`.

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
use crate::identity::Life;
use crate::output::talk;
use crate::report::Remedy;

/// What a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The node's own requests.
    Client,
    /// The kubelet API, at this address besides the node's name.
    Serving {
        /// The address.
        address: String,
    },
}

impl Kind {
    fn signer(&self) -> &'static str {
        match self {
            Self::Client => "kubernetes.io/kube-apiserver-client-kubelet",
            Self::Serving { .. } => "kubernetes.io/kubelet-serving",
        }
    }
}

/// An approval that comes at once isn't worth a word.
const PATIENCE: Duration = Duration::from_secs(3);

/// Makes the kubeconfig `into`, unless there is one whose certificate is still good. Waits for as long as nobody approves.
pub(crate) async fn ensure(into: &Path, bootstrap: &Path, name: &str) -> Result<()> {
    if into.exists() {
        let life = client::certificate(into).and_then(|pem| Life::of(&pem));
        match life {
            Ok(life) if life.is_over(jiff::Timestamp::now()) => {
                talk(&format!("the certificate in {} is over; asking for another", into.display()));
            }
            // One without a certificate may have a token, and one that can't be read is told of when it is used.
            Ok(_) | Err(_) => return Ok(()),
        }
    }
    let client = client::from_file(bootstrap, None).await?;
    let (certificate, key) = ask(&client, name, &Kind::Client)
        .await
        .with_context(|| format!("can't get a certificate with the token of {}", bootstrap.display()))?;
    let user = json!({
        "client-certificate-data": BASE64.encode(certificate),
        "client-key-data": BASE64.encode(key),
    });
    home::write_private(into, &client::kubeconfig_as(bootstrap, &format!("system:node:{name}"), &user)?)?;
    talk(&format!("the node's identity is system:node:{name}, kept in {}", into.display()));
    Ok(())
}

/// Asks for a certificate and waits for as long as nobody approves: the certificate chain and its key, PEM.
pub(crate) async fn ask(client: &kube::Client, name: &str, kind: &Kind) -> Result<(Vec<u8>, String)> {
    let key = KeyPair::generate().context("can't make a key")?;
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let made = requests.create(&PostParams::default(), &request(name, &key, kind)?).await;
    let made = made.context("can't ask for a certificate")?;
    let certificate = signed(&requests, made.metadata.name.as_deref().unwrap_or_default()).await?;
    Ok((certificate, key.serialize_pem()))
}

fn request(name: &str, key: &KeyPair, kind: &Kind) -> Result<CertificateSigningRequest> {
    let names = match kind {
        Kind::Client => Vec::new(),
        Kind::Serving { address } => vec![name.to_owned(), address.clone()],
    };
    let mut params = CertificateParams::new(names).context("the node's name or address can't be in a certificate")?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{name}"));
    let request = params.serialize_request(key).and_then(|request| request.pem());
    let request = request.context("can't make the certificate request")?;
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("node-csr-".to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(request.into_bytes()),
            signer_name: kind.signer().to_owned(),
            usages: Some(vec![
                "digital signature".to_owned(),
                if *kind == Kind::Client { "client auth" } else { "server auth" }.to_owned(),
            ]),
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
        let made = request("far", &key, &Kind::Client).unwrap();
        assert_eq!(made.spec.signer_name, "kubernetes.io/kube-apiserver-client-kubelet");
        let pem = String::from_utf8(made.spec.request.0).unwrap();
        let params = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap().params;
        let name = params.distinguished_name;
        assert_eq!(format!("{:?}", name.get(&DnType::CommonName)).matches("system:node:far").count(), 1);
        assert_eq!(format!("{:?}", name.get(&DnType::OrganizationName)).matches("system:nodes").count(), 1);
    }

    #[test]
    fn the_kubelet_apis_certificate_is_for_its_name_and_address() {
        let key = KeyPair::generate().unwrap();
        let made = request("far", &key, &Kind::Serving { address: "192.0.2.7".to_owned() }).unwrap();
        assert_eq!(made.spec.signer_name, "kubernetes.io/kubelet-serving");
        assert_eq!(made.spec.usages.as_deref(), Some(&["digital signature".to_owned(), "server auth".to_owned()][..]));
        let pem = String::from_utf8(made.spec.request.0).unwrap();
        let names = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap().params.subject_alt_names;
        let names = format!("{names:?}");
        assert!(names.contains("far") && names.contains("192.0.2.7"), "{names}");
    }

    #[test]
    fn an_answer_is_a_certificate_or_a_reason() {
        let with = |status: serde_json::Value| -> CertificateSigningRequest {
            serde_json::from_value(json!({"metadata": {"name": "r"}, "status": status,
                "spec": {"request": "", "signerName": "s"}}))
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
