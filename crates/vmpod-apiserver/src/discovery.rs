//! Everything that is no resource: discovery, version, health, `OpenAPI`, the token keys.

use axum::body::Body;
use http::header::{ETAG, VARY};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::auth::token::ISSUER;
use crate::http::accept;
use crate::http::respond;
use crate::openapi;
use crate::server::Server;
use crate::status::Status;

/// The Kubernetes version whose behaviour is served.
const VERSION: (&str, &str) = ("1", "36");

/// Answers a path that is no resource.
pub(crate) fn serve(
    server: &Server,
    method: &Method,
    headers: &HeaderMap,
    path: &str,
) -> Result<Response<Body>, Status> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Err(Status::method_not_allowed_here());
    }
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let registry = server.registry();
    let found = |value: Option<Value>| match value {
        Some(value) => respond::json_value(StatusCode::OK, &value),
        None => respond::not_found_page(),
    };
    Ok(match segments.as_slice() {
        [] => respond::json_value(StatusCode::OK, &json!({ "paths": paths(server) })),
        ["version"] => respond::json_value(StatusCode::OK, &version()),
        ["healthz" | "livez" | "readyz", checks @ ..] => health(server, checks),
        ["api"] if aggregated(headers).is_some() => discovery_list(&registry.aggregated(true), headers),
        ["apis"] if aggregated(headers).is_some() => discovery_list(&registry.aggregated(false), headers),
        ["api"] => respond::json_value(StatusCode::OK, &registry.discovery_api_versions(&address(server))),
        ["apis"] => respond::json_value(StatusCode::OK, &registry.discovery_groups()),
        ["api", version] => found(registry.discovery_resources("", version)),
        ["apis", group] => found(registry.discovery_group(group)),
        ["apis", group, version] => found(registry.discovery_resources(group, version)),
        ["openapi", "v3"] => respond::json_value(StatusCode::OK, &openapi::index(&registry)),
        ["openapi", "v3", "api", version] => {
            found(openapi::document(&registry, "", version).map(|value| (*value).clone()))
        }
        ["openapi", "v3", "apis", group, version] => {
            found(openapi::document(&registry, group, version).map(|value| (*value).clone()))
        }
        [".well-known", "openid-configuration"] => respond::json_value(
            StatusCode::OK,
            &json!({
                "issuer": ISSUER,
                "jwks_uri": format!("https://{}/openid/v1/jwks", address(server)),
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            }),
        ),
        ["openid", "v1", "jwks"] => respond::json_value(StatusCode::OK, &server.signer.jwks()),
        _ => respond::not_found_page(),
    })
}

fn aggregated(headers: &HeaderMap) -> Option<&'static str> {
    // Only v2 is made; a client that asks for v2beta1 only gets the old form, which it knows too.
    accept::aggregated(headers).filter(|version| *version == "v2")
}

fn discovery_list(list: &Value, headers: &HeaderMap) -> Response<Body> {
    let body = respond::serialise(list);
    let tag = format!("\"{}\"", crate::server::digest(&body));
    let known = headers.get(http::header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()) == Some(tag.as_str());
    let mut response = if known {
        respond::json_bytes(StatusCode::NOT_MODIFIED, Body::empty())
    } else {
        respond::json_bytes(StatusCode::OK, body)
    };
    let headers = response.headers_mut();
    headers.insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"),
    );
    headers.insert(VARY, HeaderValue::from_static("Accept"));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(ETAG, tag);
    }
    response
}

fn address(server: &Server) -> String {
    server.address.map_or_else(|| "127.0.0.1:6443".into(), |address| address.to_string())
}

fn version() -> Value {
    json!({
        "major": VERSION.0,
        "minor": VERSION.1,
        "emulationMajor": VERSION.0,
        "emulationMinor": VERSION.1,
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "35",
        "gitVersion": format!("v{}.{}.0+vmpod-{}", VERSION.0, VERSION.1, env!("CARGO_PKG_VERSION")),
        "gitCommit": "",
        "gitTreeState": "",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }),
    })
}

fn health(server: &Server, checks: &[&str]) -> Response<Body> {
    match checks {
        [] | ["ping" | "store"] => match server.store.failure() {
            None => respond::text(StatusCode::OK, "ok"),
            Some(error) => respond::text(StatusCode::INTERNAL_SERVER_ERROR, format!("[-]store failed: {error}\n")),
        },
        _ => respond::not_found_page(),
    }
}

fn paths(server: &Server) -> Vec<String> {
    let mut paths: Vec<String> =
        ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v3", "/readyz", "/version"].map(Into::into).into();
    for resource in server.registry().resources() {
        if !resource.group.is_empty() {
            paths.push(format!("/apis/{}", resource.group));
            paths.push(format!("/apis/{}/{}", resource.group, resource.version));
        }
    }
    paths.sort();
    paths.dedup();
    paths
}
