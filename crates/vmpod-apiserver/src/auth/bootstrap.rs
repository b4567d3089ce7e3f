//! Bootstrap tokens: what a host shows before it has a certificate of its own.
//!
//! A token `ID.SECRET` is a Secret `bootstrap-token-ID` of the type `bootstrap.kubernetes.io/token` in
//! `kube-system`. Whoever shows it is the user `system:bootstrap:ID` in `system:bootstrappers`.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::http::{DeleteOptions, delete_object};
use crate::identity::Identity;
use crate::server::{Server, digest};
use crate::status::Status;
use crate::store::{Key, Object};

/// The group of hosts that have no certificate yet.
pub(crate) const BOOTSTRAPPERS: &str = "system:bootstrappers";
const NAMESPACE: &str = "kube-system";
const KIND: &str = "bootstrap.kubernetes.io/token";
const PREFIX: &str = "bootstrap-token-";
/// When a token that couldn't be removed is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// The two parts of a bootstrap token, when this is one.
fn parts(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let fits = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    (fits(id, 6) && fits(secret, 16)).then_some((id, secret))
}

fn field(secret: &Value, name: &str) -> Option<String> {
    String::from_utf8(STANDARD.decode(secret["data"][name].as_str()?).ok()?).ok()
}

/// How long a token is good, from now; none when it doesn't end. A time that can't be read is over.
fn left(secret: &Value, now: Timestamp) -> Option<Duration> {
    secret["data"].get("expiration")?;
    let end = field(secret, "expiration").and_then(|end| end.parse::<Timestamp>().ok());
    Some(end.and_then(|end| Duration::try_from(end.duration_since(now)).ok()).unwrap_or_default())
}

fn is_group(name: &str) -> bool {
    let rest = name.strip_prefix("system:bootstrappers:").unwrap_or_default();
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    rest.len() <= 256
        && rest.bytes().all(|byte| fits(byte) || matches!(byte, b':' | b'-'))
        && rest.bytes().last().is_some_and(fits)
}

/// Who the Secret says that a token belongs to, if it is a good one.
fn identity(secret: &Value, id: &str, shown: &str, now: Timestamp) -> Option<Identity> {
    let is = |name: &str, wanted: &str| field(secret, name).is_some_and(|value| value == wanted);
    // Digests are compared, so that the time it takes tells nothing about the secret.
    let same = field(secret, "token-secret")
        .is_some_and(|kept| !kept.is_empty() && digest(kept.as_bytes()) == digest(shown.as_bytes()));
    let good = secret["type"] == KIND
        && secret["metadata"]["deletionTimestamp"].is_null()
        && is("token-id", id)
        && same
        && is("usage-bootstrap-authentication", "true")
        && left(secret, now) != Some(Duration::ZERO);
    if !good {
        return None;
    }
    let mut groups = vec![BOOTSTRAPPERS.to_owned()];
    let extra = field(secret, "auth-extra-groups").unwrap_or_default();
    for group in extra.split(',').map(str::trim).filter(|group| !group.is_empty()) {
        if !is_group(group) {
            return None;
        }
        groups.push(group.to_owned());
    }
    Some(Identity::new(format!("system:bootstrap:{id}"), groups))
}

/// Who a bootstrap token belongs to.
pub(crate) fn authenticate(server: &Server, token: &str, now: Timestamp) -> Option<Identity> {
    let (id, secret) = parts(token)?;
    let kept = server.store.get(&Key::new("secrets", Some(NAMESPACE), &format!("{PREFIX}{id}")))?;
    identity(&kept.value(), id, secret, now)
}

