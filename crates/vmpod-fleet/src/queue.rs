//! A provider that knows nothing of any CI system: one URL that tells how many jobs wait and which runners have one.
//!
//! It is asked with GET, once for all that a look needs, and answers
//!
//! ```json
//! {"pending": 3, "oldestSeconds": 42.5, "runners": {"large-x2x4": "busy", "large-k9w1": "idle"}}
//! ```
//!
//! A runner is one when its guest says so to the service, under the name that it got as `$(VMPOD_RUNNER_NAME)`. A word other
//! than `idle` counts as busy: it is no proof that the machine is free.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use http::StatusCode;
use jiff::Timestamp;
use reqwest::Url;
use serde::Deserialize;
use vmpod_api::pool::HttpQueue;

use crate::gitlab::client::{http, lock, message};
use crate::limit::{Heard, Limit};
use crate::provider::{Calls, Keep, Machine, Provider, Registered, Secrets, Seen, Trouble, Waiting};
use crate::user_data::{self, Values};

/// The longest answer that is read: ten thousand runners are well below.
const LONGEST: usize = 4 << 20;
/// An answer serves all questions of one look.
const FRESH: Duration = Duration::from_millis(500);

/// What makes a service another one: its URL, its token and the certificates that are trusted.
type Key = (String, Option<String>, Option<Vec<u8>>);

/// Every service that some pool uses.
#[derive(Debug, Default)]
pub struct Queues {
    sites: Mutex<HashMap<Key, Arc<Site>>>,
}

#[derive(Debug)]
struct Site {
    http: reqwest::Client,
    url: Url,
    limit: Mutex<Limit>,
    sent: AtomicU64,
    failed: AtomicU64,
    paused: AtomicU64,
}

impl Queues {
    /// How many calls each service got so far.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<String, Calls> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let calls = |site: &Arc<Site>| Calls {
            sent: read(&site.sent),
            failed: read(&site.failed),
            paused: read(&site.paused),
            limited: 0,
        };
        lock(&self.sites).values().map(|site| (shown(&site.url), calls(site))).collect()
    }
}

/// A URL without what may be secret in it.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    // Only URLs that can't have one refuse.
    url.set_password(None).ok();
    url.set_username("").ok();
    url.to_string()
}

/// One pool's view of a service.
#[derive(Debug)]
pub struct Queue {
    site: Arc<Site>,
    token: Option<String>,
    runner_token: Option<String>,
    pool: String,
    last: Mutex<Option<(Timestamp, Arc<Answer>)>>,
}

/// What a service says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    pending: u32,
    #[serde(default)]
    oldest_seconds: Option<f64>,
    runners: BTreeMap<String, String>,
}

impl Answer {
    fn waiting(&self, now: Timestamp) -> Waiting {
        let waited = self.oldest_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Waiting { count: self.pending, oldest: waited.and_then(|waited| now.checked_sub(waited).ok()) }
    }

    fn machines(&self) -> BTreeMap<String, Seen> {
        let seen = |word: &String| Seen { busy: word != "idle", contacted: None };
        self.runners.iter().map(|(name, word)| (name.clone(), seen(word))).collect()
    }
}

impl Queue {
    /// A pool's service, `pool` is its `NAMESPACE/NAME`.
    pub fn open(queues: &Queues, http: &HttpQueue, pool: &str, secrets: &Secrets) -> Result<Self, Trouble> {
        let read = |reference: &Option<_>| reference.as_ref().map(|reference| secrets.text(reference)).transpose();
        let token = read(&http.token_secret_ref)?;
        let runner_token = read(&http.runner_token_secret_ref)?;
        let ca = http.ca_secret_ref.as_ref().map(|reference| secrets.get(reference)).transpose()?;
        let key: Key = (http.url.clone(), token.clone(), ca.map(<[u8]>::to_vec));
        let mut sites = lock(&queues.sites);
        let site = match sites.get(&key) {
            Some(site) => Arc::clone(site),
            None => Arc::clone(sites.entry(key).or_insert(Arc::new(site(&http.url, ca)?))),
        };
        Ok(Self { site, token, runner_token, pool: pool.to_owned(), last: Mutex::default() })
    }

    /// Asks, unless it was asked a moment ago.
    async fn look(&self, fresh: Duration, now: Timestamp) -> Result<Arc<Answer>, Trouble> {
        let last = lock(&self.last).clone();
        if let Some((at, answer)) = last
            && now.duration_since(at).unsigned_abs() < fresh
        {
            return Ok(answer);
        }
        let answer = Arc::new(self.ask(now).await?);
        *lock(&self.last) = Some((now, Arc::clone(&answer)));
        Ok(answer)
    }

