//! Sends one pod's status to the API: beside the work, the latest only, and only when it differs from what is shown.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use tokio::sync::watch;

use crate::{limited, pod, status};

/// Runs until the worker is gone.
pub(crate) async fn run(client: Client, mut wanted: watch::Receiver<Option<(Arc<Pod>, PodStatus)>>) {
    // What the API answered to our last patch; newer than what the watch brought until that catches up.
    let mut answered: Option<Pod> = None;
    let mut wait = Duration::from_millis(500);
    loop {
        let latest = wanted.borrow_and_update().clone();
        let mut failed = false;
        if let Some((watched, status)) = latest {
            let base = match &answered {
                Some(answered) if version(answered) > version(&watched) => answered,
                _ => &*watched,
            };
            if let Some(patch) = status::patch(base, &status) {
                let api: Api<Pod> = Api::namespaced(client.clone(), pod::namespace(&watched));
                let (params, patch) = (PatchParams::default(), Patch::Strategic(patch));
                match limited(api.patch_status(pod::name(&watched), &params, &patch)).await {
                    Ok(pod) => {
                        answered = Some(pod);
                        wait = Duration::from_millis(500);
                    }
                    // Gone, or another pod of this name: the watch will say so.
                    Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => {
                        tracing::debug!(
                            pod = pod::name(&watched),
                            code = error.code,
                            "the pod's status has nowhere to go"
                        );
                    }
                    Err(error) => {
                        tracing::warn!(
                            pod = pod::name(&watched),
                            error = crate::error_chain(&error),
                            "can't write the pod's status; trying again"
                        );
                        failed = true;
                    }
                }
            }
        }
        let again = async {
            if failed {
                tokio::time::sleep(wait).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = again => wait = (wait * 2).min(Duration::from_secs(30)),
        }
    }
}

/// Versions of one API server grow.
fn version(pod: &Pod) -> u64 {
    pod.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}
