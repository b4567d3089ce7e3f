//! Brings a pod's volumes into its guest and keeps them up to date.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{Container, Pod, ServiceAccount},
};
use kube::{Api, Client, api::PostParams};
use tokio::{io::AsyncWriteExt as _, sync::watch};
use vmpod_machine::{Exec, Guest, GuestState, Machine};

use super::{Layout, TokenKey, archive, is_automatic, layout, needs, tokens, volumes};
use crate::{
    env::Facts,
    error_chain,
    events::Kind,
    limited, pod,
    run_config::{RunConfig, fetch},
    world::{Wanted, World},
};

/// Objects are fetched again this often; they are up to date in the guest within a minute.
pub(crate) const REFRESH: Duration = Duration::from_secs(45);
/// One try may take this long.
const LONGEST_TRY: Duration = Duration::from_mins(2);

/// A token and when another is due.
struct Token {
    text: String,
    renew: Timestamp,
}

/// What the volumes of a pod hold, by what the API has; tokens are kept until they are due.
pub(crate) struct Contents {
    client: Client,
    tokens: BTreeMap<TokenKey, Token>,
}

struct Keeper {
    world: Arc<World>,
    facts: Facts,
    run: Option<Arc<RunConfig>>,
    contents: Contents,
    /// What the guest has.
    shown: Option<Layout>,
}

/// Works until the machine is over. Calls `mounted` when everything is in its place for the first time.
pub(crate) async fn keep(
    world: Arc<World>,
    wanted: watch::Receiver<Wanted>,
    machine: Machine,
    facts: Facts,
    run: Option<Arc<RunConfig>>,
    mounted: impl FnOnce() + Send,
) {
    let contents = Contents::new(world.client.clone());
    let mut keeper = Keeper { world, facts, run, contents, shown: None };
    let (mut state, mut guest) = (machine.state(), machine.guest().ready());
    let mut mounted = Some(mounted);
    let mut failures = 0_u32;
    let work = async {
        loop {
            if guest.wait_for(|guest| *guest == GuestState::Ready).await.is_err() {
                return;
            }
            let Some(pod) = wanted.borrow().pod.clone() else { return };
            let tried = tokio::time::timeout(LONGEST_TRY, keeper.bring(&pod, &machine.guest())).await;
            let result = tried.unwrap_or_else(|_| Err("the guest took too long".to_owned()));
            let wait = match result {
                Ok(()) => {
                    failures = 0;
                    REFRESH
                }
                Err(message) => {
                    tracing::info!(pod = pod::name(&pod), message, "the volumes can't be mounted");
                    keeper.world.events.pod(&pod, Kind::Warning, "FailedMount", message);
                    failures += 1;
                    Duration::from_secs(1 << failures.min(5)).min(REFRESH)
                }
            };
            // The token that every cluster adds keeps no pod from running in a guest that can't have it.
            let needless = volumes(&pod).iter().all(is_automatic) && failures >= 3;
            if (failures == 0 || needless)
                && let Some(mounted) = mounted.take()
            {
                mounted();
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // After a reboot nothing is mounted.
                lost = guest.wait_for(|guest| *guest != GuestState::Ready) => {
                    if lost.is_err() {
                        return;
                    }
                    keeper.shown = None;
                }
            }
        }
    };
    tokio::select! {
        () = work => {}
        _ = state.wait_for(vmpod_machine::State::is_final) => {}
    }
}

impl Keeper {
    async fn bring(&mut self, pod: &Pod, guest: &Guest) -> Result<(), String> {
        let container = pod::machine_container(pod).ok_or("the pod has no container")?;
        let env = self.run.as_ref().map(|run| run.env.as_slice()).unwrap_or_default();
        let wanted = self.contents.layout(pod, container, &self.facts, env).await?;
        if self.shown.as_ref() == Some(&wanted) {
            return Ok(());
        }
        unpack(guest, &archive::archive(&wanted)).await?;
        self.shown = Some(wanted);
        Ok(())
    }
}

impl Contents {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, tokens: BTreeMap::new() }
    }

    /// What a container of the pod is to see now.
    pub(crate) async fn layout(
        &mut self,
        pod: &Pod,
        container: &Container,
        facts: &Facts,
        env: &[(String, String)],
    ) -> Result<Layout, String> {
        let fetched = fetch(&self.client, pod::namespace(pod), &needs(pod)).await;
        let fetched = fetched.map_err(|error| error.message())?;
        let mut texts = BTreeMap::new();
        for key in tokens(pod) {
            let text = self.token(pod, &key).await?;
            texts.insert(key, text);
        }
        layout(pod, container, &fetched, &texts, facts, env).map_err(|error| error.to_string())
    }

    /// A token for the pod and no other, renewed when 80 % of its life is over.
    async fn token(&mut self, pod: &Pod, key: &TokenKey) -> Result<String, String> {
        let now = Timestamp::now();
        if let Some(token) = self.tokens.get(key).filter(|token| now < token.renew) {
            return Ok(token.text.clone());
        }
        let account = pod::spec(pod).and_then(|spec| spec.service_account_name.clone());
        let account = account.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned());
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), pod::namespace(pod));
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: key.0.clone().map(|audience| vec![audience]),
                expiration_seconds: Some(key.1),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
            }),
            ..TokenRequest::default()
        };
        let answer = limited(api.create_token_request(&account, &PostParams::default(), &request)).await;
        let status = answer
            .map_err(|error| format!("failed to fetch token of service account {account}: {}", error_chain(&error)))?
            .status
            .ok_or("the API issued no token")?;
        let text = status.token.filter(|token| !token.is_empty()).ok_or("the API issued no token")?;
        let expires = status.expiration_timestamp.ok_or("the API issued a token without an end")?;
        let left = expires.0.duration_since(now);
        let renew = now.saturating_add(SignedDuration::from_secs(left.as_secs() / 5 * 4)).unwrap_or(now);
        self.tokens.insert(key.clone(), Token { text: text.clone(), renew });
        Ok(text)
    }
}

async fn unpack(guest: &Guest, archive: &[u8]) -> Result<(), String> {
    let failed = |why: String| format!("the volumes can't be put into the guest: {why}");
    let exec = Exec { stdin: true, ..Exec::new(["sh", "-c", archive::UNPACK]) };
    let mut session = guest.exec(exec).await.map_err(|error| failed(error_chain(&error)))?;
    // A script that fails early reads no further: its own words tell more than a broken pipe.
    if let Some(mut stdin) = session.stdin.take()
        && stdin.write_all(archive).await.is_ok()
    {
        stdin.shutdown().await.ok();
    }
    let (status, _, stderr) = session.output().await.map_err(|error| failed(error_chain(&error)))?;
    if status.code() == 0 {
        return Ok(());
    }
    Err(failed(format!("exit code {}: {}", status.code(), String::from_utf8_lossy(&stderr).trim())))
}
