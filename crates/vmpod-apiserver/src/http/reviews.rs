//! Reviews (who is this, may they do that) and service account tokens.

use axum::body::Body;
use http::{Response, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{Call, respond};
use crate::auth::authorize::{self, Attributes, Decision};
use crate::auth::token::{Bound, Claims, ISSUER, Reference};
use crate::auth::{bootstrap, node, policy};
use crate::identity::{Identity, MASTERS};
use crate::managed_fields;
use crate::server::Server;
use crate::status::{Cause, Status};
use crate::store::Key;

/// A token that was checked.
pub(super) struct Authenticated {
    pub(super) identity: Identity,
    audiences: Vec<String>,
}

/// Who a bearer token for this API belongs to.
pub(super) fn authenticate(server: &Server, token: &str, now: Timestamp) -> Option<Authenticated> {
    check(server, token, now).filter(|found| found.audiences.iter().any(|audience| audience == ISSUER))
}

/// Checks signature, time, and that everything the token is bound to still exists; or that it is a good bootstrap token.
fn check(server: &Server, token: &str, now: Timestamp) -> Option<Authenticated> {
    if let Some(identity) = bootstrap::authenticate(server, token, now) {
        return Some(Authenticated { identity, audiences: vec![ISSUER.into()] });
    }
    let claims = server.signer.verify(token, now)?;
    let bound = &claims.kubernetes;
    let alive = |resource: &str, namespace: Option<&str>, wanted: &Reference| {
        server.store.get(&Key::new(resource, namespace, &wanted.name)).is_some_and(|found| found.uid() == wanted.uid)
    };
    let namespace = Some(bound.namespace.as_str());
    let whole = alive("serviceaccounts", namespace, &bound.serviceaccount)
        && bound.pod.as_ref().is_none_or(|pod| alive("pods", namespace, pod))
        // A pod's token only tells the node; without a pod it is bound to the node.
        && (bound.pod.is_some() || bound.node.as_ref().is_none_or(|node| alive("nodes", None, node)))
        && bound.secret.as_ref().is_none_or(|secret| alive("secrets", namespace, secret));
    if !whole {
        return None;
    }
    let mut identity = Identity::new(
        format!("system:serviceaccount:{}:{}", bound.namespace, bound.serviceaccount.name),
        ["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{}", bound.namespace)],
    );
    identity.uid = Some(bound.serviceaccount.uid.clone());
    let mut extra = |name: &str, value: &str| {
        identity.extra.insert(format!("authentication.kubernetes.io/{name}"), vec![value.to_owned()]);
    };
    extra("credential-id", &format!("JTI={}", claims.jti));
    if let Some(pod) = &bound.pod {
        extra("pod-name", &pod.name);
        extra("pod-uid", &pod.uid);
    }
    if let Some(node) = &bound.node {
        extra("node-name", &node.name);
        extra("node-uid", &node.uid);
    }
    Some(Authenticated { identity, audiences: claims.aud })
}

fn user_info(identity: &Identity) -> Value {
    let mut user = json!({ "username": identity.user, "groups": identity.groups });
    if let Some(uid) = &identity.uid {
        user["uid"] = uid.clone().into();
    }
    if !identity.extra.is_empty() {
        user["extra"] = json!(identity.extra);
    }
    user
}

/// Answers a review.
pub(super) fn review(call: &Call, mut value: Value) -> Result<Response<Body>, Status> {
    // A review's metadata is as the client sent it, apart from who manages it.
    if !value["metadata"].is_object() {
        value["metadata"] = json!({});
    }
    let status = match call.resource.kind.as_str() {
        "TokenReview" => token_review(call, &value),
        "SelfSubjectReview" => {
            value["metadata"]["creationTimestamp"] = crate::time::seconds(call.now).into();
            json!({ "userInfo": user_info(&call.identity) })
        }
        "SubjectAccessReview" => access(&call.server, &reviewed(&value["spec"])?, &value["spec"])?,
        "LocalSubjectAccessReview" => {
            let asked = value["spec"]["resourceAttributes"]["namespace"].as_str().unwrap_or_default();
            if Some(asked) != call.target.namespace.as_deref() {
                return Err(Status::bad_request(
                    "must provide the namespace of the request in spec.resourceAttributes.namespace",
                ));
            }
            access(&call.server, &reviewed(&value["spec"])?, &value["spec"])?
        }
        "SelfSubjectAccessReview" => access(&call.server, &call.identity, &value["spec"])?,
        "SelfSubjectRulesReview" => rules(call, &value),
        other => return Err(Status::internal(format!("{other} isn't answered"))),
    };
    value["status"] = status;
    Ok(respond::json_value(StatusCode::CREATED, &value))
}

