//! A small registry in this process whose every misdeed is scripted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use futures::StreamExt as _;
use http::{HeaderMap, Method, StatusCode, header};
use vmpod_image::Digest;

/// A misdeed on one request for a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another status.
    Status(u16),
    /// 429 with `Retry-After`.
    TooMany,
    /// Ends after so many bytes, as if that were all.
    Truncate(usize),
    /// Breaks the connection after so many bytes.
    Reset(usize),
    /// One byte is another.
    Wrong,
    /// No byte at all.
    Empty,
}

#[derive(Default)]
struct Inner {
    blobs: HashMap<(String, String), Bytes>,
    manifests: HashMap<(String, String), Bytes>,
    uploads: HashMap<String, Vec<u8>>,
    next_upload: usize,
    damaged: Option<(String, Bytes)>,
    fault: Option<(usize, Fault)>,
    /// How often each blob was asked for since the fault was set.
    turns: HashMap<String, usize>,
    write_fault: usize,
    writes: usize,
    write_faults_left: usize,
    redirect: Option<(&'static str, String)>,
    told: Vec<String>,
    delay: Duration,
    no_ranges: bool,
    login: Option<(bool, String)>,
    token_uses: Option<usize>,
    tokens: HashMap<String, usize>,
    asked: Vec<String>,
    ranges: Vec<String>,
    finished_uploads: usize,
    patches: usize,
    mounts: usize,
}

#[derive(Clone)]
pub(crate) struct Registry {
    host: String,
    inner: Arc<Mutex<Inner>>,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let registry = Self { host: listener.local_addr().unwrap().to_string(), inner: Arc::default() };
        let router = Router::new()
            .fallback(serve)
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(registry.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        registry
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// The first of every `n` requests for each blob goes wrong.
    pub(crate) fn fail_every(&self, n: usize, fault: Fault) {
        let mut inner = self.lock();
        inner.fault = Some((n, fault));
        inner.turns.clear();
        inner.ranges.clear();
    }

    /// Every `n`th write answers 503, `most` times: concurrent writes come in any order, so one of them may get every fault.
    pub(crate) fn fail_writes_every(&self, n: usize, most: usize) {
        let mut inner = self.lock();
        (inner.write_fault, inner.write_faults_left) = (n, most);
    }

    pub(crate) fn write_faults_left(&self) -> usize {
        self.lock().write_faults_left
    }

    /// Sends requests with `part` in their path to another host.
    pub(crate) fn redirect(&self, part: &'static str, host: &str) {
        self.lock().redirect = Some((part, host.to_owned()));
    }

    /// Whatever was said to be authorized: headers, and the bodies of requests for tokens.
    pub(crate) fn told(&self) -> Vec<String> {
        self.lock().told.clone()
    }

    /// How many tokens were given.
    pub(crate) fn tokens(&self) -> usize {
        self.lock().tokens.len()
    }

    pub(crate) fn serve_ranges(&self, yes: bool) {
        self.lock().no_ranges = !yes;
    }

    pub(crate) fn delay(&self, delay: Duration) {
        self.lock().delay = delay;
    }

    pub(crate) fn require(&self, bearer: bool, user: &str, password: &str) {
        use base64::Engine as _;
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        self.lock().login = Some((bearer, login));
    }

    pub(crate) fn expire_tokens_after(&self, uses: usize) {
        self.lock().token_uses = Some(uses);
    }

    pub(crate) fn damage_one_blob(&self) -> String {
        let mut inner = self.lock();
        let (key, bytes) = inner
            .blobs
            .iter()
            .filter(|(_, bytes)| bytes.len() > 10_000)
            .min()
            .map(|(k, v)| (k.clone(), v.clone()))
            .unwrap();
        let mut wrong = bytes.to_vec();
        wrong[5000] ^= 1;
        inner.damaged = Some((key.1.clone(), bytes));
        inner.blobs.insert(key.clone(), wrong.into());
        key.1
    }

    pub(crate) fn mend(&self) {
        let mut inner = self.lock();
        let (digest, bytes) = inner.damaged.take().unwrap();
        let key = inner.blobs.keys().find(|key| key.1 == digest).unwrap().clone();
        inner.blobs.insert(key, bytes);
    }

    pub(crate) fn manifest(&self, repository: &str, version: &str) -> Vec<u8> {
        self.lock().manifests[&(repository.to_owned(), version.to_owned())].to_vec()
    }

    pub(crate) fn put_blob(&self, repository: &str, bytes: Vec<u8>) -> Digest {
        let digest = Digest::of(&bytes);
        self.lock().blobs.insert((repository.to_owned(), digest.to_string()), bytes.into());
        digest
    }

    /// Takes everything of this registry over from another.
    pub(crate) fn copy_from(&self, other: &Self) {
        let (blobs, manifests) = {
            let other = other.lock();
            (other.blobs.clone(), other.manifests.clone())
        };
        let mut inner = self.lock();
        (inner.blobs, inner.manifests) = (blobs, manifests);
    }

    pub(crate) fn put_manifest(&self, repository: &str, tag: &str, bytes: Vec<u8>) {
        let digest = Digest::of(&bytes).to_string();
        self.put_manifest_as(repository, &digest, bytes.clone());
        self.put_manifest_as(repository, tag, bytes);
    }

    pub(crate) fn put_manifest_as(&self, repository: &str, version: &str, bytes: Vec<u8>) {
        self.lock().manifests.insert((repository.to_owned(), version.to_owned()), bytes.into());
    }

    pub(crate) fn blob_requests(&self) -> usize {
        self.lock().asked.len()
    }

    pub(crate) fn blobs_asked(&self) -> Vec<String> {
        self.lock().asked.clone()
    }

    pub(crate) fn ranges(&self) -> Vec<String> {
        self.lock().ranges.clone()
    }

    pub(crate) fn uploads(&self) -> usize {
        self.lock().finished_uploads
    }

    pub(crate) fn patches(&self) -> usize {
        self.lock().patches
    }

    pub(crate) fn mounts(&self) -> usize {
        self.lock().mounts
    }

    /// A refusal, when there is one.
    fn refuse(&self, headers: &HeaderMap) -> Option<Response> {
        let mut inner = self.lock();
        let (bearer, login) = inner.login.clone()?;
        let given =
            headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let fits = if bearer {
            let uses = inner.token_uses.unwrap_or(usize::MAX);
            given.strip_prefix("Bearer ").and_then(|token| inner.tokens.get_mut(token)).is_some_and(|used| {
                *used += 1;
                *used <= uses
            })
        } else {
            given == format!("Basic {login}")
        };
        let challenge = if bearer {
            format!(r#"Bearer realm="http://{}/token",service="test",scope="from the registry""#, self.host)
        } else {
            r#"Basic realm="test""#.to_owned()
        };
        (!fits).then(|| {
            Response::builder().status(401).header(header::WWW_AUTHENTICATE, challenge).body(Body::empty()).unwrap()
        })
    }
}

fn answer(status: StatusCode) -> Response {
    Response::builder().status(status).body(Body::empty()).unwrap()
}

async fn serve(State(registry): State<Registry>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let query = parts.uri.query().unwrap_or_default().to_owned();
    if let Some(given) = parts.headers.get(header::AUTHORIZATION) {
        registry.lock().told.push(given.to_str().unwrap().to_owned());
    }
    let redirect = registry.lock().redirect.clone();
    if let Some((_, host)) = redirect.filter(|(part, _)| path.contains(part)) {
        let at = format!("http://{host}{path}?{query}");
        return Response::builder().status(307).header(header::LOCATION, at).body(Body::empty()).unwrap();
    }
    if path == "/token" && parts.method == Method::POST {
        let form = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        registry.lock().told.push(String::from_utf8(form.to_vec()).unwrap());
        return answer(StatusCode::UNAUTHORIZED);
    }
    if path == "/token" {
        let mut inner = registry.lock();
        let given = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let login = inner.login.as_ref().map(|(_, login)| format!("Basic {login}"));
        if given != login.as_deref() || !query.contains("scope=repository%3A") {
            return answer(StatusCode::UNAUTHORIZED);
        }
        let token = format!("token{}", inner.tokens.len());
        inner.tokens.insert(token.clone(), 0);
        return Response::new(Body::from(format!(r#"{{"token":"{token}"}}"#)));
    }
    if let Some(refusal) = registry.refuse(&parts.headers) {
        return refusal;
    }
    let Some(rest) = path.strip_prefix("/v2/") else { return answer(StatusCode::NOT_FOUND) };
    if rest.is_empty() {
        return answer(StatusCode::OK);
    }
    if let Some((repository, version)) = rest.split_once("/manifests/") {
        return manifests(&registry, &parts.method, repository, version, body).await;
    }
    if let Some((repository, upload)) = rest.split_once("/blobs/uploads/") {
        return uploads(&registry, &parts.method, repository, upload, &query, body).await;
    }
    if let Some((repository, digest)) = rest.split_once("/blobs/") {
        return blobs(&registry, &parts.method, repository, digest, &parts.headers).await;
    }
    answer(StatusCode::NOT_FOUND)
}

async fn manifests(registry: &Registry, method: &Method, repository: &str, version: &str, body: Body) -> Response {
    if *method == Method::PUT {
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        registry.put_manifest(repository, version, bytes.to_vec());
        return answer(StatusCode::CREATED);
    }
    match registry.lock().manifests.get(&(repository.to_owned(), version.to_owned())) {
        Some(bytes) => Response::new(Body::from(bytes.clone())),
        None => answer(StatusCode::NOT_FOUND),
    }
}

async fn uploads(
    registry: &Registry,
    method: &Method,
    repository: &str,
    upload: &str,
    query: &str,
    body: Body,
) -> Response {
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let mut inner = registry.lock();
    inner.writes += 1;
    if inner.write_faults_left > 0 && inner.writes.is_multiple_of(inner.write_fault) {
        inner.write_faults_left -= 1;
        return answer(StatusCode::SERVICE_UNAVAILABLE);
    }
    let parameter = |name: &str| {
        let prefix = format!("{name}=");
        let value = query.split('&').find_map(|pair| pair.strip_prefix(&prefix))?;
        Some(value.replace("%3A", ":").replace("%2F", "/"))
    };
    if *method == Method::POST {
        if let (Some(digest), Some(from)) = (parameter("mount"), parameter("from"))
            && let Some(bytes) = inner.blobs.get(&(from, digest.clone())).cloned()
        {
            inner.blobs.insert((repository.to_owned(), digest), bytes);
            inner.mounts += 1;
            return answer(StatusCode::CREATED);
        }
        inner.next_upload += 1;
        let id = format!("u{}", inner.next_upload);
        inner.uploads.insert(id.clone(), Vec::new());
        let at = format!("/v2/{repository}/blobs/uploads/{id}?state=x");
        return Response::builder().status(202).header(header::LOCATION, at).body(Body::empty()).unwrap();
    }
    let Some(have) = inner.uploads.get_mut(upload) else { return answer(StatusCode::NOT_FOUND) };
    if *method == Method::GET {
        let at = format!("/v2/{repository}/blobs/uploads/{upload}?state=z");
        let range = format!("0-{}", have.len().saturating_sub(1));
        return Response::builder()
            .status(204)
            .header(header::LOCATION, at)
            .header(header::RANGE, range)
            .body(Body::empty())
            .unwrap();
    }
    have.extend_from_slice(&bytes);
    if *method == Method::PATCH {
        inner.patches += 1;
        let at = format!("/v2/{repository}/blobs/uploads/{upload}?state=y");
        return Response::builder().status(202).header(header::LOCATION, at).body(Body::empty()).unwrap();
    }
    let have = inner.uploads.remove(upload).unwrap();
    let digest = parameter("digest").unwrap();
    if Digest::of(&have).to_string() != digest {
        return answer(StatusCode::BAD_REQUEST);
    }
    inner.blobs.insert((repository.to_owned(), digest), have.into());
    inner.finished_uploads += 1;
    answer(StatusCode::CREATED)
}

async fn blobs(registry: &Registry, method: &Method, repository: &str, digest: &str, headers: &HeaderMap) -> Response {
    let range = headers.get(header::RANGE).map(|value| value.to_str().unwrap().to_owned());
    let (bytes, fault, ranges, delay) = {
        let mut inner = registry.lock();
        let Some(bytes) = inner.blobs.get(&(repository.to_owned(), digest.to_owned())).cloned() else {
            return answer(StatusCode::NOT_FOUND);
        };
        if *method == Method::HEAD {
            return answer(StatusCode::OK);
        }
        inner.asked.push(digest.to_owned());
        inner.ranges.push(range.clone().unwrap_or_default());
        let turn = inner.turns.entry(digest.to_owned()).or_default();
        *turn += 1;
        let turn = *turn;
        let fault = inner.fault.filter(|(n, _)| turn % n == 1).map(|(_, fault)| fault);
        (bytes, fault, !inner.no_ranges, inner.delay)
    };
    tokio::time::sleep(delay).await;
    let (status, mut bytes) = match range.filter(|_| ranges) {
        Some(range) => {
            let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            let end = end.parse::<usize>().unwrap().min(bytes.len() - 1);
            (206, bytes.slice(start.parse::<usize>().unwrap()..=end))
        }
        None => (200, bytes),
    };
    let builder = Response::builder().status(status);
    let chunked = |bytes: Bytes, broken: bool| {
        let parts: Vec<Result<Bytes, std::io::Error>> =
            bytes.chunks(65_536).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        let end = broken.then(|| Err(std::io::Error::other("scripted")));
        Body::from_stream(
            futures::stream::iter(parts)
                .chain(
                    futures::stream::once(async {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    })
                    .filter_map(|()| async { None }),
                )
                .chain(futures::stream::iter(end)),
        )
    };
    match fault {
        None => builder.body(Body::from(bytes)).unwrap(),
        Some(Fault::Status(status)) => answer(StatusCode::from_u16(status).unwrap()),
        Some(Fault::TooMany) => {
            Response::builder().status(429).header(header::RETRY_AFTER, "1").body(Body::empty()).unwrap()
        }
        Some(Fault::Truncate(at)) => builder.body(chunked(bytes.split_to(at.min(bytes.len())), false)).unwrap(),
        Some(Fault::Reset(at)) => builder.body(chunked(bytes.split_to(at.min(bytes.len())), true)).unwrap(),
        Some(Fault::Wrong) => {
            let mut wrong = bytes.to_vec();
            let middle = wrong.len() / 2;
            wrong[middle] ^= 0x40;
            builder.body(Body::from(wrong)).unwrap()
        }
        Some(Fault::Empty) => builder.body(Body::empty()).unwrap(),
    }
}
