//! What callers may do.
//!
//! Authorizers are asked in order; the first that has an opinion decides. Role-based access control
//! joins as one more of them.

use http::Method;

use super::node;
use crate::identity::{AUTHENTICATED, Identity, MASTERS};
use crate::server::Server;
use crate::status::Status;

/// A question about a resource.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Attributes<'a> {
    pub(crate) verb: &'a str,
    pub(crate) group: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) subresource: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) field_selector: &'a str,
}

/// An authorizer's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Yes.
    Allow,
    /// No opinion, with a word for people.
    Pass(String),
}

/// Paths that tell nothing about anybody.
const PUBLIC: [&str; 5] = ["/healthz", "/livez", "/readyz", "/version", "/openid/v1/jwks"];

/// May `identity` ask for a path that is no resource?
pub(crate) fn path(identity: &Identity, method: &Method, path: &str) -> Result<(), Status> {
    let verb = method.as_str().to_ascii_lowercase();
    if path_allowed(identity, &verb, path) {
        Ok(())
    } else {
        Err(refusal(identity, || Status::forbidden_path(&identity.user, &verb, path)))
    }
}

pub(crate) fn path_allowed(identity: &Identity, verb: &str, path: &str) -> bool {
    let reads = matches!(verb, "get" | "head");
    let under = |root: &str| path == root || path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/'));
    let public = reads && PUBLIC.iter().any(|root| under(root));
    let discovery =
        reads && ["/api", "/apis", "/openapi", "/.well-known/openid-configuration"].iter().any(|root| under(root));
    public || identity.in_group(MASTERS) || (discovery && identity.in_group(AUTHENTICATED))
}

/// Callers who showed no credential are told to; others are told no.
fn refusal(identity: &Identity, forbidden: impl FnOnce() -> Status) -> Status {
    if identity.in_group(AUTHENTICATED) { forbidden() } else { Status::unauthorized() }
}

/// May `identity` do this with a resource?
pub(crate) fn resource(server: &Server, identity: &Identity, attributes: &Attributes<'_>) -> Result<(), Status> {
    match decide(server, identity, attributes) {
        Decision::Allow => Ok(()),
        Decision::Pass(why) => Err(refusal(identity, || {
            let whole = if attributes.subresource.is_empty() {
                attributes.resource.to_owned()
            } else {
                format!("{}/{}", attributes.resource, attributes.subresource)
            };
            let mut status = Status::forbidden_user(
                &identity.user,
                attributes.verb,
                attributes.group,
                &whole,
                attributes.name,
                attributes.namespace,
            );
            if !why.is_empty() {
                status.message.push_str(": ");
                status.message.push_str(&why);
            }
            status
        })),
    }
}

/// Asks every authorizer.
pub(crate) fn decide(server: &Server, identity: &Identity, attributes: &Attributes<'_>) -> Decision {
    if identity.in_group(MASTERS) || asks_about_oneself(identity, attributes) {
        return Decision::Allow;
    }
    match identity.node_name() {
        Some(name) => node::decide(server, name, attributes),
        None => Decision::Pass(String::new()),
    }
}

/// Everybody may ask who they are and what they may do.
fn asks_about_oneself(identity: &Identity, attributes: &Attributes<'_>) -> bool {
    let known = match attributes.group {
        "authentication.k8s.io" => attributes.resource == "selfsubjectreviews",
        "authorization.k8s.io" => matches!(attributes.resource, "selfsubjectaccessreviews" | "selfsubjectrulesreviews"),
        _ => false,
    };
    known && attributes.verb == "create" && identity.in_group(AUTHENTICATED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_public_and_discovery_is_for_the_authenticated() {
        let nobody = Identity::anonymous();
        let somebody = Identity::new("x", Vec::<String>::new());
        for path in ["/readyz", "/livez/ping", "/version"] {
            assert!(path_allowed(&nobody, "get", path), "{path}");
            assert!(!path_allowed(&nobody, "post", path), "{path}");
        }
        for path in ["/api", "/apis/apps/v1", "/openapi/v3"] {
            assert!(!path_allowed(&nobody, "get", path), "{path}");
            assert!(path_allowed(&somebody, "get", path), "{path}");
        }
        assert!(!path_allowed(&somebody, "get", "/metrics"));
        assert!(!path_allowed(&somebody, "get", "/apisx"));
        assert!(path_allowed(&Identity::admin(), "get", "/metrics"));
        assert_eq!(path(&nobody, &Method::GET, "/api").unwrap_err().code, 401);
        assert_eq!(path(&somebody, &Method::GET, "/metrics").unwrap_err().code, 403);
    }
}
