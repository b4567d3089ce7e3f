//! Answering a registry's challenge: basic, or a token from the server that it names.

use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue, header};
use reqwest::Url;
use serde::Deserialize;

use super::is_loopback;
use crate::blobs::{BlobError, BlobErrorKind};
use crate::credentials::Credential;

/// The name under which an identity token is turned in.
const CLIENT: &str = "vmpod";

/// Answers of its own that one request gives to challenges: the second is for a token that ended meanwhile.
const MOST_ANSWERS: u8 = 2;
/// A token server's answer, bytes.
const LARGEST_ANSWER: usize = 1 << 20;

/// A header value that worked, or should.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) value: HeaderValue,
}

/// Who we are to one registry.
#[derive(Debug)]
pub(crate) struct Auth {
    client: reqwest::Client,
    /// If the registry itself is spoken to without TLS: the hosts that may be, besides loopback. Only then may its token server be.
    plain: Option<Vec<String>>,
    credential: Option<Credential>,
    scopes: Vec<String>,
    current: Mutex<Option<Arc<Token>>>,
    /// One request for a token at a time; the others wait and take its result.
    asking: tokio::sync::Mutex<()>,
}

impl Auth {
    pub(crate) fn new(
        client: reqwest::Client,
        plain: Option<Vec<String>>,
        credential: Option<Credential>,
        scopes: Vec<String>,
    ) -> Self {
        Self { client, plain, credential, scopes, current: Mutex::default(), asking: tokio::sync::Mutex::default() }
    }

    pub(crate) fn current(&self) -> Option<Arc<Token>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The answer to a refusal, given what was `used` for it; none when there is nothing (else) to say. `given` counts the answers
    /// that were made for this request.
    pub(crate) async fn answer(
        &self,
        refusal: &HeaderMap,
        used: Option<&Arc<Token>>,
        given: &mut u8,
    ) -> Result<Option<Arc<Token>>, BlobError> {
        let _one = self.asking.lock().await;
        let current = self.current();
        let same = |a: Option<&Arc<Token>>, b: Option<&Arc<Token>>| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        if !same(current.as_ref(), used) {
            // Another request got a new one meanwhile.
            return Ok(current);
        }
        if *given >= MOST_ANSWERS {
            return Ok(None);
        }
        *given += 1;
        let challenges = refusal.get_all(header::WWW_AUTHENTICATE);
        let parsed: Vec<_> = challenges.iter().filter_map(|value| Challenge::parse(value.to_str().ok()?)).collect();
        let bearer = parsed.iter().find(|challenge| challenge.scheme == "bearer");
        let basic = parsed.iter().any(|challenge| challenge.scheme == "basic");
        let value = if let Some(challenge) = bearer {
            format!("Bearer {}", self.token(challenge).await?)
        } else if basic && let Some(Credential::Basic { user, password }) = &self.credential {
            format!("Basic {}", STANDARD.encode(format!("{user}:{}", password.expose())))
        } else {
            return Ok(None);
        };
        let mut value = HeaderValue::try_from(value).map_err(|error| {
            BlobError::caused(BlobErrorKind::Fatal, "the registry's token isn't fit for a header".to_owned(), error)
        })?;
        value.set_sensitive(true);
        if used.is_some_and(|used| used.value == value) {
            // The same again won't do.
            return Ok(None);
        }
        let token = Arc::new(Token { value });
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&token));
        Ok(Some(token))
    }

    /// A token from the server that the challenge names.
    async fn token(&self, challenge: &Challenge) -> Result<String, BlobError> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let fatal = |message: String| BlobError::new(BlobErrorKind::Fatal, message);
        let realm = challenge.get("realm").unwrap_or_default();
        let mut url =
            Url::parse(realm).map_err(|_| fatal(format!("the registry names no valid token server ({realm:?})")))?;
        if url.scheme() != "https" && !may_be_plain(&url, self.plain.as_deref()) {
            return Err(fatal(format!("the registry's token server {realm} isn't spoken to without TLS")));
        }
        let service = challenge.get("service");
        let request = match &self.credential {
            Some(Credential::IdentityToken(token)) => {
                let scope = self.scopes.join(" ");
                let mut form = vec![
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token.expose()),
                    ("client_id", CLIENT),
                    ("scope", &scope),
                ];
                form.extend(service.map(|service| ("service", service)));
                let mut body = Url::parse("http://form/").map_err(|_| fatal("no form".to_owned()))?;
                body.query_pairs_mut().extend_pairs(form);
                self.client
                    .post(url)
                    .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(body.query().unwrap_or_default().to_owned())
            }
            credential => {
                {
                    let mut query = url.query_pairs_mut();
                    query.extend_pairs(service.map(|service| ("service", service)));
                    query.extend_pairs(self.scopes.iter().map(|scope| ("scope", scope)));
                }
                match credential {
                    Some(Credential::Basic { user, password }) => {
                        self.client.get(url).basic_auth(user, Some(password.expose()))
                    }
                    _ => self.client.get(url),
                }
            }
        };
        let failed = |error: reqwest::Error| {
            BlobError::caused(
                BlobErrorKind::Transient(None),
                format!("token server {realm} can't be reached"),
                error.without_url(),
            )
        };
        let mut response = request.send().await.map_err(failed)?;
        let status = response.status();
        if !status.is_success() {
            let kind = if status.is_server_error() || status == http::StatusCode::TOO_MANY_REQUESTS {
                BlobErrorKind::Transient(None)
            } else {
                BlobErrorKind::Denied
            };
            return Err(BlobError::new(kind, format!("token server {realm} answered {status}")));
        }
        let mut bytes = Vec::new();
        while let Some(part) = response.chunk().await.map_err(failed)? {
            bytes.extend_from_slice(&part);
            if bytes.len() > LARGEST_ANSWER {
                return Err(fatal(format!("token server {realm} answers more than {} MiB", LARGEST_ANSWER >> 20)));
            }
        }
        let answer: Answer = serde_json::from_slice(&bytes)
            .map_err(|_| fatal(format!("token server {realm} gave an answer that can't be read")))?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
        token.ok_or_else(|| fatal(format!("token server {realm} gave no token")))
    }
}

