//! Who may do what: roles and bindings, bootstrap tokens, priority classes, disruption budgets.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first thing that is wrong")]

#[path = "support/wait.rs"]
mod wait;

use axum::body::Body;
use base64::Engine as _;
use http::{Method, Request};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tower::ServiceExt as _;
use vmpod_apiserver::{ApiServer, Identity, Options};
use wait::until;

const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
const JSON: &str = "application/json";
const PODS: &str = "/api/v1/namespaces/default/pods";

struct World {
    server: ApiServer,
    _controllers: AbortOnDropHandle<()>,
    _dir: tempfile::TempDir,
}

/// Who asks.
enum Caller<'a> {
    Is(&'a Identity),
    Shows(&'a str),
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { dir: dir.path().join("api"), listen: None, extra_sans: Vec::new() };
        let server = ApiServer::open(options).await.unwrap();
        let controllers = AbortOnDropHandle::new(tokio::spawn({
            let server = server.clone();
            async move { server.run_controllers(CancellationToken::new()).await }
        }));
        Self { server, _controllers: controllers, _dir: dir }
    }

    async fn call(&self, caller: &Caller<'_>, method: Method, path: &str, ty: &str, body: Value) -> (u16, Value) {
        let mut request = Request::builder().method(method).uri(path).header("content-type", ty);
        let router = match caller {
            Caller::Is(identity) => self.server.router_as((*identity).clone()),
            Caller::Shows(token) => {
                request = request.header("authorization", format!("Bearer {token}"));
                self.server.router()
            }
        };
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        let response = router.oneshot(request.body(body).unwrap()).await.unwrap();
        let code = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (code, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    async fn get(&self, who: &Identity, path: &str) -> (u16, Value) {
        self.call(&Caller::Is(who), Method::GET, path, JSON, Value::Null).await
    }

    async fn post(&self, who: &Identity, path: &str, body: Value) -> (u16, Value) {
        self.call(&Caller::Is(who), Method::POST, path, JSON, body).await
    }

    async fn make(&self, path: &str, body: Value) -> Value {
        let (code, answer) = self.post(&Identity::admin(), path, body).await;
        assert_eq!(code, 201, "{path}: {answer}");
        answer
    }

    async fn patch(&self, path: &str, body: Value) -> (u16, Value) {
        let admin = Identity::admin();
        self.call(&Caller::Is(&admin), Method::PATCH, path, "application/merge-patch+json", body).await
    }
}

fn account(name: &str) -> Identity {
    Identity::new(
        format!("system:serviceaccount:default:{name}"),
        ["system:serviceaccounts", "system:serviceaccounts:default"],
    )
}

fn role(name: &str, rules: &Value) -> Value {
    json!({ "metadata": { "name": name }, "rules": rules })
}

fn bound(name: &str, kind: &str, subject: &Value) -> Value {
    json!({ "metadata": { "name": name }, "roleRef": { "kind": kind, "name": name }, "subjects": [subject] })
}

fn sa(name: &str) -> Value {
    json!({ "kind": "ServiceAccount", "name": name, "namespace": "default" })
}

#[tokio::test]
async fn roles_and_bindings_decide() {
    let world = World::new().await;
    let me = account("me");
    assert_eq!(world.get(&me, PODS).await.0, 403);
    let rules = json!([{ "verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods", "pods/log"] }]);
    world.make(&format!("{RBAC}/namespaces/default/roles"), role("reader", &rules)).await;
    let made = world.make(&format!("{RBAC}/namespaces/default/rolebindings"), bound("reader", "Role", &sa("me"))).await;
    assert_eq!(made["roleRef"]["apiGroup"], "rbac.authorization.k8s.io");
    assert_eq!(world.get(&me, PODS).await.0, 200);
    assert_eq!(world.get(&account("other"), PODS).await.0, 403);
    assert_eq!(world.get(&me, "/api/v1/pods").await.0, 403);
    assert_eq!(world.get(&me, "/api/v1/namespaces/kube-system/pods").await.0, 403);
    let (code, refused) = world.post(&me, PODS, json!({ "metadata": { "name": "p" } })).await;
    assert_eq!(code, 403);
    assert!(refused["message"].as_str().unwrap().contains("cannot create resource \"pods\""), "{refused}");
    // What a review says is what a call meets.
    let (_, review) = world
        .post(
            &me,
            "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
            json!({ "spec": { "namespace": "default" } }),
        )
        .await;
    let listed = review["status"]["resourceRules"].as_array().unwrap();
    assert!(listed.contains(&rules[0]), "{review}");
    let asked = |verb: &str, resource: &str, sub: &str| {
        json!({ "spec": { "user": "system:serviceaccount:default:me", "resourceAttributes": {
            "verb": verb, "resource": resource, "subresource": sub, "namespace": "default",
        } } })
    };
    for (verb, resource, sub, allowed) in [
        ("get", "pods", "", true),
        ("get", "pods", "log", true),
        ("get", "pods", "exec", false),
        ("get", "secrets", "", false),
    ] {
        let review = world.make("/apis/authorization.k8s.io/v1/subjectaccessreviews", asked(verb, resource, sub)).await;
        assert_eq!(review["status"]["allowed"], allowed, "{verb} {resource}/{sub}");
    }
    // The right goes with its binding.
    let path = format!("{RBAC}/namespaces/default/rolebindings/reader");
    let admin = Identity::admin();
    assert_eq!(world.call(&Caller::Is(&admin), Method::DELETE, &path, JSON, Value::Null).await.0, 200);
    assert_eq!(world.get(&me, PODS).await.0, 403);
}

#[tokio::test]
async fn the_built_in_roles_are_there_and_do_what_they_say() {
    let world = World::new().await;
    let viewers = bound("view", "ClusterRole", &sa("viewer"));
    world.make(&format!("{RBAC}/namespaces/default/rolebindings"), viewers).await;
    let viewer = account("viewer");
    assert_eq!(world.get(&viewer, "/api/v1/namespaces/default/configmaps").await.0, 200);
    assert_eq!(world.get(&viewer, "/api/v1/namespaces/default/secrets").await.0, 403);
    // Discovery is for whoever showed a credential.
    for (who, code) in [(&viewer, 200), (&Identity::anonymous(), 401)] {
        assert_eq!(world.get(who, "/apis").await.0, code);
        assert_eq!(world.get(who, "/readyz").await.0, 200);
    }
    assert_eq!(world.get(&viewer, "/metrics").await.0, 403);
    // Custom kinds join by label.
    let part = json!({
        "metadata": { "name": "herds", "labels": { "rbac.authorization.k8s.io/aggregate-to-view": "true" } },
        "rules": [{ "verbs": ["get"], "apiGroups": ["example.dev"], "resources": ["herds"] }],
    });
    world.make(&format!("{RBAC}/clusterroles"), part).await;
    let ask = json!({ "spec": { "resourceAttributes": {
        "verb": "get", "group": "example.dev", "resource": "herds", "namespace": "default" } } });
    let (_, review) = world.post(&viewer, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", ask).await;
    assert_eq!(review["status"]["allowed"], true);
}

#[tokio::test]
async fn nobody_gives_away_more_than_he_has() {
    let world = World::new().await;
    let me = account("me");
    // May write roles and bindings, and read config maps.
    let rules = json!([
        { "verbs": ["*"], "apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles", "rolebindings"] },
        { "verbs": ["get"], "apiGroups": [""], "resources": ["configmaps"] },
    ]);
    // All verbs on roles would hold `escalate` and `bind` too.
    let mut plain = rules.clone();
    plain[0]["verbs"] = json!(["create", "update", "patch"]);
    world.make(&format!("{RBAC}/namespaces/default/roles"), role("writer", &plain)).await;
    world.make(&format!("{RBAC}/namespaces/default/rolebindings"), bound("writer", "Role", &sa("me"))).await;
    let all_roles = format!("{RBAC}/namespaces/default/roles");
    let same = json!([{ "verbs": ["get"], "apiGroups": [""], "resources": ["configmaps"] }]);
    assert_eq!(world.post(&me, &all_roles, role("same", &same)).await.0, 201);
    let more = json!([{ "verbs": ["get"], "apiGroups": [""], "resources": ["secrets"] }]);
    let (code, refused) = world.post(&me, &all_roles, role("more", &more)).await;
    assert_eq!(code, 403);
    let message = refused["message"].as_str().unwrap();
    assert!(message.contains("is attempting to grant RBAC permissions not currently held"), "{message}");
    assert!(message.ends_with(r#"{APIGroups:[""], Resources:["secrets"], Verbs:["get"]}"#), "{message}");
    let grown = json!({ "metadata": { "name": "same" }, "rules": more });
    let (code, _) = world.call(&Caller::Is(&me), Method::PUT, &format!("{all_roles}/same"), JSON, grown).await;
    assert_eq!(code, 403);
    // Nor by binding a role that others made.
    let bindings = format!("{RBAC}/namespaces/default/rolebindings");
    assert_eq!(world.post(&me, &bindings, bound("cluster-admin", "ClusterRole", &sa("me"))).await.0, 403);
    assert_eq!(world.post(&me, &bindings, bound("same", "Role", &sa("me"))).await.0, 201);
    assert_eq!(world.post(&me, &bindings, bound("absent", "Role", &sa("me"))).await.0, 404);
    // With the right to escalate it goes.
    let wide = json!([{ "verbs": ["escalate"], "apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles"] }]);
    world.make(&all_roles, role("wide", &wide)).await;
    world.make(&bindings, bound("wide", "Role", &sa("me"))).await;
    assert_eq!(world.post(&me, &all_roles, role("more", &more)).await.0, 201);
    // What a role may not say is refused with its field.
    let (code, wrong) = world
        .post(&Identity::admin(), &all_roles, role("bad", &json!([{ "verbs": [], "nonResourceURLs": ["/x"] }])))
        .await;
    assert_eq!(code, 422);
    assert_eq!(wrong["details"]["causes"].as_array().unwrap().len(), 2, "{wrong}");
    let moved = json!({ "roleRef": { "name": "other" } });
    assert_eq!(world.patch(&format!("{bindings}/same"), moved).await.0, 422);
    let helper = account("helper");
    let impersonate = json!([{ "verbs": ["impersonate"], "apiGroups": [""], "resources": ["serviceaccounts"] }]);
    world.make(&all_roles, role("helper", &impersonate)).await;
    world.make(&bindings, bound("helper", "Role", &sa("helper"))).await;
    let as_other = |user: &str| {
        let request = Request::builder().uri("/api/v1/namespaces/default/configmaps/kube-root-ca.crt");
        let request = request.header("impersonate-user", user).body(Body::empty()).unwrap();
        let router = world.server.router_as(helper.clone());
        async move { router.oneshot(request).await.unwrap().status().as_u16() }
    };
    assert_eq!(as_other("system:serviceaccount:default:me").await, 200);
    assert_eq!(as_other("system:serviceaccount:kube-system:default").await, 403);
    assert_eq!(as_other("admin").await, 403);
}

fn base64(text: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(text)
}

fn request_pem(name: &str) -> String {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

#[tokio::test]
async fn a_host_joins_with_a_bootstrap_token() {
    const CSRS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let world = World::new().await;
    let token = "abcdef.0123456789abcdef";
    let caller = Caller::Shows(token);
    assert_eq!(world.call(&caller, Method::GET, "/api", JSON, Value::Null).await.0, 401);
    let secret = json!({
        "metadata": { "name": "bootstrap-token-abcdef" }, "type": "bootstrap.kubernetes.io/token",
        "stringData": { "token-id": "abcdef", "token-secret": "0123456789abcdef", "usage-bootstrap-authentication": "true" },
    });
    world.make("/api/v1/namespaces/kube-system/secrets", secret).await;
    assert_eq!(world.call(&caller, Method::GET, "/api", JSON, Value::Null).await.0, 200);
    let review = json!({ "spec": { "token": token } });
    let review = world.make("/apis/authentication.k8s.io/v1/tokenreviews", review).await;
    assert_eq!(review["status"]["user"]["username"], "system:bootstrap:abcdef");
    // It asks for a node's certificate and for nothing else.
    assert_eq!(world.call(&caller, Method::GET, "/api/v1/nodes", JSON, Value::Null).await.0, 403);
    assert_eq!(
        world.call(&caller, Method::GET, "/api/v1/namespaces/kube-system/secrets", JSON, Value::Null).await.0,
        403
    );
    let csr = |name: &str, subject: &str| {
        json!({
            "metadata": { "name": name },
            "spec": {
                "request": base64(&request_pem(subject)), "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
                "usages": ["digital signature", "client auth"],
            },
        })
    };
    let (code, answer) = world.call(&caller, Method::POST, CSRS, JSON, csr("join", "system:node:far")).await;
    assert_eq!(code, 201, "{answer}");
    let path = format!("{CSRS}/join");
    let admin = Identity::admin();
    let signed = until("a certificate", || async {
        let (_, csr) = world.get(&admin, &path).await;
        csr["status"]["certificate"].as_str().map(str::to_owned)
    })
    .await;
    let pem = base64::engine::general_purpose::STANDARD.decode(signed).unwrap();
    assert!(String::from_utf8(pem).unwrap().contains("BEGIN CERTIFICATE"));
    // Who isn't a bootstrapper gets none without a person, even when he may ask.
    let ask = json!([{ "verbs": ["create"], "apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests"] }]);
    world.make(&format!("{RBAC}/clusterroles"), role("ask", &ask)).await;
    world.make(&format!("{RBAC}/clusterrolebindings"), bound("ask", "ClusterRole", &sa("me"))).await;
    assert_eq!(world.post(&account("me"), CSRS, csr("sly", "system:node:far")).await.0, 201);
    // Nor may he approve it himself, though he may write the approval.
    let approve = json!([{ "verbs": ["*"], "apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests/approval"] }]);
    world.make(&format!("{RBAC}/clusterroles"), role("approve", &approve)).await;
    world.make(&format!("{RBAC}/clusterrolebindings"), bound("approve", "ClusterRole", &sa("me"))).await;
    let approval = json!({ "status": { "conditions": [{ "type": "Approved", "status": "True", "reason": "x", "message": "x" }] } });
    let me = account("me");
    let (code, refused) = world
        .call(
            &Caller::Is(&me),
            Method::PATCH,
            &format!("{CSRS}/sly/approval"),
            "application/merge-patch+json",
            approval,
        )
        .await;
    assert_eq!(code, 403, "{refused}");
    assert!(refused["message"].as_str().unwrap().contains("not permitted to approve requests with signerName"));
    let (_, sly) = world.get(&admin, &format!("{CSRS}/sly")).await;
    assert!(sly["status"]["certificate"].is_null() && sly["status"]["conditions"].is_null(), "{sly}");
    // An ended token is nobody's and goes away.
    let ended = json!({ "stringData": { "expiration": "2020-01-01T00:00:00Z" } });
    let (code, _) = world.patch("/api/v1/namespaces/kube-system/secrets/bootstrap-token-abcdef", ended).await;
    assert_eq!(code, 200);
    assert_eq!(world.call(&caller, Method::GET, "/api", JSON, Value::Null).await.0, 401);
}

fn pod(name: &str, class: Option<&str>) -> Value {
    let mut pod = json!({
        "metadata": { "name": name, "labels": { "app": "a" } },
        "spec": { "nodeName": "n", "containers": [{ "name": "vm", "image": "tiny" }] },
    });
    if let Some(class) = class {
        pod["spec"]["priorityClassName"] = class.into();
    }
    pod
}

#[tokio::test]
async fn a_budget_holds_up_evictions() {
    const BUDGETS: &str = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    let world = World::new().await;
    for name in ["p1", "p2"] {
        world.make(PODS, pod(name, None)).await;
        let status = json!({ "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] } });
        assert_eq!(world.patch(&format!("{PODS}/{name}/status"), status).await.0, 200);
    }
    let budget = json!({
        "metadata": { "name": "b" },
        "spec": { "minAvailable": 1, "selector": { "matchLabels": { "app": "a" } } },
    });
    world.make(BUDGETS, budget).await;
    let admin = Identity::admin();
    let path = format!("{BUDGETS}/b");
    until("a status", || async {
        let (_, budget) = world.get(&admin, &path).await;
        (budget["status"]["disruptionsAllowed"] == 1 && budget["status"]["expectedPods"] == 2).then_some(())
    })
    .await;
    let evict = |name: &'static str| {
        let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": name } });
        let world = &world;
        async move { world.post(&Identity::admin(), &format!("{PODS}/{name}/eviction"), eviction).await }
    };
    // Both at once: one goes, the other is told why not.
    let (one, two) = tokio::join!(evict("p1"), evict("p2"));
    let mut codes = [one.0, two.0];
    codes.sort_unstable();
    assert_eq!(codes, [201, 429], "{} {}", one.1, two.1);
    let refused = if one.0 == 429 { one.1 } else { two.1 };
    assert_eq!(refused["message"], "Cannot evict pod as it would violate the pod's disruption budget.");
    assert_eq!(refused["details"]["causes"][0]["reason"], "DisruptionBudget");
    assert_eq!(
        refused["details"]["causes"][0]["message"],
        "The disruption budget b needs 1 healthy pods and has 1 currently"
    );
    // A plain deletion doesn't ask.
    let survivor = until("one pod that stays", || async {
        let (_, pods) = world.get(&admin, PODS).await;
        let left = pods["items"].as_array().unwrap().iter().find(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        left.map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned())
    })
    .await;
    let deleted = format!("{PODS}/{survivor}?gracePeriodSeconds=0");
    assert_eq!(world.call(&Caller::Is(&admin), Method::DELETE, &deleted, JSON, Value::Null).await.0, 200);
}

#[tokio::test]
async fn priority_classes_give_pods_their_priority() {
    const CLASSES: &str = "/apis/scheduling.k8s.io/v1/priorityclasses";
    let world = World::new().await;
    let admin = Identity::admin();
    assert_eq!(world.post(&admin, PODS, pod("p", Some("high"))).await.0, 403);
    let class = |name: &str, value: i64, more: Value| {
        let mut class = json!({ "metadata": { "name": name }, "value": value });
        for (key, value) in more.as_object().unwrap() {
            class[key] = value.clone();
        }
        class
    };
    world.make(CLASSES, class("high", 1000, json!({ "preemptionPolicy": "Never" }))).await;
    let made = world.make(PODS, pod("p", Some("high"))).await;
    assert_eq!((&made["spec"]["priority"], &made["spec"]["preemptionPolicy"]), (&json!(1000), &json!("Never")));
    assert_eq!(world.make(PODS, pod("plain", None)).await["spec"]["priority"], 0);
    world.make(CLASSES, class("usual", 7, json!({ "globalDefault": true }))).await;
    let made = world.make(PODS, pod("default", None)).await;
    assert_eq!((&made["spec"]["priority"], &made["spec"]["priorityClassName"]), (&json!(7), &json!("usual")));
    assert_eq!(world.make(PODS, pod("system", Some("system-node-critical"))).await["spec"]["priority"], 2_000_001_000);
    assert_eq!(world.post(&admin, CLASSES, class("huge", 1_000_000_001, json!({}))).await.0, 422);
    assert_eq!(world.post(&admin, CLASSES, class("system-mine", 1, json!({}))).await.0, 422);
    assert_eq!(world.patch(&format!("{CLASSES}/high"), json!({ "value": 1 })).await.0, 422);
}
