//! The CI system as the operator sees it: late, refusing, and sometimes without an answer to what it did.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt as _;
use tokio::time::sleep;
use vmpod_api::RunnerPool;
use vmpod_fleet::provider::{Keep, Machine, Provider, Providers, Registered, Secrets, Seen, Trouble, Waiting};

use crate::world::{Shared, World};

/// The only CI system there is.
pub(crate) struct Site {
    world: Shared,
}

impl Site {
    pub(crate) fn new(world: &Shared) -> Self {
        Self { world: world.clone() }
    }
}

impl Providers for Site {
    fn open(&self, pool: &RunnerPool, _secrets: &Secrets) -> Result<Arc<dyn Provider>, Trouble> {
        Ok(Arc::new(Pool { world: self.world.clone(), uid: pool.uid().unwrap(), name: pool.name_any() }))
    }
}

struct Pool {
    world: Shared,
    uid: String,
    name: String,
}

impl Pool {
    /// A call: it may fail before or after its effect.
    async fn call<T>(&self, work: impl FnOnce(&mut World) -> T) -> Result<T, Trouble> {
        let fate = self.world.with(World::ci_fate);
        sleep(fate.before).await;
        if fate.lost_before {
            return Err(Trouble::new("the simulated CI system doesn't answer"));
        }
        let done = self.world.with(work);
        sleep(fate.after).await;
        if fate.lost_after { Err(Trouble::new("the simulated answer is lost")) } else { Ok(done) }
    }
}

fn token(keep: &Keep) -> String {
    keep.expose().to_owned()
}

#[async_trait::async_trait]
impl Provider for Pool {
    async fn register(&self, kept: Option<&Keep>, _now: Timestamp) -> Result<Registered, Trouble> {
        let kept = kept.map(token);
        let token = self.call(|world| world.register(&self.uid, &self.name, kept.as_deref())).await?;
        Ok(Registered { keep: Keep::new(token), trouble: None })
    }

    async fn waiting(&self, _keep: &Keep, _now: Timestamp) -> Result<Waiting, Trouble> {
        let (count, oldest) = self.call(|world| world.waiting(&self.uid)).await?;
        Ok(Waiting { count, oldest })
    }

    async fn machines(&self, _keep: &Keep, _now: Timestamp) -> Result<BTreeMap<String, Seen>, Trouble> {
        self.call(|world| world.machines(&self.uid)).await
    }

    async fn is_busy(&self, _keep: &Keep, machine: &str, _now: Timestamp) -> Result<bool, Trouble> {
        self.call(|world| world.is_busy(&self.uid, machine)).await
    }

    async fn forget(&self, _keep: &Keep, machine: &str, _now: Timestamp) -> Result<(), Trouble> {
        self.call(|world| world.forget(&self.uid, machine)).await
    }

    async fn unregister(&self, _keep: Option<&Keep>, _now: Timestamp) -> Result<(), Trouble> {
        self.call(|world| world.unregister(&self.uid)).await
    }

    fn machine_id(&self, _name: &str, uid: &str) -> String {
        format!("m-{uid}")
    }

    fn user_data(&self, keep: &Keep, _template: Option<&str>, machine: Machine<'_>) -> Result<String, Trouble> {
        Ok(format!("{} {} {} {}", self.uid, machine.id, machine.jobs, token(keep)))
    }
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fate {
    pub(crate) before: Duration,
    pub(crate) after: Duration,
    pub(crate) refused: Option<u16>,
    pub(crate) lost_before: bool,
    pub(crate) lost_after: bool,
    pub(crate) crash: bool,
}
