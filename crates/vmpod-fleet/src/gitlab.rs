//! GitLab: a pool's record, its machines, the jobs that wait for it.
//!
//! One pool is one runner record, and each machine of it is a `system_id` below that record: a record for each machine
//! would run into GitLab's limit of 1000 records in seven days. The record's token is kept in a Secret and reaches a guest
//! only in the Secret that its user data comes from. What GitLab doesn't answer is an [`Error`], never an empty list: an
//! empty list means that there is nothing.
//!
//! All pools that ask the same GitLab share its connections and its limit ([`Gitlabs`]).

pub(crate) mod client;
mod pool;
pub mod record;
mod wire;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

pub use client::Error;
pub use pool::GitlabPool;
pub use record::{Held, Scope, Settings, Token, Wanted};

pub use crate::provider::{Begun, Calls, Seen, Waiting};
pub use crate::user_data::system_id;

use client::{Call, Client, Site, lock};
use record::{Found, Step};
use wire::Pending;

/// How long a token that was found to be good is taken for good.
const VERIFIED: Duration = Duration::from_mins(10);
/// How long a GitLab that didn't know the question for waiting jobs isn't asked it again.
const UNSUPPORTED: Duration = Duration::from_hours(1);
/// Projects of a group whose jobs are counted one by one on an old GitLab.
const PROJECTS: usize = 50;
/// Under this name the operator itself checks tokens: it is no machine.
const OPERATOR: &str = "vmpod-operator";

/// What makes a GitLab another one: its URL and the certificates that are trusted.
type Key = (String, Option<Vec<u8>>);

/// Every GitLab that some pool uses.
#[derive(Debug, Default)]
pub struct Gitlabs {
    sites: Mutex<HashMap<Key, Arc<Site>>>,
}

impl Gitlabs {
    /// A GitLab as the owner of an access token sees it.
    ///
    /// `ca_pem` are certificates that are trusted beside the system's.
    pub fn get(&self, url: &str, ca_pem: Option<&[u8]>, token: Token) -> Result<Gitlab, Error> {
        let key: Key = (url.trim_end_matches('/').to_owned(), ca_pem.map(<[u8]>::to_vec));
        let mut sites = lock(&self.sites);
        let site = match sites.get(&key) {
            Some(site) => Arc::clone(site),
            None => Arc::clone(sites.entry(key).or_insert(Arc::new(Site::new(url, ca_pem)?))),
        };
        Ok(Gitlab { client: Client { site, token } })
    }

    /// How many calls each GitLab got so far.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<String, Calls> {
        lock(&self.sites).values().map(|site| (site.url(), site.calls())).collect()
    }
}

/// What became of a pool's record.
#[derive(Debug)]
pub struct Ensured {
    /// What must be kept, in place of what was. It is the only copy.
    pub held: Held,
    /// Why the token is another than before, if it is.
    pub renewed: Option<&'static str>,
    /// Somebody paused the record: no machine of it gets a job.
    pub paused: bool,
    /// What else should have been done and wasn't; it is tried again.
    pub trouble: Option<Error>,
}

/// A GitLab as one pool uses it.
#[derive(Clone, Debug)]
pub struct Gitlab {
    client: Client,
}

