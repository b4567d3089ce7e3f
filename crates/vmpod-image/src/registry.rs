//! One repository of a registry, as the OCI distribution specification describes it.
//!
//! Written on reqwest: the pipeline needs ranges that go on where they broke off, and the retries' reasons, which the kept client
//! crates hide.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use http::{Method, StatusCode, header};
use reqwest::redirect::{Action, Attempt, Policy};
use reqwest::{RequestBuilder, Response, Url};

use crate::blobs::{BlobError, BlobErrorKind, Blobs, Body};
use crate::credentials::{Credentials, CredentialsError};
use crate::digest::Digest;
use crate::format::Blob;
use crate::manifest::LARGEST;
use crate::media;
use crate::reference::Reference;

mod auth;
pub(crate) mod upload;

use auth::Auth;

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A connection on which nothing comes for so long is dead.
const STALL_LIMIT: Duration = Duration::from_secs(30);
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// Redirects that one request follows.
const MOST_REDIRECTS: usize = 10;

/// How to reach registries.
#[derive(Debug, Clone, Default)]
pub(crate) struct Access {
    pub(crate) credentials: Credentials,
    pub(crate) plain_http: Vec<String>,
    pub(crate) ca_files: Vec<PathBuf>,
}

/// A repository, for pulling or for pushing.
#[derive(Debug)]
pub(crate) struct Repository {
    client: reqwest::Client,
    /// `https://HOST/v2/REPOSITORY/`.
    base: String,
    host: String,
    auth: Auth,
    ranges: AtomicBool,
}