fn token_review(call: &Call, review: &Value) -> Value {
    let token = review["spec"]["token"].as_str().unwrap_or_default();
    let wanted: Vec<&str> =
        review["spec"]["audiences"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let wanted = if wanted.is_empty() { vec![ISSUER] } else { wanted };
    let found = check(&call.server, token, call.now);
    let shared = |found: &Authenticated| -> Vec<String> {
        found.audiences.iter().filter(|audience| wanted.contains(&audience.as_str())).cloned().collect()
    };
    match found {
        Some(found) if !shared(&found).is_empty() => {
            json!({ "authenticated": true, "user": user_info(&found.identity), "audiences": shared(&found) })
        }
        _ => json!({ "user": {}, "error": "invalid bearer token" }),
    }
}

/// The identity that a review asks about.
fn reviewed(spec: &Value) -> Result<Identity, Status> {
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let user = spec["user"].as_str().unwrap_or_default();
    let groups = texts(&spec["groups"]);
    if user.is_empty() && groups.is_empty() {
        let why = Cause::invalid("spec.user", &"".into(), "at least one of user or group must be specified");
        return Err(Status::invalid_kind("authorization.k8s.io", "SubjectAccessReview", "", vec![why]));
    }
    // Asked about exactly these groups: none is added.
    Ok(Identity { user: user.into(), groups, uid: spec["uid"].as_str().map(str::to_owned), ..Identity::default() })
}

fn access(server: &Server, identity: &Identity, spec: &Value) -> Result<Value, Status> {
    let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    let decision = match (resource.is_object(), path.is_object()) {
        (true, false) => {
            let field = |name: &str| text(resource, name);
            let (verb, group, plural) = (field("verb"), field("group"), field("resource"));
            let (subresource, namespace, name) = (field("subresource"), field("namespace"), field("name"));
            let selector = resource["fieldSelector"]["rawSelector"].as_str().unwrap_or_default();
            authorize::decide(
                server,
                identity,
                &Attributes {
                    verb: &verb,
                    group: &group,
                    resource: &plural,
                    subresource: &subresource,
                    namespace: &namespace,
                    name: &name,
                    field_selector: selector,
                },
            )
        }
        (false, true) if authorize::path_allowed(server, identity, &text(path, "verb"), &text(path, "path")) => {
            Decision::Allow
        }
        (false, true) => Decision::Pass(String::new()),
        _ => {
            let why = Cause::invalid(
                "spec.resourceAttributes",
                &Value::Null,
                "exactly one of nonResourceAttributes or resourceAttributes must be specified",
            );
            return Err(Status::invalid_kind("authorization.k8s.io", "SubjectAccessReview", "", vec![why]));
        }
    };
    Ok(match decision {
        Decision::Allow => json!({ "allowed": true }),
        Decision::Pass(why) if why.is_empty() => json!({ "allowed": false }),
        Decision::Pass(why) => json!({ "allowed": false, "reason": why }),
    })
}

/// What the caller may do in a namespace.
fn rules(call: &Call, review: &Value) -> Value {
    let namespace = review["spec"]["namespace"].as_str().unwrap_or("default");
    let policy = policy::of(&call.server);
    let (mut resources, mut paths) = (Vec::new(), Vec::new());
    if call.identity.in_group(MASTERS) {
        // Also without a binding that says so.
        resources.push(json!({ "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"] }));
        paths.push(json!({ "verbs": ["*"], "nonResourceURLs": ["*"] }));
    }
    for rule in policy.rules(&call.identity, Some(namespace)) {
        let (list, shown) = (if rule.is_for_paths() { &mut paths } else { &mut resources }, rule.shown());
        if !list.contains(&shown) {
            list.push(shown);
        }
    }
    // What the node authorizer allows depends on the objects.
    let incomplete = call.identity.node_name().is_some();
    let mut answer = json!({ "resourceRules": resources, "nonResourceRules": paths, "incomplete": incomplete });
    if incomplete {
        answer["evaluationError"] = "node authorizer does not support user rule resolution".into();
    }
    answer
}

/// The shortest and the default life of a token, in seconds.
const SHORTEST: i64 = 600;
const DEFAULT: i64 = 3600;
/// Longer ones are cut to this.
const LONGEST: i64 = 366 * 24 * 3600;

