//! What a CI system must be able to tell and do so that a pool can serve it.
//!
//! This is all that the operator knows of CI systems. A provider that can't answer says so with a [`Trouble`]; it never
//! answers with less than there is, because what isn't in an answer counts as absent, and what is absent may be removed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use kube::ResourceExt as _;
use vmpod_api::pool::{RunnerPool, SecretKey};

use crate::gitlab::{GitlabPool, Gitlabs};
use crate::queue::{Queue, Queues};

/// Why a provider can't tell or do something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Trouble {
    /// For people: what, where, why, and what to do.
    pub why: String,
    /// It wants to be left alone until then.
    pub retry: Option<Timestamp>,
}

impl Trouble {
    /// One that says nothing of when to try again.
    #[must_use]
    pub fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), retry: None }
    }
}

/// What must be kept of a pool's registration: a token may be in it. It is the only copy, and shows nothing of itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Keep(String);

impl Keep {
    /// Something to keep, in a form that only its provider reads.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// Its text, for whoever keeps it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keep(…)")
    }
}

/// What became of a pool's registration.
#[derive(Clone, Debug)]
pub struct Registered {
    /// What must be kept, in place of what was, before a machine is made with it.
    pub keep: Keep,
    /// What a person should know or what is tried again; machines can be made nevertheless.
    pub trouble: Option<String>,
}

/// Jobs that wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// How many; at a thousand and beyond it may only say "many".
    pub count: u32,
    /// Since when the first of them does.
    pub oldest: Option<Timestamp>,
}

/// A machine as the CI system sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Whether it has a job now.
    pub busy: bool,
    /// When it last asked for one; none when that isn't known, and then it is never taken for long gone.
    pub contacted: Option<Timestamp>,
}

/// A job that has begun, for the metrics.
#[derive(Clone, Debug, PartialEq)]
pub struct Begun {
    /// Its number: later jobs have greater ones.
    pub id: u64,
    /// How long it waited.
    pub waited: Option<Duration>,
    /// How long it took and how it ended, when it is over.
    pub ended: Option<(Duration, String)>,
}

/// A machine that is to serve a pool.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// Who it is to the CI system: [`Provider::machine_id`].
    pub id: &'a str,
    /// The name of its Runner.
    pub name: &'a str,
    /// After so many jobs it ends.
    pub jobs: u32,
}

/// A CI system as one pool uses it.
#[async_trait]
pub trait Provider: Send + Sync {
    /// Makes the pool known, or keeps it so. It may be called any number of times and broken off anywhere: there is one
    /// registration afterwards.
    async fn register(&self, kept: Option<&Keep>, now: Timestamp) -> Result<Registered, Trouble>;

    /// How many jobs wait for the pool, and how long.
    async fn waiting(&self, keep: &Keep, now: Timestamp) -> Result<Waiting, Trouble>;

    /// The pool's machines by their ids, all of them.
    async fn machines(&self, keep: &Keep, now: Timestamp) -> Result<BTreeMap<String, Seen>, Trouble>;

    /// Whether a machine has a job: the look before an irrevocable step.
    async fn is_busy(&self, keep: &Keep, machine: &str, now: Timestamp) -> Result<bool, Trouble>;

    /// Removes a machine that is gone from the CI system's list. One that isn't there is as good as removed.
    async fn forget(&self, keep: &Keep, machine: &str, now: Timestamp) -> Result<(), Trouble>;

    /// Ends the pool's registration. Where nothing was kept, whatever carries the pool's mark is it: an answer may have been
    /// lost.
    async fn unregister(&self, keep: Option<&Keep>, now: Timestamp) -> Result<(), Trouble>;

    /// Jobs that began after a certain one, the oldest first; for the metrics only, and nothing where it can't be told.
    async fn begun(&self, _keep: &Keep, _after: Option<u64>, _now: Timestamp) -> Result<Vec<Begun>, Trouble> {
        Ok(Vec::new())
    }

