//! Credentials for registries.
use std::fmt;
use std::path::PathBuf;

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
    /// An OAuth2 refresh token (`identitytoken`).
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
pub enum CredentialsError {
    /// Not there yet.
    #[error("not built yet")]
    NotBuilt,
}

impl Credentials {
    /// The usual places of this user: `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`, then
    /// `$REGISTRY_AUTH_FILE` or `$XDG_RUNTIME_DIR/containers/auth.json`. `lookup` reads the environment.
    pub fn from_environment(lookup: impl Fn(&str) -> Option<std::ffi::OsString>) -> Self {
        let _ = lookup;
        Self::default()
    }

    /// Adds a docker config file; its credential helpers are run.
    #[must_use]
    pub fn with_file(mut self, path: PathBuf) -> Self {
        self.files.push(path);
        self
    }

    /// Adds the text of a docker config (a pod's imagePullSecrets: `.dockerconfigjson`, or the older `.dockercfg`), before
    /// everything else. No helper that it names is run.
    #[must_use]
    pub fn with_docker_config(mut self, text: String) -> Self {
        self.texts.push(Secret(text));
        self
    }

    /// The credential for `host[:port]/repository`, if there is one.
    pub async fn resolve(&self, _host: &str, _repository: &str) -> Result<Option<Credential>, CredentialsError> {
        Err(CredentialsError::NotBuilt)
    }
}
