//! A certificate authority, and an API that reviews tokens and rights by a script.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{Json, Router, extract::State, routing::post};
use http::StatusCode;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(super) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    pub(super) fn pem(&self) -> String {
        self.pem.clone()
    }

    /// A certificate and its key.
    pub(super) fn issue(&self, name: &str, groups: &[&str], sans: &[&str]) -> (String, String) {
        let sans: Vec<_> = sans.iter().map(|san| (*san).to_owned()).collect();
        let mut params = CertificateParams::new(sans).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        let (year, month, day) = (2020, 1, 1);
        params.not_before = rcgen::date_time_ymd(year, month, day);
        params.not_after = rcgen::date_time_ymd(year + 10, month, day);
        let key = KeyPair::generate().unwrap();
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        (pem, key.serialize_pem())
    }
}

type Rule = dyn Fn(&str, (&str, &str)) -> bool + Send;

pub(super) struct FakeApi {
    tokens: Mutex<HashMap<String, (String, Vec<String>)>>,
    rule: Mutex<Box<Rule>>,
    asked: Mutex<Vec<Value>>,
    away: AtomicBool,
}

impl Default for FakeApi {
    fn default() -> Self {
        Self {
            tokens: Mutex::default(),
            rule: Mutex::new(Box::new(|_, _| true)),
            asked: Mutex::default(),
            away: AtomicBool::new(false),
        }
    }
}

impl FakeApi {
    pub(super) fn client(self: Arc<Self>) -> kube::Client {
        let router = Router::new()
            .route("/apis/authentication.k8s.io/v1/tokenreviews", post(token_review))
            .route("/apis/authorization.k8s.io/v1/subjectaccessreviews", post(access_review))
            .with_state(self);
        kube::Client::new(router, "default")
    }

    pub(super) fn token(&self, token: &str, user: &str, groups: &[&str]) {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        self.tokens.lock().unwrap().insert(token.to_owned(), (user.to_owned(), groups));
    }

    /// Who may do what: a user, and a verb on a subresource.
    pub(super) fn allow(&self, rule: impl Fn(&str, (&str, &str)) -> bool + Send + 'static) {
        *self.rule.lock().unwrap() = Box::new(rule);
    }

    pub(super) fn away(&self) {
        self.away.store(true, Ordering::SeqCst);
    }

    pub(super) fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().clone()
    }

    fn ask(&self, review: &Value) -> Result<(), StatusCode> {
        self.asked.lock().unwrap().push(review.clone());
        if self.away.load(Ordering::SeqCst) { Err(StatusCode::SERVICE_UNAVAILABLE) } else { Ok(()) }
    }
}

async fn token_review(
    State(api): State<Arc<FakeApi>>,
    Json(mut review): Json<Value>,
) -> Result<Json<Value>, StatusCode> {
    api.ask(&review)?;
    let token = review["spec"]["token"].as_str().unwrap_or_default();
    review["status"] = match api.tokens.lock().unwrap().get(token) {
        None => json!({"authenticated": false, "error": "no such token"}),
        Some((name, groups)) => json!({
            "authenticated": true,
            "user": {"username": name, "uid": format!("uid-of-{name}"), "groups": groups, "extra": {"scopes": ["all"]}},
        }),
    };
    Ok(Json(review))
}

async fn access_review(
    State(api): State<Arc<FakeApi>>,
    Json(mut review): Json<Value>,
) -> Result<Json<Value>, StatusCode> {
    api.ask(&review)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let wanted = &review["spec"]["resourceAttributes"];
    let (verb, subresource) = (text(&wanted["verb"]), text(&wanted["subresource"]));
    let user = text(&review["spec"]["user"]);
    let allowed = wanted["name"] == "node-1" && (api.rule.lock().unwrap())(&user, (&verb, &subresource));
    review["status"] = json!({"allowed": allowed});
    Ok(Json(review))
}
