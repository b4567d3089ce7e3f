//! What callers may do.
//!
//! Authorizers are asked in order, and the first that allows decides: the administrators' group, the
//! node authorizer, role-based access control.

use http::Method;

use super::{node, policy};
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

impl Attributes<'_> {
    /// The one object that is asked about, also by a list or watch that selects it by its name.
    pub(crate) fn selected_name(&self) -> &str {
        if self.name.is_empty() && matches!(self.verb, "list" | "watch" | "deletecollection") {
            node::selected(self.field_selector, "metadata.name").unwrap_or_default()
        } else {
            self.name
        }
    }
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
pub(crate) fn path(server: &Server, identity: &Identity, method: &Method, path: &str) -> Result<(), Status> {
    let verb = method.as_str().to_ascii_lowercase();
    if path_allowed(server, identity, &verb, path) {
        Ok(())
    } else {
        Err(refusal(identity, || Status::forbidden_path(&identity.user, &verb, path)))
    }
}

pub(crate) fn path_allowed(server: &Server, identity: &Identity, verb: &str, path: &str) -> bool {
    is_public(verb, path) || identity.in_group(MASTERS) || policy::of(server).allows_path(identity, verb, path)
}

/// Whether everybody may ask for a path, whatever the roles say.
fn is_public(verb: &str, path: &str) -> bool {
    let under = |root: &str| path == root || path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/'));
    matches!(verb, "get" | "head") && PUBLIC.iter().any(|root| under(root))
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
    if identity.in_group(MASTERS) {
        return Decision::Allow;
    }
    let by_node = identity.node_name().map(|name| node::decide(server, name, attributes));
    if by_node == Some(Decision::Allow) || policy::of(server).allows(identity, attributes) {
        return Decision::Allow;
    }
    by_node.unwrap_or_else(|| Decision::Pass(String::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_public_and_nothing_near_it_is() {
        for path in ["/readyz", "/livez/ping", "/version"] {
            assert!(is_public("get", path), "{path}");
            assert!(!is_public("post", path), "{path}");
        }
        for path in ["/api", "/apis/apps/v1", "/openapi/v3", "/metrics", "/versions", "/"] {
            assert!(!is_public("get", path), "{path}");
        }
    }
}
