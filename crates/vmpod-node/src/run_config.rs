//! What an attempt runs and with which environment, resolved once and kept beside the pod's record.

use std::{collections::BTreeSet, io, path::Path};

use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use vmpod_api::annotations;

use crate::{
    env::{self, ConfigError, Facts, Fetched, Needs},
    error_chain, pod,
    record::write_whole,
};

/// What an attempt runs. It holds secrets: its file is private.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunConfig {
    /// The main process's command line; empty when the machine itself is the process.
    pub(crate) command: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) workdir: Option<String>,
    /// Cloud-init user data.
    pub(crate) user_data: Option<String>,
    /// How to log in to the guest, when that isn't as its image says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) login: Option<Login>,
}

/// A way into a guest.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Login {
    /// The user; the image's when it isn't named.
    pub(crate) user: Option<String>,
    pub(crate) proof: Proof,
}

/// What a user of a guest has to show.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Proof {
    Password(String),
    /// A private key in OpenSSH's format.
    Key(String),
}

impl std::fmt::Debug for RunConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Values may be secret.
        let names: Vec<_> = self.env.iter().map(|(name, _)| name).collect();
        f.debug_struct("RunConfig").field("command", &self.command).field("env", &names).finish_non_exhaustive()
    }
}

/// Why it can't be resolved now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunConfigError {
    /// The pod asks for what isn't there.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The API couldn't be asked.
    #[error("could not fetch {kind} {namespace}/{name}")]
    Fetch { kind: &'static str, namespace: String, name: String, source: Box<kube::Error> },
    /// Two sources of user data.
    #[error("annotations {} and {} exclude each other", annotations::USER_DATA, annotations::USER_DATA_SECRET)]
    TwoUserData,
}

impl RunConfigError {
    /// The text for the container's status.
    pub(crate) fn message(&self) -> String {
        error_chain(self)
    }
}

const FILE: &str = "run.json";
const USER_DATA_KEY: &str = "userdata";

impl RunConfig {
    pub(crate) fn save(&self, dir: &Path) -> io::Result<()> {
        std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o700).create(dir)?;
        write_whole(&dir.join(FILE), &serde_json::to_vec(self)?)
    }

    pub(crate) fn load(dir: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(dir.join(FILE))?)?)
    }

    /// Fetches what the container needs and resolves it.
    pub(crate) async fn resolve(
        client: &Client,
        pod: &Pod,
        container: &Container,
        facts: &Facts,
    ) -> Result<Self, RunConfigError> {
        let mut needs = Needs::of(container);
        let inline = pod::annotation(pod, annotations::USER_DATA);
        let secret = pod::annotation(pod, annotations::USER_DATA_SECRET);
        if inline.is_some() && secret.is_some() {
            return Err(RunConfigError::TwoUserData);
        }
        let login = pod::annotation(pod, annotations::GUEST_LOGIN_SECRET).filter(|name| !name.is_empty());
        needs.secrets.extend(secret.into_iter().chain(login).map(str::to_owned));
        let fetched = fetch(client, pod::namespace(pod), &needs).await?;
        let env = env::resolve(pod, container, &fetched, facts)?;
        let command =
            pod::command(container).map(|(command, args)| env::command_line(command, args, &env)).unwrap_or_default();
        let user_data = match secret {
            Some(name) => Some(secret_user_data(pod, name, &fetched)?),
            None => inline.map(str::to_owned),
        };
        let workdir = container.working_dir.clone().filter(|dir| !dir.is_empty());
        let login = login.map(|name| secret_login(pod, name, &fetched)).transpose()?;
        Ok(Self { command, env, workdir, user_data, login })
    }
}

/// A Secret of a type that Kubernetes has for logging in
/// (<https://kubernetes.io/docs/concepts/configuration/secret/#secret-types>). What counts are its keys.
fn secret_login(pod: &Pod, name: &str, fetched: &Fetched) -> Result<Login, ConfigError> {
    const USER: &str = "username";
    const PASSWORD: &str = "password";
    const KEY: &str = "ssh-privatekey";
    let has = |key: &str| {
        let data = fetched.secrets.get(name).and_then(|secret| secret.data.as_ref());
        data.is_some_and(|data| data.contains_key(key))
    };
    let user = has(USER).then(|| secret_text(pod, name, USER, fetched)).transpose()?;
    let proof = if has(KEY) {
        Proof::Key(secret_text(pod, name, KEY, fetched)?)
    } else {
        // Without either, this tells what is missing.
        Proof::Password(secret_text(pod, name, PASSWORD, fetched)?)
    };
    Ok(Login { user, proof })
}