impl Gitlab {
    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        self.client.site.url()
    }

    /// Makes or adopts a pool's record, keeps its settings and its token good.
    ///
    /// It may be called any number of times and broken off anywhere: there is one record afterwards. What it returns must
    /// be kept before a machine is made with it.
    pub async fn ensure(&self, wanted: &Wanted, held: Option<&Held>, now: Timestamp) -> Result<Ensured, Error> {
        let found = self.find(wanted, held, now).await?;
        let known = held.filter(|held| found.iter().any(|found| found.id == held.record));
        let refused = match known {
            Some(held) => self.is_refused(held, now).await?,
            None => false,
        };
        let mut holds = known.cloned();
        let (mut renewed, mut trouble) = (None, None);
        for step in record::plan(wanted, &found, known, refused, now) {
            let done = match &step {
                Step::Create => self.create(wanted, now).await.map(|held| holds = Some(held)),
                Step::Reset { id, why } => self.reset(*id, now).await.map(|held| {
                    tracing::info!(pool = %wanted.name, record = id, why, "the runner's token is a new one");
                    (holds, renewed) = (Some(held), Some(*why));
                }),
                Step::Update(id) => self.update(wanted, found.iter().find(|found| found.id == *id), *id, now).await,
                Step::RemoveIfUnused(id) => self.remove_if_unused(wanted, *id, now).await,
            };
            if let Err(error) = done {
                // A token that is new must be kept, whatever else fails.
                match holds {
                    None => return Err(error),
                    Some(_) => trouble = Some(error),
                }
            }
        }
        let url = self.url();
        let Some(held) = holds else {
            return Err(Error::NotFound { what: "keep of the record", url });
        };
        let paused = found.iter().any(|found| found.id == held.record && found.paused);
        Ok(Ensured { held, renewed, paused, trouble })
    }

    /// The records that may be the pool's: the one that is held, or all with its marker.
    async fn find(&self, wanted: &Wanted, held: Option<&Held>, now: Timestamp) -> Result<Vec<Found>, Error> {
        if let Some(held) = held {
            match self.details(held.record, now).await {
                Ok(found) => return Ok(vec![found]),
                Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let (path, kind) = wire::list_path(wanted.scope);
        let path = format!("api/v4/{path}");
        let listed: Vec<wire::Listed> = self.client.list("list the runners", &path, &[("type", kind)], now).await?;
        let mut found = Vec::new();
        for listed in listed {
            if !wanted.may_own(listed.description.as_deref().unwrap_or_default()) {
                continue;
            }
            match self.details(listed.id, now).await {
                Ok(details) => found.push(details),
                // Gone between the list and the look.
                Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    async fn details(&self, record: u64, now: Timestamp) -> Result<Found, Error> {
        let call = Call::get("look at the runner", format!("api/v4/runners/{record}"));
        Ok(self.client.json::<wire::Details>(call, now).await?.into())
    }

    /// Whether GitLab no longer knows the token: its last reset was answered, and the answer was lost.
    async fn is_refused(&self, held: &Held, now: Timestamp) -> Result<bool, Error> {
        let verified = lock(&self.client.site.verified).get(&held.record).copied();
        if verified.is_some_and(|at| now.duration_since(at).unsigned_abs() < VERIFIED) {
            return Ok(false);
        }
        let body = json!({ "token": held.token.expose(), "system_id": OPERATOR });
        let call = Call::send("check the runner's token", Method::POST, "api/v4/runners/verify", &body);
        match self.client.call(call, now).await {
            Ok(_) => {
                lock(&self.client.site.verified).insert(held.record, now);
                Ok(false)
            }
            Err(Error::Denied { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    async fn create(&self, wanted: &Wanted, now: Timestamp) -> Result<Held, Error> {
        let mut body = settings(wanted);
        let (kind, owner) = match wanted.scope {
            Scope::Instance => ("instance_type", None),
            Scope::Group(id) => ("group_type", Some(("group_id", id))),
            Scope::Project(id) => ("project_type", Some(("project_id", id))),
        };
        body["runner_type"] = json!(kind);
        body["maintenance_note"] = json!(wanted.marker());
        if let Some((name, id)) = owner {
            body[name] = json!(id);
        }
        let call = Call::send("create a runner", Method::POST, "api/v4/user/runners", &body);
        let made: wire::Created = self.client.json(call, now).await?;
        lock(&self.client.site.verified).insert(made.id, now);
        tracing::info!(pool = %wanted.name, record = made.id, "created a runner at {}", self.url());
        Ok(Held { record: made.id, token: Token::new(made.token), issued: now, expires: made.token_expires_at })
    }

    async fn reset(&self, record: u64, now: Timestamp) -> Result<Held, Error> {
        let (what, body) = ("renew the runner's token", json!({}));
        let path = format!("api/v4/runners/{record}/reset_authentication_token");
        let token: wire::Token = self.client.json(Call::send(what, Method::POST, path, &body), now).await?;
        lock(&self.client.site.verified).insert(record, now);
        Ok(Held { record, token: Token::new(token.token), issued: now, expires: token.token_expires_at })
    }

    async fn update(&self, wanted: &Wanted, found: Option<&Found>, record: u64, now: Timestamp) -> Result<(), Error> {
        let mut body = settings(wanted);
        if let Some(found) = found.filter(|found| !found.is_of(wanted)) {
            // What people wrote there stays.
            body["maintenance_note"] = json!(format!("{}\n{}", found.note, wanted.marker()).trim());
        }
        let path = format!("api/v4/runners/{record}");
        self.client.call(Call::send("change the runner", Method::PUT, path, &body), now).await.map(drop)
    }

    /// Removes a record that a crash doubled. One that a machine uses is left to its machines.
    async fn remove_if_unused(&self, wanted: &Wanted, record: u64, now: Timestamp) -> Result<(), Error> {
        if !self.machines(record, now).await?.is_empty() {
            return Ok(());
        }
        tracing::info!(pool = %wanted.name, record, "removing a second runner of the same pool, which nobody uses");
        self.remove(record, now).await
    }

    /// How many jobs wait for a record, and how long.
    ///
    /// GitLab 18.1 and later are asked for the record itself. An older one is asked for the waiting jobs of the pool's
    /// projects, which are compared with its tags: `projects` names them, or else the record's scope does.
    pub async fn waiting(
        &self,
        wanted: &Wanted,
        record: u64,
        projects: &[u64],
        now: Timestamp,
    ) -> Result<Waiting, Error> {
        let unsupported = *lock(&self.client.site.no_pending_query);
        if unsupported.is_none_or(|at| now.duration_since(at).unsigned_abs() >= UNSUPPORTED) {
            match self.waiting_for_record(record, now).await? {
                Pending::Known { count, oldest } => return Ok(Waiting { count, oldest }),
                Pending::Unsupported => *lock(&self.client.site.no_pending_query) = Some(now),
                Pending::Hidden => {
                    let why = "the access token may not see them; give it the scope read_api".into();
                    return Err(Error::NoDemand { url: self.url(), why });
                }
                Pending::Refused(why) => return Err(Error::NoDemand { url: self.url(), why }),
            }
        }
        self.waiting_in_projects(wanted, projects, now).await
    }

    async fn waiting_for_record(&self, record: u64, now: Timestamp) -> Result<Pending, Error> {
        let mut answer = Pending::Hidden;
        for with_oldest in [true, false] {
            let body = wire::pending_query(record, with_oldest);
            let call = Call::send("count the waiting jobs", Method::POST, "api/graphql", &body);
            answer = wire::pending(&self.client.json::<Value>(call, now).await?);
            // The count alone is worth more than nothing.
            if !matches!(answer, Pending::Refused(_)) {
                break;
            }
        }
        Ok(answer)
    }

    async fn waiting_in_projects(&self, wanted: &Wanted, projects: &[u64], now: Timestamp) -> Result<Waiting, Error> {
        let projects = match (projects, wanted.scope) {
            ([_, ..], _) => projects.to_vec(),
            ([], Scope::Project(id)) => vec![id],
            ([], Scope::Group(id)) => self.projects(id, now).await?,
            ([], Scope::Instance) => {
                let why = "it is older than 18.1, and the pool's runner serves the whole instance; name its projects";
                return Err(Error::NoDemand { url: self.url(), why: why.into() });
            }
        };
        let (mut count, mut oldest) = (0_u32, None::<Timestamp>);
        for project in projects {
            let path = format!("api/v4/projects/{project}/jobs");
            let jobs: Vec<wire::Job> =
                self.client.list("list the waiting jobs", &path, &[("scope[]", "pending")], now).await?;
            for job in jobs.iter().filter(|job| job.fits(&wanted.settings)) {
                count = count.saturating_add(1);
                let queued = job.queued_duration.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                let since = queued.and_then(|queued| now.checked_sub(queued).ok()).or(job.created_at);
                oldest = [oldest, since].into_iter().flatten().min();
            }
        }
        Ok(Waiting { count, oldest })
    }

    async fn projects(&self, group: u64, now: Timestamp) -> Result<Vec<u64>, Error> {
        let path = format!("api/v4/groups/{group}/projects");
        let query = [("include_subgroups", "true"), ("archived", "false"), ("simple", "true")];
        let all: Vec<wire::Project> = self.client.list("list the group's projects", &path, &query, now).await?;
        if all.len() > PROJECTS {
            let why = format!(
                "it is older than 18.1, and group {group} has {} projects, too many to ask one by one; name those that matter",
                all.len()
            );
            return Err(Error::NoDemand { url: self.url(), why });
        }
        Ok(all.into_iter().map(|project| project.id).collect())
    }

    /// The machines of a record by their `system_id`.
    pub async fn machines(&self, record: u64, now: Timestamp) -> Result<BTreeMap<String, Seen>, Error> {
        let path = format!("api/v4/runners/{record}/managers");
        let all: Vec<wire::Manager> = self.client.list("list the runner's machines", &path, &[], now).await?;
        let seen = |manager: wire::Manager| {
            // A word that isn't known is no proof that the machine is free.
            let busy = manager.job_execution_status.as_deref() != Some("idle");
            (manager.system_id, Seen { busy, contacted: manager.contacted_at })
        };
        Ok(all.into_iter().filter(|manager| manager.system_id != OPERATOR).map(seen).collect())
    }

    /// Whether a machine has a job: the look before an irrevocable step.
    pub async fn is_busy(&self, record: u64, system_id: &str, now: Timestamp) -> Result<bool, Error> {
        let call = Call::get("list a machine's jobs", format!("api/v4/runners/{record}/jobs"))
            .query("status", "running")
            .query("system_id", system_id)
            .query("per_page", "1");
        Ok(!self.client.json::<Vec<Value>>(call, now).await?.is_empty())
    }

    /// Jobs of a record that began after a certain one, the oldest first; of so many as fit on one page.
    pub async fn begun(&self, record: u64, after: Option<u64>, now: Timestamp) -> Result<Vec<Begun>, Error> {
        let call = Call::get("list the runner's jobs", format!("api/v4/runners/{record}/jobs"))
            .query("order_by", "id")
            .query("sort", "desc")
            .query("per_page", "100");
        let jobs: Vec<wire::RunnerJob> = self.client.json(call, now).await?;
        let mut begun: Vec<Begun> = jobs.into_iter().filter(|job| Some(job.id) > after).map(Into::into).collect();
        begun.sort_by_key(|job| job.id);
        Ok(begun)
    }

    /// Removes a machine that is gone from its record. One that isn't there is as good as removed.
    pub async fn forget(&self, held: &Held, system_id: &str, now: Timestamp) -> Result<(), Error> {
        let body = json!({ "token": held.token.expose(), "system_id": system_id });
        let call = Call::send("remove a machine from the runner", Method::DELETE, "api/v4/runners/managers", &body);
        absent_is_done(self.client.call(call, now).await)
    }

    /// Removes every record that carries a pool's mark: its number was never learnt, or was lost.
    pub async fn remove_marked(&self, wanted: &Wanted, now: Timestamp) -> Result<(), Error> {
        for found in self.find(wanted, None, now).await? {
            if found.is_of(wanted) {
                self.remove(found.id, now).await?;
            }
        }
        Ok(())
    }

    /// Removes a pool's record, with all its machines: the pool is gone.
    pub async fn remove(&self, record: u64, now: Timestamp) -> Result<(), Error> {
        let path = format!("api/v4/runners/{record}");
        let call = Call { method: Method::DELETE, ..Call::get("remove the runner", path) };
        absent_is_done(self.client.call(call, now).await)
    }
}

fn absent_is_done<T>(result: Result<T, Error>) -> Result<(), Error> {
    match result {
        Ok(_) | Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The settings of a record, as its making and its change take them.
fn settings(wanted: &Wanted) -> Value {
    let Settings { tags, run_untagged, locked, protected, maximum_timeout } = &wanted.settings;
    let mut body = json!({
        "description": wanted.description(),
        "tag_list": tags.iter().cloned().collect::<Vec<_>>().join(","),
        "run_untagged": run_untagged,
        "locked": locked,
        "access_level": if *protected { "ref_protected" } else { "not_protected" },
    });
    if let Some(seconds) = maximum_timeout {
        body["maximum_timeout"] = json!(seconds);
    }
    body
}
