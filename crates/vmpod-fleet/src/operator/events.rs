//! What the operator tells of pools, for `kubectl describe` and `kubectl get events`.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, PostParams};
use kube::{Resource as _, ResourceExt as _};
use vmpod_api::pool::RunnerPool;

use super::{MANAGER, Operator, key, namespace};
use crate::{chain, objects};

/// The API refuses longer messages.
const LONGEST: usize = 1024;
/// Of so many things at most is told at once: each is told once, and a pool of a thousand must not flood the API.
const MOST: usize = 10;

/// Something to tell of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Operator {
    /// Tells what went wrong with a pool. Nobody depends on it: what can't be told is left.
    pub(super) async fn warn(&self, pool: &RunnerPool, told: Vec<Told>, now: Timestamp) {
        let events: Api<Event> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let events = &events;
        let most = told.into_iter().take(MOST);
        let one = |told: Told| -> super::effects::Effect<'_, ()> {
            Box::pin(async move {
                if let Err(error) = events.create(&PostParams::default(), &event(pool, told, now)).await {
                    tracing::debug!(pool = key(pool), error = chain(&error), "an event wasn't written");
                }
                Ok(())
            })
        };
        // Each tells of its own failure.
        drop(super::effects::all(most.map(one).collect()).await);
    }
}

fn event(pool: &RunnerPool, told: Told, now: Timestamp) -> Event {
    let mut message = told.message;
    if message.len() > LONGEST {
        // The end of a log says more than its beginning.
        let at = (message.len() - LONGEST + 4..=message.len()).find(|at| message.is_char_boundary(*at));
        message = format!("…{}", &message[at.unwrap_or(message.len())..]);
    }
    let at = Some(Time(objects::whole_second(now)));
    Event {
        metadata: ObjectMeta {
            // Told once more, it is the same.
            name: Some(format!("{}.{}", pool.name_any(), objects::fingerprint(&format!("{now} {message}")))),
            namespace: pool.namespace(),
            ..ObjectMeta::default()
        },
        involved_object: pool.object_ref(&()),
        type_: Some("Warning".to_owned()),
        reason: Some(told.reason.to_owned()),
        message: Some(message),
        source: Some(EventSource { component: Some(MANAGER.to_owned()), host: None }),
        first_timestamp: at.clone(),
        last_timestamp: at,
        count: Some(1),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_long_message_keeps_its_end() {
        let pool: RunnerPool = serde_json::from_value(json!({
            "apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool", "metadata": {"name": "small", "namespace": "ci"},
            "spec": {"provider": {}, "image": "x"}}))
        .unwrap();
        let told = |message: String| event(&pool, Told { reason: "RunnerFailed", message }, Timestamp::UNIX_EPOCH);
        assert_eq!(told("short".to_owned()).message.unwrap(), "short");
        let long = told(format!("{}end", "ü".repeat(1000))).message.unwrap();
        assert!(long.len() <= LONGEST && long.starts_with('…') && long.ends_with("end"), "{}", long.len());
        let about = told(String::new()).involved_object;
        assert_eq!((about.kind.as_deref(), about.name.as_deref()), (Some("RunnerPool"), Some("small")));
    }
}