fn secret_user_data(pod: &Pod, name: &str, fetched: &Fetched) -> Result<String, ConfigError> {
    secret_text(pod, name, USER_DATA_KEY, fetched)
}

fn secret_text(pod: &Pod, name: &str, key: &str, fetched: &Fetched) -> Result<String, ConfigError> {
    let secret =
        fetched.secrets.get(name).ok_or_else(|| ConfigError::Missing { kind: "secret", name: name.to_owned() })?;
    let (namespace, name, key) = (pod::namespace(pod).to_owned(), name.to_owned(), key.to_owned());
    match secret.data.as_ref().and_then(|data| data.get(&key)) {
        Some(bytes) => String::from_utf8(bytes.0.clone()).map_err(|_| ConfigError::NotText {
            kind: "Secret",
            namespace,
            name,
            key,
        }),
        None => Err(ConfigError::MissingKey { kind: "Secret", namespace, name, key }),
    }
}

/// Fetches objects one at a time by name: more the Node authorizer doesn't allow.
pub(crate) async fn fetch(client: &Client, namespace: &str, needs: &Needs) -> Result<Fetched, RunConfigError> {
    let config_maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let (config_maps, secrets) = futures::try_join!(
        get_all(&config_maps, "configmap", namespace, &needs.config_maps),
        get_all(&secrets, "secret", namespace, &needs.secrets)
    )?;
    Ok(Fetched { config_maps, secrets })
}

async fn get_all<K>(
    api: &Api<K>,
    kind: &'static str,
    namespace: &str,
    names: &BTreeSet<String>,
) -> Result<std::collections::BTreeMap<String, K>, RunConfigError>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let fetched = names.iter().map(|name| async move {
        match api.get_opt(name).await {
            Ok(object) => Ok(object.map(|object| (name.clone(), object))),
            Err(source) => Err(RunConfigError::Fetch {
                kind,
                namespace: namespace.to_owned(),
                name: name.clone(),
                source: Box::new(source),
            }),
        }
    });
    Ok(futures::future::try_join_all(fetched).await?.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_private_and_survives() {
        let dir = tempfile::tempdir().unwrap();
        let config = RunConfig { env: vec![("TOKEN".to_owned(), "hunter2".to_owned())], ..RunConfig::default() };
        config.save(&dir.path().join("uid")).unwrap();
        assert_eq!(RunConfig::load(&dir.path().join("uid")).unwrap(), config);
        let mode = std::fs::metadata(dir.path().join("uid/run.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn a_login_is_read_from_secrets_of_kubernetes_types() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}})).unwrap();
        let login = |data: serde_json::Value| {
            let secret: Secret = serde_json::from_value(serde_json::json!({"stringData": {}, "data": data})).unwrap();
            let fetched = Fetched { secrets: [("s".to_owned(), secret)].into(), ..Fetched::default() };
            secret_login(&pod, "s", &fetched)
        };
        // "admin", "pw", "key".
        let basic = login(serde_json::json!({"username": "YWRtaW4=", "password": "cHc="})).unwrap();
        assert_eq!(basic.user.as_deref(), Some("admin"));
        assert!(matches!(basic.proof, Proof::Password(password) if password == "pw"));
        let key = login(serde_json::json!({"ssh-privatekey": "a2V5"})).unwrap();
        assert_eq!(key.user, None);
        assert!(matches!(key.proof, Proof::Key(pem) if pem == "key"));
        assert!(
            matches!(login(serde_json::json!({"username": "YQ=="})), Err(ConfigError::MissingKey { key, .. }) if key == "password")
        );
        let nothing = Fetched::default();
        assert!(matches!(secret_login(&pod, "s", &nothing), Err(ConfigError::Missing { .. })));
    }
}