/// `POST …/serviceaccounts/NAME/token`.
pub(super) fn token_request(call: &Call, request: &Value) -> Result<Response<Body>, Status> {
    let name = call.name()?;
    let namespace = call.target.namespace.as_deref();
    let account = call
        .server
        .store
        .get(&Key::new("serviceaccounts", namespace, name))
        .ok_or_else(|| Status::not_found(&call.resource, name))?;
    let mut answer = request.clone();
    if !answer["metadata"].is_object() {
        answer["metadata"] = json!({});
    }
    managed_fields_of(call, &mut answer);
    let namespace = namespace.unwrap_or_default();
    let meta = &mut answer["metadata"];
    meta["name"] = name.into();
    meta["namespace"] = namespace.into();
    meta["uid"] = account.uid().into();
    meta["creationTimestamp"] = crate::time::seconds(call.now).into();
    node::admit(&call.server, &call.identity, &call.resource, Some("token"), None, &answer)?;
    let invalid = |cause| Status::invalid_kind("authentication.k8s.io", "TokenRequest", "", vec![cause]);
    let spec = &mut answer["spec"];
    if spec["audiences"].as_array().is_none_or(Vec::is_empty) {
        spec["audiences"] = json!([ISSUER]);
    }
    let seconds = spec["expirationSeconds"].as_i64().unwrap_or(DEFAULT);
    if seconds < SHORTEST {
        return Err(invalid(Cause::invalid(
            "spec.expirationSeconds",
            &seconds.into(),
            "may not specify a duration less than 10 minutes",
        )));
    }
    if seconds > 1 << 32 {
        return Err(invalid(Cause::invalid(
            "spec.expirationSeconds",
            &seconds.into(),
            "may not specify a duration larger than 2^32 seconds",
        )));
    }
    let seconds = seconds.min(LONGEST);
    spec["expirationSeconds"] = seconds.into();
    let mut bound = Bound {
        namespace: namespace.into(),
        serviceaccount: Reference { name: name.into(), uid: account.uid().into() },
        pod: None,
        node: None,
        secret: None,
    };
    bind_to(call, &spec["boundObjectRef"], name, &mut bound)?;
    if spec.get("boundObjectRef").is_none() {
        spec["boundObjectRef"] = Value::Null;
    }
    let now = call.now.as_second();
    let claims = Claims {
        aud: spec["audiences"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect(),
        exp: now + seconds,
        iat: now,
        iss: ISSUER.into(),
        jti: uuid::Uuid::new_v4().to_string(),
        kubernetes: bound,
        nbf: now,
        sub: format!("system:serviceaccount:{namespace}:{name}"),
    };
    let token = call.server.signer.sign(&claims).ok_or_else(|| Status::internal("the token can't be signed"))?;
    let expiry = call.now.saturating_add(SignedDuration::from_secs(seconds)).map_err(Status::internal)?;
    answer["status"] = json!({ "token": token, "expirationTimestamp": crate::time::seconds(expiry) });
    Ok(respond::json_value(StatusCode::CREATED, &answer))
}

fn managed_fields_of(call: &Call, answer: &mut Value) {
    if let Some(kind) = call.server.registry().body(&call.resource, "token") {
        managed_fields::on_update(&kind, None, answer, &call.manager(), Some("token"), call.now);
    }
}

/// Binds a token to the object it is asked for, which must be the very one.
fn bind_to(call: &Call, wanted: &Value, account: &str, bound: &mut Bound) -> Result<(), Status> {
    if !wanted.is_object() {
        return Ok(());
    }
    let text = |field: &str| wanted[field].as_str().unwrap_or_default();
    let (plural, namespace) = match text("kind") {
        "Pod" => ("pods", Some(bound.namespace.as_str())),
        "Secret" => ("secrets", Some(bound.namespace.as_str())),
        "Node" => ("nodes", None),
        other => {
            return Err(Status::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to object of kind {other:?}"
            )));
        }
    };
    let registry = call.server.registry();
    let resource = registry.resource("", "v1", plural).ok_or_else(Status::no_route)?;
    let found = call
        .server
        .store
        .get(&Key::new(plural, namespace, text("name")))
        .ok_or_else(|| Status::not_found(&resource, text("name")))?;
    if !text("uid").is_empty() && text("uid") != found.uid() {
        let why = format!(
            "the UID in the bound object reference ({}) does not match the UID in record. The object might have been deleted and then recreated",
            text("uid")
        );
        return Err(Status::conflict(&resource, text("name"), &why));
    }
    let reference = Reference { name: text("name").into(), uid: found.uid().into() };
    match plural {
        "pods" => {
            let digest = found.digest();
            if digest["spec"]["serviceAccountName"].as_str().unwrap_or("default") != account {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
                )));
            }
            let node = digest["spec"]["nodeName"]
                .as_str()
                .and_then(|name| call.server.store.get(&Key::new("nodes", None, name)));
            bound.node = node.map(|node| Reference { name: node.key().name.to_string(), uid: node.uid().into() });
            bound.pod = Some(reference);
        }
        "secrets" => bound.secret = Some(reference),
        _ => bound.node = Some(reference),
    }
    Ok(())
}