    /// Who the machine of a Runner is to the CI system.
    fn machine_id(&self, name: &str, uid: &str) -> String;

    /// What a machine's guest gets as user data; `template` is the pool's own.
    fn user_data(&self, keep: &Keep, template: Option<&str>, machine: Machine<'_>) -> Result<String, Trouble>;
}

/// The values of the Secrets that a pool names.
#[derive(Clone, Default)]
pub struct Secrets(pub BTreeMap<(String, String), Vec<u8>>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Secrets {
    /// A value, or that it is missing.
    pub fn get(&self, reference: &SecretKey) -> Result<&[u8], Trouble> {
        let value = self.0.get(&(reference.name.clone(), reference.key.clone()));
        let missing = || Trouble::new(format!("the Secret {:?} has no key {:?}", reference.name, reference.key));
        value.map(Vec::as_slice).ok_or_else(missing)
    }

    /// A value that is a line of text, as tokens are.
    pub fn text(&self, reference: &SecretKey) -> Result<String, Trouble> {
        let text = std::str::from_utf8(self.get(reference)?);
        let wrong =
            |_| Trouble::new(format!("the key {:?} of the Secret {:?} isn't text", reference.key, reference.name));
        text.map(|text| text.trim().to_owned()).map_err(wrong)
    }
}

/// Makes the providers of pools; what several pools share is kept here.
pub trait Providers: Send + Sync {
    /// The CI system of a pool.
    fn open(&self, pool: &RunnerPool, secrets: &Secrets) -> Result<Arc<dyn Provider>, Trouble>;

    /// How many calls each CI system got so far, by its URL.
    fn calls(&self) -> BTreeMap<String, Calls> {
        BTreeMap::new()
    }
}

/// How many calls were made, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// All that were sent.
    pub sent: u64,
    /// Those that hit the rate limit.
    pub limited: u64,
    /// Those that failed: no answer, or a server's error.
    pub failed: u64,
    /// Those that weren't sent because of a pause.
    pub paused: u64,
}

/// The providers that vmpod has.
#[derive(Debug, Default)]
pub struct Standard {
    gitlabs: Gitlabs,
    queues: Queues,
}

impl Providers for Standard {
    fn open(&self, pool: &RunnerPool, secrets: &Secrets) -> Result<Arc<dyn Provider>, Trouble> {
        let provider = &pool.spec.provider;
        match (&provider.gitlab, &provider.http) {
            (Some(gitlab), None) => Ok(Arc::new(GitlabPool::open(&self.gitlabs, gitlab, pool, secrets)?)),
            (None, Some(http)) => Ok(Arc::new(Queue::open(&self.queues, http, &key(pool), secrets)?)),
            // The rules of the kind refuse both; an older definition may not.
            _ => Err(Trouble::new("a pool has one provider: name either gitlab or http")),
        }
    }

    fn calls(&self) -> BTreeMap<String, Calls> {
        let mut calls = self.gitlabs.calls();
        calls.extend(self.queues.calls());
        calls
    }
}

/// The Secrets that a pool's provider needs.
#[must_use]
pub fn secrets(pool: &RunnerPool) -> Vec<&SecretKey> {
    let provider = &pool.spec.provider;
    let gitlab =
        provider.gitlab.iter().flat_map(|gitlab| [Some(&gitlab.token_secret_ref), gitlab.ca_secret_ref.as_ref()]);
    let http = provider.http.iter().flat_map(|http| {
        [http.token_secret_ref.as_ref(), http.runner_token_secret_ref.as_ref(), http.ca_secret_ref.as_ref()]
    });
    gitlab.chain(http).flatten().collect()
}

/// `NAMESPACE/NAME`.
pub(crate) fn key(pool: &RunnerPool) -> String {
    format!("{}/{}", pool.namespace().unwrap_or_else(|| "default".to_owned()), pool.name_any())
}
