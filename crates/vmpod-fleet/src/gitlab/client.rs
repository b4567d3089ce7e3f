//! Calls to one GitLab.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderMap, Method, StatusCode};
use jiff::Timestamp;
use reqwest::Url;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::record::Token;
use crate::limit::{Heard, Limit};
use crate::provider::Calls;

/// Why GitLab could not be asked, or what it said instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL of the pool is none.
    #[error("{url:?} is no URL of a GitLab: write https://gitlab.example.com")]
    Url {
        /// As it is written.
        url: String,
    },
    /// The certificates of the pool are none.
    #[error("the CA certificates for {url} can't be used: they must be PEM")]
    Ca {
        /// The GitLab.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It wants to be left alone, or a pause after failures isn't over.
    #[error("{url} is left alone until {until}: {why}")]
    Paused {
        /// The GitLab.
        url: String,
        /// When to ask again.
        until: Timestamp,
        /// What it last said.
        why: &'static str,
    },
    /// Too many calls.
    #[error("{url} limits the rate of calls; the next is made at {until}")]
    Limited {
        /// The GitLab.
        url: String,
        /// When to ask again.
        until: Timestamp,
    },
    /// It is broken or under maintenance.
    #[error("{url} can't answer now ({status}, {message}); the next call is made at {until}")]
    Broken {
        /// The GitLab.
        url: String,
        /// How it answered.
        status: StatusCode,
        /// What it said.
        message: String,
        /// When to ask again.
        until: Timestamp,
    },
    /// It can't be reached.
    #[error("can't {what} at {url}")]
    Unreachable {
        /// What was to be done.
        what: &'static str,
        /// The GitLab.
        url: String,
        /// Why not.
        #[source]
        source: reqwest::Error,
    },
    /// The access token is wrong, or lacks a scope.
    #[error(
        "{url} does not let the access token {what} ({status}, {message}): it needs the scopes create_runner, manage_runner and read_api (or api)"
    )]
    Denied {
        /// What was to be done.
        what: &'static str,
        /// The GitLab.
        url: String,
        /// How it answered.
        status: StatusCode,
        /// What it said.
        message: String,
    },
    /// There is no such thing.
    #[error("{url} has nothing there to {what}")]
    NotFound {
        /// What was to be done.
        what: &'static str,
        /// The GitLab.
        url: String,
    },
    /// It doesn't want that.
    #[error("{url} refused to {what} ({status}): {message}")]
    Refused {
        /// What was to be done.
        what: &'static str,
        /// The GitLab.
        url: String,
        /// How it answered.
        status: StatusCode,
        /// What it said.
        message: String,
    },
    /// The answer is not what its API promises.
    #[error("can't {what}: the answer of {url} makes no sense")]
    Answer {
        /// What was to be done.
        what: &'static str,
        /// The GitLab.
        url: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Nobody can say how many jobs wait.
    #[error("{url} doesn't tell how many jobs wait for this pool: {why}")]
    NoDemand {
        /// The GitLab.
        url: String,
        /// Why not, and what to do.
        why: String,
    },
}

impl Error {
    /// When to try again, if GitLab or the pause says so.
    #[must_use]
    pub fn retry_at(&self) -> Option<Timestamp> {
        match self {
            Self::Paused { until, .. } | Self::Limited { until, .. } | Self::Broken { until, .. } => Some(*until),
            _ => None,
        }
    }

    /// Whether a person must change something before it can work.
    #[must_use]
    pub fn needs_a_person(&self) -> bool {
        matches!(self, Self::Url { .. } | Self::Ca { .. } | Self::Denied { .. } | Self::Refused { .. })
    }
}

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    limited: AtomicU64,
    failed: AtomicU64,
    paused: AtomicU64,
}

/// What is shared by all who call one GitLab: connections, the limit, what was learned of it.
#[derive(Debug)]
pub(super) struct Site {
    http: reqwest::Client,
    base: Url,
    limit: Mutex<Limit>,
    counters: Counters,
    /// When it was found not to know the question for waiting jobs.
    pub(super) no_pending_query: Mutex<Option<Timestamp>>,
    /// When each record's token was last found to be good.
    pub(super) verified: Mutex<HashMap<u64, Timestamp>>,
}

