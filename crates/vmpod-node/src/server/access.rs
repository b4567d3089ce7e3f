//! Who calls, and what that caller may do.
//!
//! A caller is known by a client certificate or by a bearer token that the API reviews; there are no anonymous callers.
//! What it may do, the API decides (`SubjectAccessReview`). When the API can't be asked, nobody new gets in.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http::Method;
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, api::PostParams};
use sha2::{Digest as _, Sha256};
use tokio::{sync::Semaphore, time::Instant, time::timeout};

/// Reviewed tokens are believed for so long: the kubelet's `authentication.webhook.cacheTTL`.
const TOKEN: Duration = Duration::from_mins(2);
/// Refused ones are refused for so long without asking again.
const TOKEN_REFUSED: Duration = Duration::from_secs(10);
/// The kubelet's `authorization.webhook.cacheAuthorizedTTL`.
const ALLOWED: Duration = Duration::from_mins(5);
/// The kubelet's `authorization.webhook.cacheUnauthorizedTTL`.
const DENIED: Duration = Duration::from_secs(30);
/// Answers kept of each kind.
const KEPT: usize = 4096;
/// Questions to the API at once: a caller must not make us flood it.
const ASKING: usize = 16;
/// How long one question may take.
const ANSWER: Duration = Duration::from_secs(10);

/// A caller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct User {
    /// The name.
    pub name: String,
    /// The UID, where the authenticator tells one.
    pub uid: Option<String>,
    /// The groups, `system:authenticated` among them.
    pub groups: Vec<String>,
    /// Whatever else the authenticator tells.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// A user by name and groups; `system:authenticated` is added.
    #[must_use]
    pub fn new(name: &str, mut groups: Vec<String>) -> Self {
        let everyone = "system:authenticated";
        if !groups.iter().any(|group| group == everyone) {
            groups.push(everyone.to_owned());
        }
        Self { name: name.to_owned(), uid: None, groups, extra: BTreeMap::new() }
    }
}

/// Why the API gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// A review failed.
    #[error("the API did not answer a {0}")]
    Review(&'static str, #[source] kube::Error),
    /// A review took too long.
    #[error("the API did not answer a {0} in time")]
    Timeout(&'static str),
}

/// What a request asks for, in the terms of the API's authorizers: a verb on a subresource of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Action {
    /// The verb.
    pub verb: &'static str,
    /// The subresources of which any one suffices, the finest first.
    pub subresources: &'static [&'static str],
}

impl Action {
    /// The kubelet's mapping, fine-grained subresources included, with one difference: what runs something in a
    /// container is `create` also when it comes as a GET (as every WebSocket does), so that the right to `get`
    /// `nodes/proxy` is only a right to look.
    #[must_use]
    pub fn of(method: &Method, path: &str) -> Self {
        let below =
            |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let acts = ["/exec", "/attach", "/portForward", "/run"].into_iter().any(below);
        let verb = match *method {
            _ if acts => "create",
            Method::GET | Method::HEAD => "get",
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            // The authorizer refuses a verb that nobody can be granted by accident.
            _ => "unknown",
        };
        let subresources: &[&str] = if below("/stats") {
            &["stats"]
        } else if below("/metrics") {
            &["metrics"]
        } else if below("/logs") {
            &["log"]
        } else if below("/pods") || below("/runningpods") {
            &["pods", "proxy"]
        } else if below("/healthz") {
            &["healthz", "proxy"]
        } else if below("/configz") {
            &["configz", "proxy"]
        } else {
            &["proxy"]
        };
        Self { verb, subresources }
    }
}

/// Asks the API, and remembers its answers.
pub struct Access {
    node: String,
    client: kube::Client,
    tokens: Cache<[u8; 32], Option<User>>,
    rights: Cache<(User, &'static str, &'static str), bool>,
    asking: Semaphore,
}

impl Access {
    /// For the node of this name.
    #[must_use]
    pub fn new(node: &str, client: kube::Client) -> Self {
        Self {
            node: node.to_owned(),
            client,
            tokens: Cache::default(),
            rights: Cache::default(),
            asking: Semaphore::new(ASKING),
        }
    }

