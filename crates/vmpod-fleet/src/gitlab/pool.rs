//! GitLab as the provider of one pool.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;
use kube::ResourceExt as _;
use vmpod_api::pool::{GitLab, RunnerPool};

use super::{Begun, Error, Gitlab, Gitlabs, Held, Seen, Token, Waiting, Wanted, record};
use crate::chain;
use crate::provider::{Keep, Machine, Provider, Registered, Secrets, Trouble, key};
use crate::user_data::{self, Values, fill, standard};

/// A pool's GitLab.
#[derive(Debug)]
pub struct GitlabPool {
    gitlab: Gitlab,
    wanted: Wanted,
    url: String,
    projects: Vec<u64>,
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self { why: chain(&error), retry: error.retry_at() }
    }
}

impl GitlabPool {
    /// The GitLab of a pool, with the values of its Secrets.
    pub fn open(gitlabs: &Gitlabs, spec: &GitLab, pool: &RunnerPool, secrets: &Secrets) -> Result<Self, Trouble> {
        let token = Token::new(secrets.text(&spec.token_secret_ref)?);
        let ca = spec.ca_secret_ref.as_ref().map(|reference| secrets.get(reference)).transpose()?;
        let wanted = Wanted {
            uid: pool.uid().unwrap_or_default(),
            name: key(pool),
            scope: match (spec.group, spec.project) {
                (Some(group), _) => record::Scope::Group(group),
                (None, Some(project)) => record::Scope::Project(project),
                (None, None) => record::Scope::Instance,
            },
            settings: record::Settings {
                tags: spec.tags.iter().cloned().collect(),
                run_untagged: spec.run_untagged,
                locked: false,
                protected: spec.protected,
                maximum_timeout: None,
            },
        };
        let gitlab = gitlabs.get(&spec.url, ca, token)?;
        Ok(Self { gitlab, wanted, url: spec.url.clone(), projects: spec.projects.clone() })
    }
}

/// Reads what was kept.
fn held(keep: &Keep) -> Result<Held, Trouble> {
    serde_json::from_str(keep.expose())
        .map_err(|error| Trouble::new(format!("what is kept of the pool's runner can't be read: {error}")))
}

#[async_trait]
impl Provider for GitlabPool {
    async fn register(&self, kept: Option<&Keep>, now: Timestamp) -> Result<Registered, Trouble> {
        // What can't be read is as good as lost: its record is found by its mark.
        let before = kept.and_then(|keep| held(keep).ok());
        let ensured = self.gitlab.ensure(&self.wanted, before.as_ref(), now).await?;
        let keep = match kept {
            // The same text, so that nobody writes it again.
            Some(keep) if before.as_ref() == Some(&ensured.held) => keep.clone(),
            _ => Keep::new(serde_json::to_string(&ensured.held).map_err(|error| Trouble::new(error.to_string()))?),
        };
        let paused = || "the runner is paused at GitLab: no machine of the pool gets a job".to_owned();
        let trouble = ensured.trouble.map(|error| chain(&error)).or_else(|| ensured.paused.then(paused));
        Ok(Registered { keep, trouble })
    }

    async fn waiting(&self, keep: &Keep, now: Timestamp) -> Result<Waiting, Trouble> {
        Ok(self.gitlab.waiting(&self.wanted, held(keep)?.record, &self.projects, now).await?)
    }

    async fn machines(&self, keep: &Keep, now: Timestamp) -> Result<BTreeMap<String, Seen>, Trouble> {
        Ok(self.gitlab.machines(held(keep)?.record, now).await?)
    }

    async fn is_busy(&self, keep: &Keep, machine: &str, now: Timestamp) -> Result<bool, Trouble> {
        Ok(self.gitlab.is_busy(held(keep)?.record, machine, now).await?)
    }

    async fn forget(&self, keep: &Keep, machine: &str, now: Timestamp) -> Result<(), Trouble> {
        Ok(self.gitlab.forget(&held(keep)?, machine, now).await?)
    }

    async fn unregister(&self, keep: Option<&Keep>, now: Timestamp) -> Result<(), Trouble> {
        match keep.and_then(|keep| held(keep).ok()) {
            Some(held) => Ok(self.gitlab.remove(held.record, now).await?),
            None => Ok(self.gitlab.remove_marked(&self.wanted, now).await?),
        }
    }

    async fn begun(&self, keep: &Keep, after: Option<u64>, now: Timestamp) -> Result<Vec<Begun>, Trouble> {
        Ok(self.gitlab.begun(held(keep)?.record, after, now).await?)
    }

    fn machine_id(&self, _name: &str, uid: &str) -> String {
        user_data::system_id(uid)
    }

    fn user_data(&self, keep: &Keep, template: Option<&str>, machine: Machine<'_>) -> Result<String, Trouble> {
        let held = held(keep)?;
        let values = Values {
            url: &self.url,
            token: held.token.expose(),
            system_id: machine.id,
            name: machine.name,
            jobs: machine.jobs,
        };
        match template {
            None => Ok(standard(&values)),
            Some(template) => fill(template, &values).map_err(|error| Trouble::new(error.to_string())),
        }
    }
}
