//! What the scripted GitLab knows, and its rules; time is an argument.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::gate::{Fault, Window};

/// How one is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// The personal access token of whoever manages runners; an administrator's.
    pub access_token: String,
    /// The version it plays: 18.1 is the first whose GraphQL knows `compatibleRunnerId`.
    pub version: (u32, u32),
    /// How long a runner's token lives; for ever without.
    pub token_lifetime: Option<Duration>,
    /// How many records a group or project may have.
    pub runner_cap: usize,
    /// Requests a minute with one access token; 0 is no limit.
    pub api_per_minute: u32,
    /// Requests for jobs a minute with one runner's token; 0 is no limit.
    pub requests_per_minute: u32,
    /// A directory whose files are offered as generic packages.
    pub packages: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            access_token: "glpat-scripted".into(),
            version: (18, 6),
            token_lifetime: None,
            runner_cap: 1000,
            api_per_minute: 0,
            requests_per_minute: 2000,
            packages: None,
        }
    }
}

/// Where a runner belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// It serves all.
    Instance,
    /// It serves a group's projects.
    Group(u64),
    /// It serves one project.
    Project(u64),
}

/// A machine that uses a runner's token.
#[derive(Clone, Debug, Serialize)]
pub struct Manager {
    /// Its number.
    pub id: u64,
    /// When it came first.
    pub created_at: Timestamp,
    /// When it was last seen.
    pub contacted_at: Timestamp,
    /// Where from.
    pub ip_address: String,
    /// What it says of itself.
    pub version: String,
    /// Its operating system.
    pub platform: String,
    /// Its processor.
    pub architecture: String,
}

/// A runner's record.
#[derive(Clone, Debug, Serialize)]
pub struct Runner {
    /// Its number.
    pub id: u64,
    /// Where it belongs.
    pub scope: Scope,
    /// For people.
    pub description: String,
    /// For people who manage it.
    pub maintenance_note: String,
    /// Jobs need a part of these.
    pub tags: Vec<String>,
    /// Whether it takes jobs without tags.
    pub run_untagged: bool,
    /// Whether it stays with its projects.
    pub locked: bool,
    /// Whether it takes no jobs at all.
    pub paused: bool,
    /// Which branches' jobs it takes.
    pub access_level: String,
    /// Seconds after which a job is ended.
    pub maximum_timeout: Option<u64>,
    /// Its authentication token.
    #[serde(skip)]
    pub token: String,
    /// When that is no longer one.
    pub token_expires_at: Option<Timestamp>,
    /// How many tokens it had.
    pub tokens: u32,
    /// When it was made.
    pub created_at: Timestamp,
    /// Its machines by `system_id`.
    pub managers: BTreeMap<String, Manager>,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    /// It waits for a runner.
    Pending,
    /// A runner has it.
    Running,
    /// It went well.
    Success,
    /// It didn't.
    Failed,
    /// Somebody ended it.
    Canceled,
}

/// A job to add.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NewJob {
    /// Its project; 1 if none is given.
    pub project: u64,
    /// Its name.
    pub name: String,
    /// What its runner must have.
    pub tags: Vec<String>,
    /// The lines that run.
    pub script: Vec<String>,
    /// Variables beside the usual ones.
    pub variables: BTreeMap<String, String>,
}

/// A job.
#[derive(Clone, Debug, Serialize)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// Its project.
    pub project: u64,
    /// Its name.
    pub name: String,
    /// What its runner must have.
    pub tags: Vec<String>,
    /// The lines that run.
    pub script: Vec<String>,
    /// Variables beside the usual ones.
    pub variables: BTreeMap<String, String>,
    /// How far it is.
    pub status: JobStatus,
    /// When it was added.
    pub created_at: Timestamp,
    /// When a runner took it.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// Who took it.
    pub runner: Option<u64>,
    /// On which machine.
    pub system_id: Option<String>,
    /// Why it failed.
    pub failure_reason: Option<String>,
    /// How often it was given out. Twice is a fault of this program.
    pub given: u32,
    /// Its machine's record was removed while it ran.
    pub orphaned: bool,
    /// What it printed.
    #[serde(serialize_with = "as_text")]
    pub trace: Vec<u8>,
    /// The token that belongs to it.
    #[serde(skip)]
    pub token: String,
}