/// Why a registry can't be spoken to at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// A certificate authority's file.
    #[error("couldn't read the certificate authority {path}", path = path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The HTTP client.
    #[error("couldn't set up HTTPS")]
    Client(#[source] reqwest::Error),
    /// The credentials.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// No registry in the name.
    #[error("{0} names no registry")]
    Local(Reference),
    /// A request.
    #[error(transparent)]
    Request(#[from] BlobError),
}

/// Makes the process's TLS use ring, if nothing was chosen yet. Without a choice rustls can't work.
pub fn install_crypto_provider() {
    // An error says that there is one already: as good.
    drop(rustls::crypto::ring::default_provider().install_default());
}

impl Repository {
    /// The repository of `reference`. `push` asks for the right to write; `mount_from` for reading another repository there.
    pub(crate) async fn open(
        reference: &Reference,
        access: &Access,
        push: bool,
        mount_from: Option<&str>,
    ) -> Result<Self, RegistryError> {
        let host = reference.registry().ok_or_else(|| RegistryError::Local(reference.clone()))?;
        // What a token server is told is for it alone, so it can't send us elsewhere.
        let direct = client(host, access, Policy::none())?;
        let client = client(host, access, Policy::custom(follow))?;
        let endpoint = if host == "docker.io" { "registry-1.docker.io" } else { host };
        let scheme = scheme(&client, endpoint, access).await;
        let credential = access.credentials.resolve(host, reference.repository()).await?;
        let repository = match reference.repository() {
            name if host == "docker.io" && !name.contains('/') => format!("library/{name}"),
            name => name.to_owned(),
        };
        let mut scopes = vec![format!("repository:{repository}:{}", if push { "pull,push" } else { "pull" })];
        scopes.extend(mount_from.map(|from| format!("repository:{from}:pull")));
        Ok(Self {
            auth: Auth::new(direct, (scheme == "http").then(|| access.plain_http.clone()), credential, scopes),
            client,
            base: format!("{scheme}://{endpoint}/v2/{repository}/"),
            host: host.to_owned(),
            ranges: AtomicBool::new(true),
        })
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Sends a request, with whatever authorization the registry asks for. The answer may be of any status.
    async fn send(
        &self,
        method: Method,
        url: &str,
        build: impl Fn(RequestBuilder) -> RequestBuilder + Send,
    ) -> Result<Response, BlobError> {
        let failed = |error: reqwest::Error| {
            let kind = if error.is_redirect() { BlobErrorKind::Fatal } else { BlobErrorKind::Transient(None) };
            BlobError::caused(kind, format!("registry {} can't be reached", self.host), error.without_url())
        };
        let mut token = self.auth.current();
        let mut asked = 0;
        loop {
            let mut request = build(self.client.request(method.clone(), url));
            if let Some(token) = &token {
                request = request.header(header::AUTHORIZATION, token.value.clone());
            }
            let response = request.send().await.map_err(failed)?;
            // Who is at the end of a redirect to elsewhere may not ask for this registry's credentials.
            if response.status() != StatusCode::UNAUTHORIZED || !same_origin(response.url(), url) {
                return Ok(response);
            }
            let next = self.auth.answer(response.headers(), token.as_ref(), &mut asked).await?;
            let Some(next) = next else { return Ok(response) };
            token = Some(next);
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// The manifest or index of a tag or digest.
    pub(crate) async fn manifest(&self, version: &str) -> Result<Vec<u8>, BlobError> {
        let accept = [media::OCI_MANIFEST, media::OCI_INDEX, media::DOCKER_MANIFEST, media::DOCKER_LIST].join(", ");
        let what = || format!("manifest {version}");
        let response = self
            .send(Method::GET, &self.url(&format!("manifests/{version}")), |request| {
                request.header(header::ACCEPT, &accept)
            })
            .await?;
        let response = self.check(response, &what()).await?;
        let said = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok()?.parse().ok());
        let bytes = self.small(response, &what()).await?;
        // A tag has no digest to verify by, but the registry says what it meant to send.
        let expected = version.parse().ok().or(said);
        match expected {
            Some(expected) if Digest::of(&bytes) != expected => Err(BlobError::new(
                BlobErrorKind::Transient(None),
                format!("registry {} sent wrong bytes for {}: they are not {expected}", self.host, what()),
            )),
            _ => Ok(bytes),
        }
    }

    /// A small blob, verified.
    pub(crate) async fn blob(&self, digest: Digest) -> Result<Vec<u8>, BlobError> {
        let what = format!("blob {digest}");
        let response = self.send(Method::GET, &self.url(&format!("blobs/{digest}")), |request| request).await?;
        let bytes = self.small(self.check(response, &what).await?, &what).await?;
        if Digest::of(&bytes) == digest {
            return Ok(bytes);
        }
        Err(BlobError::new(
            BlobErrorKind::Transient(None),
            format!("registry {} sent wrong bytes for {what}", self.host),
        ))
    }

    async fn small(&self, response: Response, what: &str) -> Result<Vec<u8>, BlobError> {
        let mut bytes = Vec::new();
        let mut body = self.body(response);
        while let Some(part) = body.try_next().await? {
            bytes.extend_from_slice(&part);
            if bytes.len() as u64 > LARGEST {
                return Err(BlobError::new(
                    BlobErrorKind::Fatal,
                    format!("{what} of registry {} is larger than {} MiB", self.host, LARGEST >> 20),
                ));
            }
        }
        Ok(bytes)
    }

    fn body(&self, response: Response) -> Body {
        let host = self.host.clone();
        response
            .bytes_stream()
            .map_err(move |error| {
                BlobError::caused(
                    BlobErrorKind::Transient(None),
                    format!("the connection to registry {host} broke"),
                    error.without_url(),
                )
            })
            .boxed()
    }

    /// Turns any status but success into an error with the registry's own words.
    async fn check(&self, response: Response, what: &str) -> Result<Response, BlobError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let after = response
            .headers()
            .get(header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let kind = match status {
            StatusCode::NOT_FOUND => BlobErrorKind::Missing,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => BlobErrorKind::Denied,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => BlobErrorKind::Transient(after),
            status if status.is_server_error() => BlobErrorKind::Transient(after),
            _ => BlobErrorKind::Fatal,
        };
        let words = words(response).await;
        Err(BlobError::new(kind, format!("registry {} answered {status} for {what}{words}", self.host)))
    }
}

#[async_trait::async_trait]
impl Blobs for Repository {
    async fn open(&self, blob: Blob, start: u64, end: u64) -> Result<Body, BlobError> {
        let url = self.url(&format!("blobs/{}", blob.digest));
        let part = start > 0 || end < blob.size;
        let range = format!("bytes={start}-{}", end.saturating_sub(1));
        let response = self
            .send(Method::GET, &url, |request| if part { request.header(header::RANGE, &range) } else { request })
            .await?;
        let response = self.check(response, &format!("blob {}", blob.digest)).await?;
        let status = response.status();
        let body = self.body(response);
        if !part || status == StatusCode::PARTIAL_CONTENT {
            return Ok(body);
        }
        // All of it came: leave out what wasn't asked for, and ask for no more parts of large blobs.
        self.ranges.store(false, Ordering::Relaxed);
        let mut skip = start;
        let rest = body.map_ok(move |mut part| {
            let step = skip.min(part.len() as u64);
            skip -= step;
            part.split_off(usize::try_from(step).unwrap_or(part.len()))
        });
        Ok(rest.boxed())
    }

    fn has_ranges(&self) -> bool {
        self.ranges.load(Ordering::Relaxed)
    }

    fn place(&self) -> &str {
        &self.host
    }
}

/// What a registry's error body says, for people: ` (CODE: message)`.
async fn words(response: Response) -> String {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let mut bytes = Vec::new();
    let mut body = response.bytes_stream();
    while let Some(Ok(part)) = body.next().await {
        bytes.extend_from_slice(&part);
        if bytes.len() > 64 << 10 {
            return String::new();
        }
    }
    match serde_json::from_slice::<Errors>(&bytes) {
        Ok(Errors { errors }) if !errors.is_empty() => {
            let clean = |text: &str| text.chars().filter(|c| !c.is_control()).take(200).collect::<String>();
            format!(" ({}: {})", clean(&errors[0].code), clean(&errors[0].message))
        }
        _ => String::new(),
    }
}

/// Follows a redirect, unless it would go on in the clear what began encrypted, or for ever.
fn follow(attempt: Attempt<'_>) -> Action {
    match refusal(attempt.previous(), attempt.url()) {
        Some(why) => attempt.error(why),
        None => attempt.follow(),
    }
}

/// Why a redirect isn't followed.
fn refusal(previous: &[Url], next: &Url) -> Option<&'static str> {
    if previous.len() > MOST_REDIRECTS {
        return Some("too many redirects");
    }
    let was_encrypted = previous.last().is_some_and(|url| url.scheme() == "https");
    (was_encrypted && next.scheme() != "https").then_some("it redirects from HTTPS to plain HTTP")
}

/// Whether an answer came from the scheme, host and port that were asked.
fn same_origin(answered: &Url, asked: &str) -> bool {
    Url::parse(asked).is_ok_and(|asked| asked.origin() == answered.origin())
}

fn client(host: &str, access: &Access, redirects: Policy) -> Result<reqwest::Client, RegistryError> {
    install_crypto_provider();
    let mut builder = reqwest::Client::builder()
        .redirect(redirects)
        .connect_timeout(CONNECT_LIMIT)
        .read_timeout(STALL_LIMIT)
        .user_agent(concat!("vmpod/", env!("CARGO_PKG_VERSION")));
    for path in &access.ca_files {
        let failed =
            |source: Box<dyn std::error::Error + Send + Sync>| RegistryError::CaFile { path: path.clone(), source };
        let pem = std::fs::read(path).map_err(|error| failed(error.into()))?;
        let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| failed(error.into()))?;
        builder = builder.tls_certs_merge(certificates);
    }
    if is_loopback(host) {
        builder = builder.no_proxy();
    }
    builder.build().map_err(RegistryError::Client)
}

/// Whether a `host[:port]` is this host, whatever a resolver says.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// HTTPS, unless plain HTTP was named for this host, or the host is this one and doesn't speak TLS.
async fn scheme(client: &reqwest::Client, host: &str, access: &Access) -> &'static str {
    if access.plain_http.iter().any(|named| named == host) {
        return "http";
    }
    if !is_loopback(host) {
        return "https";
    }
    let ping = async |scheme: &str| client.get(format!("{scheme}://{host}/v2/")).timeout(PROBE_LIMIT).send().await;
    if ping("https").await.is_ok() {
        return "https";
    }
    match ping("http").await {
        // A TLS server answers 400 to plain HTTP: then the trouble is with its certificate, which HTTPS will tell.
        Ok(response) if response.status() != StatusCode::BAD_REQUEST => "http",
        _ => "https",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example.com", "10.0.0.1:5000", "127.0.0.1.example.com", "[2001:db8::1]:5000"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn a_redirect_never_leaves_encryption() {
        let url = |text: &str| Url::parse(text).unwrap();
        let (tls, plain) = (url("https://a.example.com/"), url("http://b.example.com/"));
        assert!(refusal(std::slice::from_ref(&tls), &plain).is_some());
        for (from, to) in [(&tls, &tls), (&plain, &tls), (&plain, &plain)] {
            assert_eq!(refusal(std::slice::from_ref(from), to), None, "{from} {to}");
        }
        assert_eq!(refusal(&vec![tls.clone(); MOST_REDIRECTS], &tls), None);
        assert!(refusal(&vec![tls.clone(); MOST_REDIRECTS + 1], &tls).is_some());
    }

    #[test]
    fn another_port_is_another_origin() {
        let answered = Url::parse("https://a.example.com/x").unwrap();
        assert!(same_origin(&answered, "https://a.example.com:443/y"));
        for asked in ["https://a.example.com:5000/x", "http://a.example.com/x", "https://b.example.com/x", "?"] {
            assert!(!same_origin(&answered, asked), "{asked}");
        }
    }

    #[tokio::test]
    async fn plain_http_needs_to_be_named() {
        let client = client("registry.example.com", &Access::default(), Policy::none()).unwrap();
        let named = Access { plain_http: vec!["registry.example.com:5000".to_owned()], ..Access::default() };
        assert_eq!(scheme(&client, "registry.example.com:5000", &named).await, "http");
        assert_eq!(scheme(&client, "registry.example.com", &named).await, "https");
    }
}
