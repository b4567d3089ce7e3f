//! What the operator has to do with a pool's CI system: its client, its record and token, what waits there.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, Patch, PatchParams};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;
use vmpod_api::pool::RunnerPool;

use super::{ENSURE, Kept, MANAGER, Operator, chain, key, namespace};
use crate::gitlab::{self, Gitlab, Held, Token, Wanted, record};
use crate::objects;

impl Operator {
    /// Asks a pool's CI system, when it is time.
    pub(super) async fn ask(&self, pool: &RunnerPool, kept: &mut Kept, now: Timestamp) {
        let soon = kept.asked.is_some_and(|at| now.duration_since(at).unsigned_abs() < self.options.poll.mul_f32(0.8));
        if soon || kept.retry.is_some_and(|at| at > now) {
            return;
        }
        kept.asked = Some(now);
        let gitlab = match self.gitlab(pool).await {
            Ok(gitlab) => gitlab,
            Err(why) => {
                (kept.trouble, kept.demand, kept.machines) =
                    (Some(why.clone()), Some(Err(why.clone())), Some(Err(why)));
                return;
            }
        };
        if pool.metadata.deletion_timestamp.is_none()
            && let Err(error) = self.ensure(pool, &gitlab, kept, now).await
        {
            kept.retry = error.retry_at();
            let why = chain(&error);
            (kept.trouble, kept.demand, kept.machines) = (Some(why.clone()), Some(Err(why.clone())), Some(Err(why)));
            return;
        }
        if kept.held.is_none() {
            // A pool that is to go makes no record, and must know of the one that it has.
            kept.held = self.held(pool).await.ok().flatten();
        }
        let Some(held) = &kept.held else { return };
        let wanted = wanted(pool);
        let waiting = gitlab.waiting(&wanted, held.record, &pool.spec.provider.gitlab.projects, now);
        let (waiting, machines) = tokio::join!(waiting, gitlab.machines(held.record, now));
        kept.retry =
            [waiting.as_ref().err(), machines.as_ref().err()].into_iter().flatten().find_map(gitlab::Error::retry_at);
        kept.demand = Some(waiting.map_err(|error| chain(&error)));
        kept.machines = Some(machines.map_err(|error| chain(&error)));
    }

    /// The pool's GitLab, by its Secrets.
    pub(super) async fn gitlab(&self, pool: &RunnerPool) -> Result<Gitlab, String> {
        let secrets: Api<Secret> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let read = async |reference: &vmpod_api::pool::SecretKey| {
            let secret = secrets.get_opt(&reference.name).await.map_err(|error| chain(&error))?;
            let secret = secret.ok_or_else(|| format!("there is no Secret {:?}", reference.name))?;
            let value = secret.data.and_then(|mut data| data.remove(&reference.key));
            value
                .map(|value| value.0)
                .ok_or_else(|| format!("the Secret {:?} has no key {:?}", reference.name, reference.key))
        };
        let gitlab = &pool.spec.provider.gitlab;
        let token = read(&gitlab.token_secret_ref).await?;
        let token = String::from_utf8(token).map_err(|_| "the access token isn't text".to_owned())?;
        let ca = match &gitlab.ca_secret_ref {
            Some(reference) => Some(read(reference).await?),
            None => None,
        };
        self.gitlabs.get(&gitlab.url, ca.as_deref(), Token::new(token.trim().to_owned())).map_err(|error| chain(&error))
    }

    /// Looks after the pool's record, and keeps its token before anything is made with it.
    async fn ensure(
        &self,
        pool: &RunnerPool,
        gitlab: &Gitlab,
        kept: &mut Kept,
        now: Timestamp,
    ) -> Result<(), gitlab::Error> {
        let generation = pool.metadata.generation.unwrap_or(0);
        let fresh = |(of, at): (i64, Timestamp)| of == generation && now.duration_since(at) < ENSURE;
        if kept.held.is_some() && kept.ensured.is_some_and(fresh) {
            return Ok(());
        }
        if kept.held.is_none() {
            match self.held(pool).await {
                Ok(held) => kept.held = held,
                Err(error) => {
                    // Without knowing what is kept, a second token would be made.
                    kept.trouble = Some(chain(&error));
                    return Ok(());
                }
            }
        }
        let ensured = gitlab.ensure(&wanted(pool), kept.held.as_ref(), now).await?;
        if kept.held.as_ref() != Some(&ensured.held) {
            if let Err(error) = self.keep(pool, &ensured.held).await {
                kept.trouble = Some(format!("the runner's token can't be kept: {}", chain(&error)));
                return Ok(());
            }
            kept.held = Some(ensured.held);
        }
        kept.trouble = ensured.trouble.map(|error| chain(&error));
        if ensured.paused {
            kept.trouble = Some("the runner is paused at GitLab: no machine of the pool gets a job".to_owned());
        }
        kept.ensured = Some((generation, now));
        Ok(())
    }

    pub(super) async fn held(&self, pool: &RunnerPool) -> Result<Option<Held>, kube::Error> {
        let secrets: Api<Secret> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let secret = secrets.get_opt(&held_name(pool)).await?;
        Ok(secret.and_then(|secret| serde_json::from_slice(&secret.data?.get("held")?.0).ok()))
    }

    async fn keep(&self, pool: &RunnerPool, held: &Held) -> Result<(), kube::Error> {
        let secrets: Api<Secret> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let text = serde_json::to_string(held).map_err(kube::Error::SerdeError)?;
        let object = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": held_name(pool), "ownerReferences": [pool.controller_owner_ref(&())], "labels": {objects::POOL: pool.name_any()}},
            "stringData": {"held": text},
        });
        secrets.patch(&held_name(pool), &PatchParams::apply(MANAGER).force(), &Patch::Apply(&object)).await.map(drop)
    }
}

/// What a pool's record at GitLab is to be.
fn wanted(pool: &RunnerPool) -> Wanted {
    let gitlab = &pool.spec.provider.gitlab;
    Wanted {
        uid: pool.uid().unwrap_or_default(),
        name: key(pool),
        scope: match (gitlab.group, gitlab.project) {
            (Some(group), _) => record::Scope::Group(group),
            (None, Some(project)) => record::Scope::Project(project),
            (None, None) => record::Scope::Instance,
        },
        settings: record::Settings {
            tags: gitlab.tags.iter().cloned().collect(),
            run_untagged: gitlab.run_untagged,
            locked: false,
            protected: gitlab.protected,
            maximum_timeout: None,
        },
    }
}

fn held_name(pool: &RunnerPool) -> String {
    format!("vmpod-pool-{}", pool.name_any())
}
