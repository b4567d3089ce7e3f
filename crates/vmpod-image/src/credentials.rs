//! Credentials for registries, as Docker and Podman keep them.
//!
//! A docker configuration names a credential per registry (`auths`), or a program that knows it (`credHelpers`,
//! `credsStore`). Programs are run only for files of this host's user; a configuration that came from elsewhere (a pod's
//! pull secret) must not choose what runs here.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;

/// How long a helper may take.
const HELPER_LIMIT: Duration = Duration::from_secs(30);
/// What a helper says instead of a user when the password is an identity token.
const TOKEN_USER: &str = "<token>";

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself: for the wire only.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// What a registry is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// A user and a password.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: Secret,
    },
    /// An `OAuth2` refresh token (`identitytoken`).
    IdentityToken(Secret),
}

/// Where credentials are looked for: docker configuration files and texts. The default looks nowhere: anonymous.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    texts: Vec<Secret>,
    files: Vec<PathBuf>,
}

/// Why credentials can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// A file that is there and can't be read.
    #[error("couldn't read the registry credentials in {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No docker configuration. What it holds is not shown.
    #[error("{place} is no docker configuration (line {line})")]
    Parse {
        /// The file, or that it is a pull secret.
        place: String,
        /// Where reading stopped.
        line: usize,
    },
    /// An `auth` field that isn't base64 of USER:PASSWORD.
    #[error("{place} has an `auth` for {registry} that is not base64 of USER:PASSWORD")]
    Auth {
        /// The file, or that it is a pull secret.
        place: String,
        /// The registry it is for.
        registry: String,
    },
    /// The name of a helper that would be a path.
    #[error("{place} names a credential helper {helper:?}, which is no plain name")]
    HelperName {
        /// The file.
        place: String,
        /// The name.
        helper: String,
    },
    /// A helper that can't be run, fails or answers nonsense. What it printed is not shown: it may hold a secret.
    #[error("the credential helper {program} failed for {registry}: {why}")]
    Helper {
        /// The program.
        program: String,
        /// The registry asked for.
        registry: String,
        /// How.
        why: String,
    },
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Debug, Deserialize, Default, Clone)]
struct Entry {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
}