/// Whether a token server may be spoken to without TLS: its registry is, and it is on this host or named like the registry.
fn may_be_plain(realm: &Url, plain: Option<&[String]>) -> bool {
    let (Some(named), Some(name)) = (plain, realm.host_str()) else { return false };
    let host = realm.port().map_or_else(|| name.to_owned(), |port| format!("{name}:{port}"));
    realm.scheme() == "http" && (is_loopback(&host) || named.contains(&host))
}

/// One `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (scheme, mut rest) = text.split_once(' ').unwrap_or((text, ""));
        let mut parameters = Vec::new();
        loop {
            rest = rest.trim_start_matches([' ', ',']);
            let Some((name, value)) = rest.split_once('=') else { break };
            let (value, after) = if let Some(quoted) = value.strip_prefix('"') {
                unquote(quoted)
            } else {
                let end = value.find(',').unwrap_or(value.len());
                (value[..end].trim().to_owned(), &value[end..])
            };
            parameters.push((name.trim().to_ascii_lowercase(), value));
            rest = after;
        }
        (!scheme.is_empty()).then(|| Self { scheme: scheme.to_ascii_lowercase(), parameters })
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// What stands before the closing quote, and what comes after it.
fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => {
                value.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (value, &text[at + 1..]),
            _ => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_server_without_tls_is_near_or_named() {
        let named = ["registry.example.com:5000".to_owned()];
        let may = |realm: &str, plain| may_be_plain(&Url::parse(realm).unwrap(), plain);
        for realm in ["http://127.0.0.1:5001/token", "http://[::1]/token", "http://registry.example.com:5000/token"] {
            assert!(may(realm, Some(&named)), "{realm}");
            assert!(!may(realm, None), "{realm}");
        }
        for realm in ["http://registry.example.com/token", "http://evil.example.com:5000/", "ftp://127.0.0.1/"] {
            assert!(!may(realm, Some(&named)), "{realm}");
        }
    }

    #[test]
    fn challenges_are_read() {
        let challenge =
            Challenge::parse(r#"Bearer realm="https://a/t?x=1,2",service=reg, scope="repository:a:pull,push""#)
                .unwrap();
        assert_eq!(challenge.scheme, "bearer");
        assert_eq!(challenge.get("realm"), Some("https://a/t?x=1,2"));
        assert_eq!(challenge.get("service"), Some("reg"));
        assert_eq!(challenge.get("scope"), Some("repository:a:pull,push"));
        assert_eq!(Challenge::parse("Basic").unwrap().parameters, []);
        assert_eq!(Challenge::parse(r#"Basic realm="a\"b"#).unwrap().get("realm"), Some("a\"b"));
        assert_eq!(Challenge::parse(" "), None);
    }

    proptest::proptest! {
        #[test]
        fn any_challenge_is_read_to_its_end(text in "\\PC{0,60}") {
            drop(Challenge::parse(&text));
        }
    }
}
