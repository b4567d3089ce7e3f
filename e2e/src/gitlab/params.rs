//! Parameters as GitLab takes them: from the query, a form or JSON, whichever was sent.

use axum::extract::{FromRequest, Request};
use axum::response::Response;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::gate::answer;

/// All parameters of a request.
pub(super) struct Params(Map<String, Value>);

impl Params {
    /// A text; numbers count.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        match self.0.get(name)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }

    /// A number; digits in a text count.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    /// A truth value.
    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        match self.0.get(name)? {
            Value::Bool(flag) => Some(*flag),
            Value::String(text) => match text.as_str() {
                "true" | "1" => Some(true),
                "false" | "0" => Some(false),
                _ => None,
            },
            _ => None,
        }
    }

    /// A list, or a text with commas.
    pub(super) fn list(&self, name: &str) -> Option<Vec<String>> {
        let words = |text: &str| text.split(',').map(str::trim).filter(|w| !w.is_empty()).map(str::to_owned).collect();
        match self.0.get(name).or_else(|| self.0.get(&format!("{name}[]")))? {
            Value::String(text) => Some(words(text)),
            Value::Array(all) => Some(all.iter().filter_map(Value::as_str).map(str::to_owned).collect()),
            _ => None,
        }
    }

    /// As it was sent.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }
}

impl<S: Sync> FromRequest<S> for Params {
    type Rejection = Response;

    async fn from_request(request: Request, _: &S) -> Result<Self, Response> {
        let mut all = Map::new();
        pairs(request.uri().query().unwrap_or_default().as_bytes(), &mut all);
        let kind = request.headers().get(http::header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let is_json = kind.starts_with("application/json");
        let bad = |why: &str| answer(StatusCode::BAD_REQUEST, &json!({ "error": why }));
        let body =
            axum::body::to_bytes(request.into_body(), 1 << 20).await.map_err(|_| bad("the body did not come"))?;
        if is_json && !body.is_empty() {
            match serde_json::from_slice(&body) {
                Ok(Value::Object(object)) => all.extend(object),
                _ => return Err(bad("the body is no JSON object")),
            }
        } else {
            pairs(&body, &mut all);
        }
        Ok(Self(all))
    }
}

/// Adds the pairs of a form; a name that ends in `[]` is a list.
fn pairs(text: &[u8], to: &mut Map<String, Value>) {
    for (name, value) in form_urlencoded::parse(text) {
        if name.ends_with("[]") {
            let list = to.entry(name.into_owned()).or_insert_with(|| json!([]));
            if let Some(list) = list.as_array_mut() {
                list.push(value.into());
            }
        } else {
            to.insert(name.into_owned(), value.into());
        }
    }
}
