//! A node's certificates, renewed while they are good: the one by which it is known to the API, and the one that its kubelet API shows.
//!
//! Both are asked for with a `CertificateSigningRequest`, as kubelets do (Kubernetes documentation, "Configure Certificate Rotation for the
//! Kubelet"): when between 70 and 90 % of a certificate's life are over, each node at its own time.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::future::BoxFuture;
use http::{Request, Response};
use jiff::Timestamp;
use kube::client::Body;
use serde_json::json;
use tower::{BoxError, Service};
use x509_parser::pem::Pem;

use crate::bootstrap::{self, Kind};
use crate::client;
use crate::home;

/// How long to wait after a renewal failed, first and at most. The old certificate is good meanwhile.
const AGAIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_mins(10));
/// No certificate is renewed sooner than this after it came: by a clock that is wrong, all of them are over.
const REST: Duration = Duration::from_secs(10);

/// From when to when a certificate is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    from: Timestamp,
    until: Timestamp,
}

impl Life {
    /// Of the first certificate in a PEM text.
    pub(crate) fn of(pem: &[u8]) -> Result<Self> {
        let pem = Pem::iter_from_buffer(pem).next().context("there is no certificate")?.context("it isn't PEM")?;
        let certificate = pem.parse_x509().context("it is no certificate")?;
        let time = |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp());
        let validity = certificate.validity();
        Ok(Self { from: time(validity.not_before)?, until: time(validity.not_after)? })
    }

    pub(crate) fn is_over(self, now: Timestamp) -> bool {
        now >= self.until
    }

    /// When to have the next one: `share`, from 0 to 1, says where between 70 and 90 % of its life; `most` from now at the latest. Who
    /// signs dates certificates back, so what counts for `most` is that it is here now.
    fn renewal(self, share: f64, now: Timestamp, most: Option<Duration>) -> Timestamp {
        let life = Duration::try_from(self.until.duration_since(self.from)).unwrap_or_default();
        let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
        let usual = self.from.checked_add(life.mul_f64(0.7 + 0.2 * share)).unwrap_or(self.until);
        most.and_then(|most| now.checked_add(most).ok()).map_or(usual, |latest| usual.min(latest))
    }
}

/// A client whose certificate can change: requests go out with the newest one.
#[derive(Clone)]
pub(crate) struct Changing {
    current: Arc<RwLock<kube::Client>>,
}

impl Changing {
    /// Begins with this one.
    pub(crate) fn new(client: kube::Client) -> Self {
        Self { current: Arc::new(RwLock::new(client)) }
    }

    /// The client for everybody: it stays the same whatever it stands for.
    pub(crate) fn client(&self, namespace: &str) -> kube::Client {
        kube::Client::new(self.clone(), namespace)
    }

    fn current(&self) -> kube::Client {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, client: kube::Client) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = client;
    }
}

impl Service<Request<Body>> for Changing {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let client = self.current();
        Box::pin(async move { client.send(request).await.map_err(Into::into) })
    }
}

/// The node's identity, kept in a kubeconfig of ours.
pub(crate) struct Identity {
    pub(crate) kubeconfig: PathBuf,
    pub(crate) name: String,
    pub(crate) client: Changing,
    /// A certificate is renewed after this at the latest.
    pub(crate) most: Option<Duration>,
}

impl Identity {
    /// Renews it for as long as it runs.
    pub(crate) async fn keep(self) {
        loop {
            let life = match self.life() {
                Ok(life) => life,
                Err(error) => {
                    tracing::warn!("the node's identity isn't renewed: {error:#}");
                    return;
                }
            };
            until(life.renewal(rand::random(), Timestamp::now(), self.most)).await;
            persist("the node's identity", || self.renew()).await;
            tokio::time::sleep(REST).await;
        }
    }

    fn life(&self) -> Result<Life> {
        Life::of(&client::certificate(&self.kubeconfig)?)
    }

    async fn renew(&self) -> Result<()> {
        let (certificate, key) = bootstrap::ask(&self.client.current(), &self.name, &Kind::Client).await?;
        let user = json!({
            "client-certificate-data": BASE64.encode(certificate),
            "client-key-data": BASE64.encode(key),
        });
        let user_name = format!("system:node:{}", self.name);
        let text = client::kubeconfig_as(&self.kubeconfig, &user_name, &user)?;
        // Kept first: an agent that ends now must find what the API was told last.
        home::write_private(&self.kubeconfig, &text)?;
        self.client.replace(client::from_file(&self.kubeconfig, None).await?);
        tracing::info!(kubeconfig = %self.kubeconfig.display(), "the node's identity was renewed");
        Ok(())
    }
}