/// A lock whose holder can't have left half a change.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client for a CI system; `ca_pem` are certificates that are trusted beside the system's.
pub(crate) fn http(ca_pem: Option<&[u8]>) -> reqwest::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(10))
        .timeout(Duration::from_secs(30))
        // A token never follows to another place.
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("vmpod/", env!("CARGO_PKG_VERSION")));
    if let Some(pem) = ca_pem {
        builder = builder.tls_certs_merge(reqwest::Certificate::from_pem_bundle(pem)?);
    }
    builder.build()
}

impl Site {
    pub(super) fn new(url: &str, ca_pem: Option<&[u8]>) -> Result<Self, Error> {
        let bad = || Error::Url { url: url.to_owned() };
        let mut base = Url::parse(url).map_err(|_| bad())?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() || base.query().is_some() {
            return Err(bad());
        }
        // A GitLab below a path keeps it.
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        let http = http(ca_pem).map_err(|source| Error::Ca { url: url.to_owned(), source })?;
        Ok(Self {
            http,
            base,
            limit: Mutex::default(),
            counters: Counters::default(),
            no_pending_query: Mutex::default(),
            verified: Mutex::default(),
        })
    }

    pub(super) fn url(&self) -> String {
        self.base.as_str().trim_end_matches('/').to_owned()
    }

    pub(super) fn calls(&self) -> Calls {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { sent, limited, failed, paused } = &self.counters;
        Calls { sent: read(sent), limited: read(limited), failed: read(failed), paused: read(paused) }
    }
}

/// One call.
pub(super) struct Call<'a> {
    /// What it is for, after "can't".
    pub(super) what: &'static str,
    pub(super) method: Method,
    /// Below the GitLab's URL.
    pub(super) path: String,
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) body: Option<&'a Value>,
}

impl<'a> Call<'a> {
    pub(super) fn get(what: &'static str, path: impl Into<String>) -> Self {
        Self { what, method: Method::GET, path: path.into(), query: Vec::new(), body: None }
    }

    pub(super) fn send(what: &'static str, method: Method, path: impl Into<String>, body: &'a Value) -> Self {
        Self { what, method, path: path.into(), query: Vec::new(), body: Some(body) }
    }

    pub(super) fn query(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self
    }
}

/// A GitLab as the owner of an access token sees it.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) site: Arc<Site>,
    pub(super) token: Token,
}

/// Pages of 100 that are looked at in one list; more than that many runners or jobs need another way.
const PAGES: u32 = 100;

impl Client {
    /// Makes a call and reads its answer.
    pub(super) async fn json<T: DeserializeOwned>(&self, call: Call<'_>, now: Timestamp) -> Result<T, Error> {
        let what = call.what;
        let (_, body) = self.call(call, now).await?;
        self.read(what, &body)
    }

    fn read<T: DeserializeOwned>(&self, what: &'static str, body: &[u8]) -> Result<T, Error> {
        serde_json::from_slice(body).map_err(|source| Error::Answer { what, url: self.site.url(), source })
    }