impl Credentials {
    /// The usual places of this user: `$REGISTRY_AUTH_FILE` alone if set, else `$DOCKER_CONFIG/config.json` or
    /// `~/.docker/config.json`, then `$XDG_RUNTIME_DIR/containers/auth.json`. `lookup` reads the environment.
    pub fn from_environment(lookup: impl Fn(&str) -> Option<OsString>) -> Self {
        let path = |name: &str| lookup(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(file) = path("REGISTRY_AUTH_FILE") {
            return Self::default().with_file(file);
        }
        let docker = path("DOCKER_CONFIG").or_else(|| Some(path("HOME")?.join(".docker")));
        let files = [
            docker.map(|dir| dir.join("config.json")),
            path("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        ];
        Self { texts: Vec::new(), files: files.into_iter().flatten().collect() }
    }

    /// Adds a docker configuration file, after those before it; it may be absent. Credential helpers that it names are run.
    #[must_use]
    pub fn with_file(mut self, path: PathBuf) -> Self {
        self.files.push(path);
        self
    }

    /// Adds the text of a docker configuration (a pod's imagePullSecrets: `.dockerconfigjson`, or the older `.dockercfg`), before
    /// all files. No helper that it names is run.
    #[must_use]
    pub fn with_docker_config(mut self, text: String) -> Self {
        self.texts.push(Secret(text));
        self
    }

    /// The credential for a repository of the registry `host[:port]`, if there is one.
    pub async fn resolve(&self, host: &str, repository: &str) -> Result<Option<Credential>, CredentialsError> {
        for text in &self.texts {
            let place = "an image pull secret";
            let config = parse(text.expose().as_bytes(), place)?;
            if let Some(found) = from_auths(&config, host, repository, place)? {
                return Ok(Some(found));
            }
        }
        for path in &self.files {
            let text = match tokio::fs::read(path).await {
                Ok(text) => text,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(source) => return Err(CredentialsError::Read { path: path.clone(), source }),
            };
            if let Some(found) = from_file(&text, path, host, repository).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

fn parse(text: &[u8], place: &str) -> Result<DockerConfig, CredentialsError> {
    let failed = |error: &serde_json::Error| CredentialsError::Parse { place: place.to_owned(), line: error.line() };
    let value: serde_json::Value = serde_json::from_slice(text).map_err(|error| failed(&error))?;
    let whole = value
        .as_object()
        .is_some_and(|object| ["auths", "credHelpers", "credsStore"].iter().any(|key| object.contains_key(*key)));
    if whole {
        return serde_json::from_value(value).map_err(|error| failed(&error));
    }
    // `.dockercfg` is what `auths` holds, alone. A configuration without credentials has other keys: nothing for us.
    let auths = serde_json::from_value::<BTreeMap<String, Entry>>(value).unwrap_or_default();
    Ok(DockerConfig { auths, ..DockerConfig::default() })
}

async fn from_file(
    text: &[u8],
    path: &Path,
    host: &str,
    repository: &str,
) -> Result<Option<Credential>, CredentialsError> {
    let place = path.display().to_string();
    let config = parse(text, &place)?;
    if let Some((key, helper)) = config.cred_helpers.iter().find(|(key, _)| matches(key, host, repository).is_some())
        && let Some(found) = ask_helper(helper, key, &place).await?
    {
        return Ok(Some(found));
    }
    if let Some(found) = from_auths(&config, host, repository, &place)? {
        return Ok(Some(found));
    }
    if let Some(store) = config.creds_store.as_deref().filter(|store| !store.is_empty()) {
        // The store knows a registry by the key that `docker login` used; an empty entry in `auths` tells it.
        let key = config.auths.keys().find(|key| matches(key, host, repository).is_some()).map_or(host, String::as_str);
        return ask_helper(store, key, &place).await;
    }
    Ok(None)
}

/// How well a key of a configuration fits a repository: the length of the path that it names, none if it doesn't fit.
fn matches(key: &str, host: &str, repository: &str) -> Option<usize> {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (pattern, path) = key.split_once('/').unwrap_or((key, ""));
    let path = path.trim_end_matches('/');
    // What Docker itself writes for its hub and for old registries.
    let path = if matches!(path, "v1" | "v2") { "" } else { path };
    let pattern = if matches!(pattern, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { pattern };
    let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host };
    let label = |(pattern, label): (&str, &str)| match pattern.split_once('*') {
        None => pattern.eq_ignore_ascii_case(label),
        Some((before, after)) => {
            label.len() >= before.len() + after.len() && label.starts_with(before) && label.ends_with(after)
        }
    };
    let same_host =
        pattern.split('.').count() == host.split('.').count() && pattern.split('.').zip(host.split('.')).all(label);
    let same_path = path.is_empty()
        || repository == path
        || repository.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
    (same_host && same_path).then_some(path.len())
}

fn from_auths(
    config: &DockerConfig,
    host: &str,
    repository: &str,
    place: &str,
) -> Result<Option<Credential>, CredentialsError> {
    let mut fitting: Vec<_> =
        config.auths.iter().filter_map(|(key, entry)| Some((matches(key, host, repository)?, key, entry))).collect();
    fitting.sort_by_key(|(length, ..)| std::cmp::Reverse(*length));
    for (_, key, entry) in fitting {
        if let Some(token) = entry.identitytoken.as_deref().filter(|token| !token.is_empty()) {
            return Ok(Some(Credential::IdentityToken(Secret(token.to_owned()))));
        }
        if let Some(auth) = entry.auth.as_deref().filter(|auth| !auth.is_empty()) {
            let bad = || CredentialsError::Auth { place: place.to_owned(), registry: key.clone() };
            let text = String::from_utf8(STANDARD.decode(auth.trim()).map_err(|_| bad())?).map_err(|_| bad())?;
            let (user, password) = text.split_once(':').ok_or_else(bad)?;
            let password = Secret(password.trim_end_matches('\0').to_owned());
            return Ok(Some(Credential::Basic { user: user.to_owned(), password }));
        }
        if let (Some(user), Some(password)) = (&entry.username, &entry.password)
            && !user.is_empty()
        {
            return Ok(Some(Credential::Basic { user: user.clone(), password: Secret(password.clone()) }));
        }
    }
    Ok(None)
}

/// Runs `docker-credential-HELPER get`. None when it knows nothing of this registry.
async fn ask_helper(helper: &str, registry: &str, place: &str) -> Result<Option<Credential>, CredentialsError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let plain = !helper.is_empty() && helper.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if !plain {
        return Err(CredentialsError::HelperName { place: place.to_owned(), helper: helper.to_owned() });
    }
    let program = format!("docker-credential-{helper}");
    let failed =
        |why: String| CredentialsError::Helper { program: program.clone(), registry: registry.to_owned(), why };
    let run = async {
        let mut child = tokio::process::Command::new(&program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that doesn't read its input says so by its answer.
            drop(stdin.write_all(registry.as_bytes()).await);
        }
        child.wait_with_output().await
    };
    let output = match tokio::time::timeout(HELPER_LIMIT, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(failed(format!("it couldn't be run: {error}"))),
        Err(_) => return Err(failed(format!("it didn't answer within {} s", HELPER_LIMIT.as_secs()))),
    };
    if !output.status.success() {
        // The protocol's own words for "I have none".
        let text = String::from_utf8_lossy(&output.stdout).to_lowercase();
        return if text.contains("credentials not found") { Ok(None) } else { Err(failed(output.status.to_string())) };
    }
    let answer: Answer =
        serde_json::from_slice(&output.stdout).map_err(|_| failed("its answer can't be read".to_owned()))?;
    Ok(Some(if answer.username == TOKEN_USER {
        Credential::IdentityToken(Secret(answer.secret))
    } else {
        Credential::Basic { user: answer.username, password: Secret(answer.secret) }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(user: &str, password: &str) -> Credential {
        Credential::Basic { user: user.to_owned(), password: Secret(password.to_owned()) }
    }

    async fn found(text: &str, host: &str, repository: &str) -> Option<Credential> {
        Credentials::default().with_docker_config(text.to_owned()).resolve(host, repository).await.unwrap()
    }

    #[tokio::test]
    async fn the_longest_path_wins() {
        let auth = |user: &str| STANDARD.encode(format!("{user}:pass:word"));
        let text = format!(
            r#"{{"auths":{{"h.example":{{"auth":"{}"}},"https://h.example/v1/":{{"auth":"{}"}},"h.example/ci":{{"auth":"{}"}},
               "*.wild.example":{{"auth":"{}"}},"h.example:5000":{{"identitytoken":"t"}},"https://index.docker.io/v1/":{{"username":"u","password":"p"}}}}}}"#,
            auth("host"),
            auth("v1"),
            auth("ci"),
            auth("wild")
        );
        assert_eq!(found(&text, "h.example", "ci/a").await, Some(basic("ci", "pass:word")));
        assert_eq!(found(&text, "h.example", "cix/a").await, Some(basic("host", "pass:word")));
        assert_eq!(found(&text, "a.wild.example", "x").await, Some(basic("wild", "pass:word")));
        assert_eq!(found(&text, "a.b.wild.example", "x").await, None);
        assert_eq!(found(&text, "h.example:5000", "x").await, Some(Credential::IdentityToken(Secret("t".to_owned()))));
        assert_eq!(found(&text, "docker.io", "x").await, Some(basic("u", "p")));
        assert_eq!(found(&text, "other.example", "x").await, None);
    }

    #[tokio::test]
    async fn the_older_form_of_a_secret_is_read() {
        let text = r#"{"h.example":{"username":"u","password":"p"}}"#;
        assert_eq!(found(text, "h.example", "x").await, Some(basic("u", "p")));
    }

    #[tokio::test]
    async fn a_secret_never_runs_a_helper_and_no_error_shows_one() {
        let text = r#"{"credHelpers":{"h.example":"../../evil"},"credsStore":"evil","auths":{}}"#;
        assert_eq!(found(text, "h.example", "x").await, None);
        let broken =
            Credentials::default().with_docker_config(r#"{"auths":{"h.example":{"auth":"aHVudGVyMg=="}}}"#.to_owned());
        let error = broken.resolve("h.example", "x").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "an image pull secret has an `auth` for h.example that is not base64 of USER:PASSWORD"
        );
        assert!(!format!("{broken:?} {error:?}").contains("aHVudGVyMg"));
    }

    #[tokio::test]
    async fn a_file_may_name_helpers_by_plain_names_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let credentials = Credentials::from_environment(|name| (name == "DOCKER_CONFIG").then(|| dir.path().into()));
        assert_eq!(credentials.resolve("h.example", "x").await.unwrap(), None, "no file is no credential");
        std::fs::write(&path, r#"{"credHelpers":{"h.example":"../evil"}}"#).unwrap();
        assert!(matches!(credentials.resolve("h.example", "x").await, Err(CredentialsError::HelperName { .. })));
        std::fs::write(&path, r#"{"credsStore":"no-such-helper-here"}"#).unwrap();
        assert!(matches!(credentials.resolve("h.example", "x").await, Err(CredentialsError::Helper { .. })));
    }
}