/// The certificate that the kubelet API shows, signed by the cluster.
pub(crate) struct Shown {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) client: kube::Client,
    pub(crate) most: Option<Duration>,
}

impl Shown {
    /// Asks for one, and for the next in time. Each is passed to `use_it`: certificate and key, PEM.
    pub(crate) async fn keep<F: Future<Output = Result<()>>>(self, use_it: impl Fn(String, String) -> F) {
        loop {
            // One that an earlier agent got is as good; what can't be read is asked for anew.
            let known = std::fs::read(&self.certificate).ok().and_then(|pem| Life::of(&pem).ok());
            if let Some(life) = known.filter(|life| !life.is_over(Timestamp::now())) {
                until(life.renewal(rand::random(), Timestamp::now(), self.most)).await;
            }
            persist("the kubelet API's certificate", || async {
                let kind = Kind::Serving { address: self.address.clone() };
                let (certificate, key) = bootstrap::ask(&self.client, &self.name, &kind).await?;
                let certificate = String::from_utf8(certificate).context("the certificate isn't PEM")?;
                home::write_private(&self.key, &key)?;
                home::write_private(&self.certificate, &certificate)?;
                use_it(certificate, key).await?;
                tracing::info!("the kubelet API has a certificate of the cluster's");
                Ok(())
            })
            .await;
            tokio::time::sleep(REST).await;
        }
    }
}

/// Does something until it succeeds, with waits between.
async fn persist<F: Future<Output = Result<()>>>(what: &str, work: impl Fn() -> F) {
    let mut wait = AGAIN.0;
    while let Err(error) = work().await {
        tracing::warn!("{what} could not be renewed; trying again in {} s: {error:#}", wait.as_secs());
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(AGAIN.1);
    }
}

/// Waits until a time by the clock on the wall, which may be set meanwhile and stands still while a host sleeps.
async fn until(time: Timestamp) {
    loop {
        let left = Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or_default();
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(Duration::from_mins(1))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(from: i64, until: i64) -> Life {
        Life { from: Timestamp::from_second(from).unwrap(), until: Timestamp::from_second(until).unwrap() }
    }

    #[test]
    fn a_certificate_is_renewed_when_most_of_its_life_is_over_and_some_is_left() {
        let (year, now) = (life(0, 1000), Timestamp::from_second(300).unwrap());
        assert_eq!(year.renewal(0.0, now, None).as_second(), 700);
        assert_eq!(year.renewal(1.0, now, None).as_second(), 900);
        assert_eq!(
            year.renewal(0.5, now, Some(Duration::from_mins(1))).as_second(),
            360,
            "from now, not from its date"
        );
        assert_eq!(year.renewal(0.5, now, Some(Duration::from_hours(1))).as_second(), 800);
        assert_eq!(year.renewal(f64::NAN, now, None).as_second(), 700, "no share is odd enough to panic");
        assert!(
            year.is_over(Timestamp::from_second(1000).unwrap()) && !year.is_over(Timestamp::from_second(999).unwrap())
        );
        // A clock that was set back makes it due later, and one that ends before it begins at once.
        assert!(life(1000, 0).renewal(0.5, now, None).as_second() <= 1000);
    }

    #[test]
    fn the_life_is_read_from_the_certificate() {
        let mut params = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2027, 1, 1);
        let pem = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        let read = Life::of(pem.as_bytes()).unwrap();
        assert_eq!(read.until.duration_since(read.from).as_hours(), 365 * 24);
        assert!(Life::of(b"rubbish").is_err());
        assert!(Life::of(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").is_err());
    }

    #[tokio::test]
    async fn requests_go_out_with_the_newest_client() {
        let by = |name: &'static str| {
            kube::Client::new(
                tower::service_fn(move |_: Request<Body>| async move {
                    let body = json!({"major": name, "minor": "", "gitVersion": "", "gitCommit": "", "gitTreeState": "",
                        "buildDate": "", "goVersion": "", "compiler": "", "platform": ""});
                    Ok::<_, BoxError>(Response::new(Body::from(serde_json::to_vec(&body)?)))
                }),
                "default",
            )
        };
        let changing = Changing::new(by("old"));
        let client = changing.client("default");
        assert_eq!(client.apiserver_version().await.unwrap().major, "old");
        changing.replace(by("new"));
        assert_eq!(client.apiserver_version().await.unwrap().major, "new");
    }
}