    /// Reads a whole list, page by page. A list that breaks off is no list.
    pub(super) async fn list<T: DeserializeOwned>(
        &self,
        what: &'static str,
        path: &str,
        query: &[(&'static str, &str)],
        now: Timestamp,
    ) -> Result<Vec<T>, Error> {
        let (mut all, mut page) = (Vec::new(), "1".to_owned());
        for _ in 0..PAGES {
            let mut call = Call::get(what, path).query("per_page", "100").query("page", page.clone());
            call.query.extend(query.iter().map(|(name, value)| (*name, (*value).to_owned())));
            let (headers, body) = self.call(call, now).await?;
            all.append(&mut self.read::<Vec<T>>(what, &body)?);
            match headers.get("x-next-page").and_then(|next| next.to_str().ok()) {
                Some(next) if !next.is_empty() => next.clone_into(&mut page),
                _ => return Ok(all),
            }
        }
        let message = format!("the list has more than {PAGES} pages");
        Err(Error::Refused { what, url: self.site.url(), status: StatusCode::OK, message })
    }

    /// Makes a call.
    pub(super) async fn call(&self, call: Call<'_>, now: Timestamp) -> Result<(HeaderMap, Vec<u8>), Error> {
        let (site, what) = (&self.site, call.what);
        let url = site.url();
        let waits = lock(&site.limit).wait(now);
        if let Some(until) = waits {
            site.counters.paused.fetch_add(1, Ordering::Relaxed);
            return Err(Error::Paused { url, until, why: "it asked for that, or failed before" });
        }
        let mut target = site.base.join(&call.path).map_err(|_| Error::Url { url: format!("{url}/{}", call.path) })?;
        if !call.query.is_empty() {
            target.query_pairs_mut().extend_pairs(&call.query);
        }
        let mut request = site.http.request(call.method, target);
        request = request.header("PRIVATE-TOKEN", self.token.expose());
        if let Some(body) = call.body {
            request = request.json(body);
        }
        site.counters.sent.fetch_add(1, Ordering::Relaxed);
        let answered = async {
            let response = request.send().await?;
            let (status, headers) = (response.status(), response.headers().clone());
            Ok::<_, reqwest::Error>((status, headers, response.bytes().await?))
        };
        let (status, headers, body) = match answered.await {
            Ok(answer) => answer,
            Err(source) => {
                site.counters.failed.fetch_add(1, Ordering::Relaxed);
                lock(&site.limit).hear(Heard::Broken(None), now);
                return Err(Error::Unreachable { what, url, source });
            }
        };
        let message = message(&body);
        let mut heard = Heard::of(status, &headers, now);
        // Maintenance of an older GitLab.
        if status == StatusCode::FORBIDDEN && message.contains("read-only instance") {
            heard = Heard::Broken(None);
        }
        let until = lock(&site.limit).hear(heard, now).unwrap_or(now);
        if status.is_success() {
            return Ok((headers, body.to_vec()));
        }
        Err(match (heard, status) {
            (Heard::Broken(_), _) => {
                site.counters.failed.fetch_add(1, Ordering::Relaxed);
                Error::Broken { url, status, message, until }
            }
            (_, StatusCode::TOO_MANY_REQUESTS) => {
                site.counters.limited.fetch_add(1, Ordering::Relaxed);
                Error::Limited { url, until }
            }
            (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Error::Denied { what, url, status, message },
            (_, StatusCode::NOT_FOUND) => Error::NotFound { what, url },
            _ => Error::Refused { what, url, status, message },
        })
    }
}

/// What an answer says to people, in one line that isn't too long.
pub(crate) fn message(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(body) {
        Ok(value) => match ["message", "error_description", "error"].iter().find_map(|name| value.get(name)) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => value.to_string(),
        },
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(200).collect();
    if line.is_empty() { "no word why".into() } else { line }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_is_one_line_of_what_was_said() {
        assert_eq!(message(br#"{"message":"403 Forbidden"}"#), "403 Forbidden");
        assert_eq!(message(br#"{"message":{"base":["too many"]}}"#), r#"{"base":["too many"]}"#);
        assert_eq!(message(br#"{"error":"insufficient_scope","error_description":"needs api"}"#), "needs api");
        assert_eq!(message(b"<html>\n bad\n gateway"), "<html> bad gateway");
        assert_eq!(message(b""), "no word why");
    }

    #[test]
    fn a_url_is_checked_once() {
        for bad in ["", "gitlab.example.com", "ftp://x", "https://", "https://x/?y=1"] {
            let error = Site::new(bad, None).map(drop).unwrap_err();
            assert!(matches!(error, Error::Url { .. }), "{bad}: {error}");
        }
        drop(rustls::crypto::ring::default_provider().install_default());
        let site = Site::new("https://example.com/gitlab", None).unwrap();
        assert_eq!(site.base.join("api/v4/version").unwrap().as_str(), "https://example.com/gitlab/api/v4/version");
    }

    proptest! {
        #[test]
        fn any_body_makes_a_short_line(body in prop::collection::vec(any::<u8>(), 0..600)) {
            let line = message(&body);
            prop_assert!(!line.is_empty() && line.chars().count() <= 200 && !line.contains('\n'));
        }
    }
}
