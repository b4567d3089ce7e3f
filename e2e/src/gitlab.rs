//! A scripted GitLab: the part of its API that runners and those who manage them use, with its rules and its moods.
//!
//! It is faithful where that matters to its callers: who may do what with which token, one record with many machines
//! (`system_id`), each job given out once, traces by range, the limit of records, rate limits and their headers,
//! maintenance, GraphQL beside REST, and what an older version doesn't know. Tests use it in process ([`Gitlab`]) or as
//! the program `scripted-gitlab`, and move it by [`State`] or by `/-/control`.
//!
//! Protocol: GitLab's REST API v4 (`/runners`, `/jobs`), its GraphQL query `jobs`, and the runner's job protocol.

mod control;
mod gate;
mod graphql;
mod jobs;
mod params;
mod runners;
pub mod state;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use anyhow::{Context as _, Result};
use axum::Router;
use axum::middleware::from_fn_with_state;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::prerequisites;

pub use gate::Fault;
pub use state::{Config, Job, JobStatus, NewJob, State};

/// What the handlers share.
#[derive(Clone, Debug)]
struct Shared(Arc<Mutex<State>>);

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A handler that panicked shows in its own test; what it left is still the truth.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running scripted GitLab, gone when dropped.
#[derive(Debug)]
pub struct Gitlab {
    shared: Shared,
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Gitlab {
    /// Starts one on a free port of this host.
    pub async fn start(config: Config) -> Result<Self> {
        Self::on(SocketAddr::from(([127, 0, 0, 1], 0)), config).await
    }

    /// Starts one on an address.
    pub async fn on(address: SocketAddr, config: Config) -> Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| format!("can't listen on {address}"))?;
        let address = listener.local_addr().context("the listener has no address")?;
        let shared = Shared(Arc::new(Mutex::new(State::new(config))));
        let app = router(shared.clone());
        let serving = tokio::spawn(async move {
            // It ends by being aborted; a listener that fails shows as a refused connection.
            drop(axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>()).await);
        });
        Ok(Self { shared, address, serving })
    }

    /// Starts one whose packages have the job agent, for guests that fetch it.
    pub async fn with_agent() -> Result<Self> {
        static CRYPTO: Once = Once::new();
        CRYPTO.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let agent = prerequisites::job_agent()?;
        let packages = agent.parent().context("the agent is nowhere")?.to_owned();
        Self::start(Config { packages: Some(packages), ..Config::default() }).await
    }

    /// What a guest does at its first boot: it fetches the agent from GitLab's packages, takes its jobs and switches off.
    /// The host is 10.0.2.2 for it.
    #[must_use]
    pub fn user_data(&self) -> String {
        format!(
            "#!/bin/sh
gitlab=http://10.0.2.2:{}
wget -q -O /run/agent $gitlab/api/v4/projects/1/packages/generic/job-agent/1/job-agent && chmod 755 /run/agent
GITLAB_URL=$gitlab RUNNER_TOKEN='$(VMPOD_RUNNER_TOKEN)' SYSTEM_ID='$(VMPOD_SYSTEM_ID)' MAX_JOBS=$(VMPOD_MAX_JOBS) /run/agent
poweroff -f
",
            self.address.port()
        )
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL as this host sees it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Looks at or changes its state; nobody is served meanwhile.
    pub fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.shared.state())
    }

    /// Serves until it fails.
    pub async fn serve(mut self) -> Result<()> {
        (&mut self.serving).await.context("the server ended")
    }
}

impl Drop for Gitlab {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn router(shared: Shared) -> Router {
    Router::new()
        .merge(runners::router())
        .merge(jobs::router())
        .merge(graphql::router())
        .layer(from_fn_with_state(shared.clone(), gate::pass))
        // The tests' own way in has no moods.
        .merge(control::router())
        .with_state(shared)
}