fn as_text<S: serde::Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&String::from_utf8_lossy(bytes))
}

impl Job {
    /// What it printed.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.trace).into_owned()
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        !matches!(self.status, JobStatus::Pending | JobStatus::Running)
    }
}

/// A call that was made.
#[derive(Clone, Debug, Serialize)]
pub struct Call {
    /// Its method.
    pub method: String,
    /// Its path.
    pub path: String,
    /// How it was answered.
    pub status: u16,
}

/// What it knows.
#[derive(Debug)]
pub struct State {
    /// How it is set up.
    pub config: Config,
    /// The records.
    pub runners: BTreeMap<u64, Runner>,
    /// The jobs.
    pub jobs: BTreeMap<u64, Job>,
    /// The group of each project that has one.
    pub groups: BTreeMap<u64, u64>,
    /// What goes wrong next.
    pub faults: Vec<Fault>,
    /// Whether it is under maintenance.
    pub maintenance: bool,
    /// The last calls, at most [`CALLS`].
    pub calls: VecDeque<Call>,
    pub(super) windows: BTreeMap<String, Window>,
    next: u64,
    /// Rises when a job waits: `X-GitLab-Last-Update`.
    pub(super) tick: u64,
}

/// How many calls are remembered.
pub const CALLS: usize = 50_000;

impl State {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            runners: BTreeMap::new(),
            jobs: BTreeMap::new(),
            groups: BTreeMap::new(),
            faults: Vec::new(),
            maintenance: false,
            calls: VecDeque::new(),
            windows: BTreeMap::new(),
            next: 0,
            tick: 0,
        }
    }

    /// A number that was never used.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A token that was never used.
    pub(super) fn token(&mut self, prefix: &str) -> String {
        format!("{prefix}-{:016x}{:04}", rand::random::<u64>(), self.number())
    }

    /// Adds a job.
    pub fn add(&mut self, new: NewJob) -> u64 {
        let id = self.number();
        let job = Job {
            id,
            project: new.project.max(1),
            name: if new.name.is_empty() { format!("job-{id}") } else { new.name },
            tags: new.tags,
            script: new.script,
            variables: new.variables,
            status: JobStatus::Pending,
            created_at: Timestamp::now(),
            started_at: None,
            finished_at: None,
            runner: None,
            system_id: None,
            failure_reason: None,
            given: 0,
            orphaned: false,
            trace: Vec::new(),
            token: self.token("glcbt"),
        };
        self.jobs.insert(id, job);
        self.tick += 1;
        id
    }

    /// Ends a job as a person does.
    pub fn cancel(&mut self, job: u64, now: Timestamp) {
        if let Some(job) = self.jobs.get_mut(&job).filter(|job| !job.is_over()) {
            job.status = JobStatus::Canceled;
            job.finished_at = Some(now);
        }
    }

    /// Whether a runner may take a job.
    #[must_use]
    pub fn fits(&self, runner: &Runner, job: &Job) -> bool {
        let belongs = match runner.scope {
            Scope::Instance => true,
            Scope::Group(group) => self.groups.get(&job.project) == Some(&group),
            Scope::Project(project) => job.project == project,
        };
        let tagged = if job.tags.is_empty() {
            runner.run_untagged
        } else {
            job.tags.iter().all(|tag| runner.tags.contains(tag))
        };
        belongs && tagged
    }

    /// The jobs that wait and that a runner may take.
    pub fn pending<'a>(&'a self, runner: &'a Runner) -> impl Iterator<Item = &'a Job> {
        self.jobs.values().filter(|job| job.status == JobStatus::Pending && self.fits(runner, job))
    }

    /// The runner of a token that is valid.
    pub(super) fn runner_of(&self, token: &str, now: Timestamp) -> Option<u64> {
        let valid = |runner: &&Runner| runner.token == token && runner.token_expires_at.is_none_or(|end| now < end);
        self.runners.values().find(valid).map(|runner| runner.id)
    }

    /// Gives a runner a new token; the old one is none from now on.
    pub(super) fn reset(&mut self, runner: u64, now: Timestamp) -> Option<(String, Option<Timestamp>)> {
        let token = self.token("glrt");
        let expires = self.expiry(now);
        let runner = self.runners.get_mut(&runner)?;
        runner.token.clone_from(&token);
        runner.token_expires_at = expires;
        runner.tokens += 1;
        Some((token, expires))
    }

    /// When a token that is made now expires.
    pub(super) fn expiry(&self, now: Timestamp) -> Option<Timestamp> {
        self.config.token_lifetime.and_then(|life| now.checked_add(life).ok())
    }

    /// Whether a machine has a job now.
    #[must_use]
    pub fn is_busy(&self, runner: u64, system_id: &str) -> bool {
        self.running(runner).any(|job| job.system_id.as_deref() == Some(system_id))
    }

    /// The jobs that a runner has now.
    pub fn running(&self, runner: u64) -> impl Iterator<Item = &Job> {
        self.jobs.values().filter(move |job| job.status == JobStatus::Running && job.runner == Some(runner))
    }

    /// Removes a machine of a runner; whether there was one.
    pub(super) fn remove_manager(&mut self, runner: u64, system_id: &str) -> bool {
        for job in self.jobs.values_mut() {
            if job.status == JobStatus::Running
                && job.runner == Some(runner)
                && job.system_id.as_deref() == Some(system_id)
            {
                job.orphaned = true;
            }
        }
        self.runners.get_mut(&runner).is_some_and(|runner| runner.managers.remove(system_id).is_some())
    }

    /// What is wrong with the jobs, when all should have ended well and run exactly once.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let complain = |job: &Job| {
            let id = job.id;
            let mut found = Vec::new();
            if job.status != JobStatus::Success {
                found.push(format!("job {id} is {:?}: {}", job.status, job.text().trim_end()));
            }
            if job.given != 1 {
                found.push(format!("job {id} was given out {} times", job.given));
            }
            if job.orphaned {
                found.push(format!("the machine of job {id} was removed while it ran"));
            }
            // The script's own words, so that a job that ran twice in one machine shows too.
            let ran = job.text().matches(&format!("ran job {id}.")).count();
            if job.script.iter().any(|line| line.contains("ran job")) && ran != 1 {
                found.push(format!("the script of job {id} ran {ran} times"));
            }
            found
        };
        self.jobs.values().flat_map(complain).collect()
    }
}