    async fn ask(&self, now: Timestamp) -> Result<Answer, Trouble> {
        let (site, url) = (&self.site, shown(&self.site.url));
        if let Some(until) = lock(&site.limit).wait(now) {
            site.paused.fetch_add(1, Ordering::Relaxed);
            let why = format!("{url} is left alone until {until:.0}: it asked for that, or failed before");
            return Err(Trouble { why, retry: Some(until) });
        }
        let mut target = site.url.clone();
        target.query_pairs_mut().append_pair("pool", &self.pool);
        let mut request = site.http.get(target).header("Accept", "application/json");
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        site.sent.fetch_add(1, Ordering::Relaxed);
        let answered = async {
            let response = request.send().await?;
            let (status, headers) = (response.status(), response.headers().clone());
            let (mut body, mut chunks) = (Vec::new(), response.bytes_stream());
            while let Some(chunk) = chunks.next().await {
                body.extend_from_slice(&chunk?);
                if body.len() > LONGEST {
                    break;
                }
            }
            Ok::<_, reqwest::Error>((status, headers, body))
        };
        let (status, headers, body) = match answered.await {
            Ok(answer) => answer,
            Err(error) => {
                site.failed.fetch_add(1, Ordering::Relaxed);
                let retry = lock(&site.limit).hear(Heard::Broken(None), now);
                let why = crate::chain(&error.without_url());
                return Err(Trouble { why: format!("{url} can't be reached: {why}"), retry });
            }
        };
        let retry = lock(&site.limit).hear(Heard::of(status, &headers, now), now);
        let refuse = |why: String| {
            site.failed.fetch_add(1, Ordering::Relaxed);
            Err(Trouble { why, retry })
        };
        match status {
            StatusCode::OK if body.len() > LONGEST => {
                refuse(format!("the answer of {url} is longer than {} MiB", LONGEST >> 20))
            }
            StatusCode::OK => match serde_json::from_slice(&body) {
                Ok(answer) => Ok(answer),
                Err(error) => refuse(format!(
                    "the answer of {url} makes no sense ({error}); it should be like {{\"pending\": 0, \"runners\": {{}}}}"
                )),
            },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                refuse(format!("{url} doesn't take the token of tokenSecretRef ({status}): {}", message(&body)))
            }
            _ => refuse(format!("{url} answers {status}: {}", message(&body))),
        }
    }
}

fn site(text: &str, ca_pem: Option<&[u8]>) -> Result<Site, Trouble> {
    let bad = || Trouble::new(format!("{text:?} is no URL of a queue: write https://ci.example.com/queue"));
    let url = Url::parse(text).map_err(|_| bad())?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(bad());
    }
    let http = http(ca_pem).map_err(|error| {
        Trouble::new(format!("the CA certificates for {text} can't be used: they must be PEM ({error})"))
    })?;
    Ok(Site {
        http,
        url,
        limit: Mutex::default(),
        sent: AtomicU64::default(),
        failed: AtomicU64::default(),
        paused: AtomicU64::default(),
    })
}

#[async_trait]
impl Provider for Queue {
    async fn register(&self, _kept: Option<&Keep>, _now: Timestamp) -> Result<Registered, Trouble> {
        // There is nothing to register: the service knows of a pool by being asked for it. What is kept tells which token
        // machines have.
        let keep = serde_json::json!({ "runnerToken": self.runner_token });
        Ok(Registered { keep: Keep::new(keep.to_string()), trouble: None })
    }

    async fn waiting(&self, _keep: &Keep, now: Timestamp) -> Result<Waiting, Trouble> {
        Ok(self.look(FRESH, now).await?.waiting(now))
    }

    async fn machines(&self, _keep: &Keep, now: Timestamp) -> Result<BTreeMap<String, Seen>, Trouble> {
        Ok(self.look(FRESH, now).await?.machines())
    }

    async fn is_busy(&self, _keep: &Keep, machine: &str, now: Timestamp) -> Result<bool, Trouble> {
        // Never from an earlier answer: what follows can't be undone.
        let answer = self.look(Duration::ZERO, now).await?;
        Ok(answer.machines().get(machine).is_some_and(|seen| seen.busy))
    }

    async fn forget(&self, _keep: &Keep, _machine: &str, _now: Timestamp) -> Result<(), Trouble> {
        Ok(())
    }

    async fn unregister(&self, _keep: Option<&Keep>, _now: Timestamp) -> Result<(), Trouble> {
        Ok(())
    }

    fn machine_id(&self, name: &str, _uid: &str) -> String {
        name.to_owned()
    }

    fn user_data(&self, _keep: &Keep, template: Option<&str>, machine: Machine<'_>) -> Result<String, Trouble> {
        let Some(template) = template else {
            return Err(Trouble::new("a pool with an http provider needs userData"));
        };
        let values = Values {
            url: self.site.url.as_str(),
            token: self.runner_token.as_deref().unwrap_or_default(),
            system_id: machine.id,
            name: machine.name,
            jobs: machine.jobs,
        };
        user_data::fill(template, &values).map_err(|error| Trouble::new(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_answer_is_what_it_says() {
        let now = Timestamp::from_second(1000).unwrap();
        let text =
            r#"{"pending": 2, "oldestSeconds": 1.5, "runners": {"a": "idle", "b": "busy", "c": "paused"}, "more": 1}"#;
        let answer: Answer = serde_json::from_str(text).unwrap();
        let waiting = answer.waiting(now);
        assert_eq!((waiting.count, waiting.oldest.unwrap().as_millisecond()), (2, 998_500));
        let busy: Vec<bool> = answer.machines().values().map(|seen| seen.busy).collect();
        assert_eq!(busy, [false, true, true]);
        // Without a list of runners nobody could say which are free.
        assert!(serde_json::from_str::<Answer>(r#"{"pending": 2}"#).is_err());
    }

    #[test]
    fn what_is_shown_of_a_url_holds_no_secret() {
        let url = Url::parse("https://me:secret@ci.example.com/queue?key=secret").unwrap();
        assert_eq!(shown(&url), "https://ci.example.com/queue");
    }

    proptest! {
        #[test]
        fn any_number_of_seconds_is_a_time_or_none(seconds: f64) {
            let answer = Answer { oldest_seconds: Some(seconds), ..Answer::default() };
            let now = Timestamp::from_second(1000).unwrap();
            prop_assert!(answer.waiting(now).oldest.is_none_or(|oldest| oldest <= now));
        }
    }
}