    /// The node's name.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Whose token this is; `None` when the API doesn't know it.
    pub async fn authenticate(&self, token: &str) -> Result<Option<User>, AccessError> {
        let key: [u8; 32] = Sha256::digest(token).into();
        if let Some(known) = self.tokens.get(&key, Instant::now()) {
            return Ok(known);
        }
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: None };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = self.ask("TokenReview", &review).await?;
        let status = answer.status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true)).map(|user| User {
            uid: user.uid,
            extra: user.extra.unwrap_or_default(),
            ..User::new(&user.username.unwrap_or_default(), user.groups.unwrap_or_default())
        });
        let user = user.filter(|user| !user.name.is_empty());
        self.tokens.put(key, user.clone(), Instant::now() + if user.is_some() { TOKEN } else { TOKEN_REFUSED });
        Ok(user)
    }

    /// Whether the user may do this. An error means that nobody could tell, so: no.
    pub async fn authorize(&self, user: &User, action: &Action) -> Result<bool, AccessError> {
        let mut failed = None;
        for subresource in action.subresources {
            match self.may(user, action.verb, subresource).await {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(false), Err)
    }

    async fn may(&self, user: &User, verb: &'static str, subresource: &'static str) -> Result<bool, AccessError> {
        let key = (user.clone(), verb, subresource);
        if let Some(known) = self.rights.get(&key, Instant::now()) {
            return Ok(known);
        }
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: user.uid.clone(),
                groups: Some(user.groups.clone()),
                extra: Some(user.extra.clone()).filter(|extra| !extra.is_empty()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    name: Some(self.node.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let answer = self.ask("SubjectAccessReview", &review).await?;
        let allowed = answer.status.is_some_and(|status| status.allowed && status.denied != Some(true));
        self.rights.put(key, allowed, Instant::now() + if allowed { ALLOWED } else { DENIED });
        Ok(allowed)
    }

    async fn ask<K>(&self, kind: &'static str, review: &K) -> Result<K, AccessError>
    where
        K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
    {
        let api: Api<K> = Api::all(self.client.clone());
        let asked = async {
            let _permit = self.asking.acquire().await;
            api.create(&PostParams::default(), review).await
        };
        match timeout(ANSWER, asked).await {
            Ok(answer) => answer.map_err(|error| AccessError::Review(kind, error)),
            Err(_elapsed) => Err(AccessError::Timeout(kind)),
        }
    }
}

/// Answers with an end.
struct Cache<K, V> {
    entries: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self { entries: Mutex::new(HashMap::new()) }
    }
}

impl<K: Eq + Hash, V: Clone> Cache<K, V> {
    fn get(&self, key: &K, now: Instant) -> Option<V> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, value) = entries.get(key)?;
        (*until > now).then(|| value.clone())
    }

    fn put(&self, key: K, value: V, until: Instant) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= KEPT {
            let now = Instant::now();
            entries.retain(|_, (until, _)| *until > now);
        }
        if entries.len() >= KEPT {
            entries.clear();
        }
        entries.insert(key, (until, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_map_to_the_kubelets_subresources() {
        let cases = [
            ("GET", "/stats/summary", "get", &["stats"][..]),
            ("GET", "/metrics", "get", &["metrics"]),
            ("GET", "/metrics/resource", "get", &["metrics"]),
            ("GET", "/metricsx", "get", &["proxy"]),
            ("GET", "/logs/", "get", &["log"]),
            ("GET", "/pods", "get", &["pods", "proxy"]),
            ("GET", "/pods/", "get", &["pods", "proxy"]),
            ("GET", "/podsecurity", "get", &["proxy"]),
            ("GET", "/runningpods/", "get", &["pods", "proxy"]),
            ("GET", "/healthz", "get", &["healthz", "proxy"]),
            ("HEAD", "/healthz/ping", "get", &["healthz", "proxy"]),
            ("GET", "/configz", "get", &["configz", "proxy"]),
            ("GET", "/containerLogs/n/p/c", "get", &["proxy"]),
            ("POST", "/exec/n/p/c", "create", &["proxy"]),
            ("GET", "/exec/n/p/c", "create", &["proxy"]),
            ("GET", "/attach/n/p/c", "create", &["proxy"]),
            ("GET", "/portForward/n/p", "create", &["proxy"]),
            ("POST", "/run/n/p/c", "create", &["proxy"]),
            ("PUT", "/", "update", &["proxy"]),
            ("PATCH", "/", "patch", &["proxy"]),
            ("DELETE", "/", "delete", &["proxy"]),
            ("BREW", "/pods", "unknown", &["pods", "proxy"]),
        ];
        for (method, path, verb, subresources) in cases {
            let action = Action::of(&method.parse().unwrap(), path);
            assert_eq!((action.verb, action.subresources), (verb, subresources), "{method} {path}");
        }
    }

    #[test]
    fn answers_are_forgotten_in_time_and_never_pile_up() {
        let cache = Cache::default();
        let now = Instant::now();
        cache.put(0, "yes", now + ALLOWED);
        assert_eq!(cache.get(&0, now + ALLOWED - Duration::from_millis(1)), Some("yes"));
        assert_eq!(cache.get(&0, now + ALLOWED), None);
        for key in 0..3 * KEPT {
            cache.put(key, "no", now + DENIED);
        }
        assert!(cache.entries.lock().unwrap().len() <= KEPT);
    }
}