/// The line of a script that [`State::complaints`] counts.
pub const RAN: &str = "echo \"ran job $CI_JOB_ID.\"";

#[cfg(test)]
mod tests {
    use super::*;

    fn runner(state: &mut State, scope: Scope, tags: &[&str], run_untagged: bool) -> Runner {
        let id = state.number();
        Runner {
            id,
            scope,
            description: String::new(),
            maintenance_note: String::new(),
            tags: tags.iter().map(|&tag| tag.to_owned()).collect(),
            run_untagged,
            locked: false,
            paused: false,
            access_level: "not_protected".into(),
            maximum_timeout: None,
            token: state.token("glrt"),
            token_expires_at: None,
            tokens: 1,
            created_at: Timestamp::UNIX_EPOCH,
            managers: BTreeMap::new(),
        }
    }

    #[test]
    fn a_runner_takes_what_its_tags_and_its_place_allow() {
        let mut state = State::new(Config::default());
        state.groups.insert(7, 70);
        let new = |project, tags: &[&str]| NewJob {
            project,
            tags: tags.iter().map(|&tag| tag.to_owned()).collect(),
            ..NewJob::default()
        };
        let (plain, large, grouped) =
            (state.add(new(1, &[])), state.add(new(1, &["large"])), state.add(new(7, &["large"])));
        for (scope, tags, untagged, takes) in [
            (Scope::Instance, &["large", "linux"][..], false, vec![large, grouped]),
            (Scope::Instance, &[], true, vec![plain]),
            (Scope::Group(70), &["large"], true, vec![grouped]),
            (Scope::Project(1), &["large"], true, vec![plain, large]),
        ] {
            let runner = runner(&mut state, scope, tags, untagged);
            let ids: Vec<u64> = state.pending(&runner).map(|job| job.id).collect();
            assert_eq!(ids, takes, "{scope:?} {tags:?}");
        }
    }
}