/// Removes the tokens that ended, until `stop` is cancelled.
pub(crate) async fn run(server: Arc<Server>, stop: CancellationToken) {
    loop {
        // Before the look, so that nothing falls in between.
        let mut feed = server.store.watch_now(Some("secrets"));
        let next = sweep(&server, Timestamp::now()).await;
        let wait = async {
            match next {
                Some(next) => tokio::time::sleep(next).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = wait => {}
            // A token that was made or changed may end sooner. A feed that was cut off is begun again.
            _ = feed.events.recv() => {}
        }
    }
}

/// Removes the tokens that have ended; tells when the next one does.
async fn sweep(server: &Arc<Server>, now: Timestamp) -> Option<Duration> {
    let mut next: Option<Duration> = None;
    for object in server.store.list("secrets", Some(NAMESPACE)).objects {
        if !object.key().name.starts_with(PREFIX) {
            continue;
        }
        let secret = object.value();
        if secret["type"] != KIND {
            continue;
        }
        let wait = match left(&secret, now) {
            None => continue,
            Some(left) if left > Duration::ZERO => left,
            Some(_) => match remove(server, &object).await {
                Ok(()) => continue,
                Err(status) => {
                    tracing::warn!(token = %object.key().name, error = %status, "an ended bootstrap token stays");
                    RETRY
                }
            },
        };
        next = Some(next.map_or(wait, |next| next.min(wait)));
    }
    next
}

async fn remove(server: &Arc<Server>, token: &Object) -> Result<(), Status> {
    let Some(secrets) = server.resource_stored_as("secrets") else { return Ok(()) };
    let options = DeleteOptions::background().with_uid(token.uid());
    match delete_object(server, &secrets, token.key(), &options).await {
        Err(status) if status.code != 404 => Err(status),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn secret() -> Value {
        let text = |text: &str| STANDARD.encode(text);
        json!({
            "type": KIND,
            "metadata": { "name": "bootstrap-token-abcdef" },
            "data": {
                "token-id": text("abcdef"), "token-secret": text("0123456789abcdef"),
                "usage-bootstrap-authentication": text("true"), "expiration": text("2030-01-01T00:00:00Z"),
                "auth-extra-groups": text("system:bootstrappers:vmpod"),
            },
        })
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_token_is_good_until_it_ends() {
        let shown = "0123456789abcdef";
        let found = identity(&secret(), "abcdef", shown, at("2029-12-31T00:00:00Z")).unwrap();
        assert_eq!(found.user, "system:bootstrap:abcdef");
        assert_eq!(found.groups, [BOOTSTRAPPERS, "system:bootstrappers:vmpod", "system:authenticated"]);
        assert_eq!(identity(&secret(), "abcdef", shown, at("2030-01-01T00:00:00Z")), None);
    }

    #[test]
    fn whatever_is_wrong_with_it_makes_it_nobodys() {
        let text = |text: &str| STANDARD.encode(text);
        let now = at("2029-01-01T00:00:00Z");
        let good = "0123456789abcdef";
        assert_eq!(identity(&secret(), "abcdef", "0123456789abcdee", now), None);
        assert_eq!(identity(&secret(), "abcdeg", good, now), None);
        for (field, value) in [
            ("usage-bootstrap-authentication", "false"),
            ("expiration", "soon"),
            ("auth-extra-groups", "system:masters"),
            ("auth-extra-groups", "system:bootstrappers:"),
            ("token-secret", ""),
        ] {
            let mut bad = secret();
            bad["data"][field] = text(value).into();
            assert_eq!(identity(&bad, "abcdef", good, now), None, "{field}: {value}");
        }
        let mut other = secret();
        other["type"] = "Opaque".into();
        assert_eq!(identity(&other, "abcdef", good, now), None);
        for junk in [
            "",
            ".",
            "abcdef",
            "abcdef.",
            "abcde.0123456789abcdef",
            "ABCDEF.0123456789abcdef",
            "abcdef.0123456789abcdef.x",
        ] {
            assert_eq!(parts(junk), None, "{junk}");
        }
        assert_eq!(parts("abcdef.0123456789abcdef"), Some(("abcdef", good)));
    }
}
