//! Getting a container's image, with the kubelet's policies, events and words.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use kube::Api;
use vmpod_image::{Credentials, Image, PullOptions, Reference, pull};

use crate::{
    error_chain,
    events::{Events, Kind},
    options::Registries,
    pod,
};

/// When an image is pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    Always,
    IfNotPresent,
    Never,
}

impl Policy {
    /// The container's policy; without one, `Always` for the tag `latest`.
    pub(crate) fn of(container: &Container, latest: bool) -> Self {
        match container.image_pull_policy.as_deref() {
            Some("Always") => Self::Always,
            Some("Never") => Self::Never,
            Some("IfNotPresent") => Self::IfNotPresent,
            _ if latest => Self::Always,
            _ => Self::IfNotPresent,
        }
    }
}

/// Whether a name means the newest image of its kind.
fn is_latest(reference: &Reference) -> bool {
    reference.digest().is_none() && reference.tag() == Some("latest")
}

/// Why there is no image: a reason that users know, and words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageTrouble {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl ImageTrouble {
    fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// Makes sure that the container's image is in the store.
pub(crate) async fn ensure(
    store: &vmpod_image::Store,
    client: &kube::Client,
    registries: &Registries,
    events: &Events,
    pod: &Pod,
    container: &Container,
) -> Result<Image, ImageTrouble> {
    let name = container.image.as_deref().unwrap_or_default();
    let told = find(store, client, registries, events, pod, container, name).await;
    if let Err(trouble) = &told {
        let message = match trouble.reason {
            "InvalidImageName" => format!("Failed to apply default image tag {name:?}: {}", trouble.message),
            "ErrImagePull" => format!("Failed to pull image {name:?}: {}", trouble.message),
            _ => trouble.message.clone(),
        };
        events.container(pod, Kind::Warning, "Failed", message);
        events.container(pod, Kind::Warning, "Failed", format!("Error: {}", trouble.reason));
    }
    told
}

async fn find(
    store: &vmpod_image::Store,
    client: &kube::Client,
    registries: &Registries,
    events: &Events,
    pod: &Pod,
    container: &Container,
    name: &str,
) -> Result<Image, ImageTrouble> {
    let reference =
        Reference::parse(name).map_err(|error| ImageTrouble::new("InvalidImageName", error_chain(&error)))?;
    let policy = Policy::of(container, is_latest(&reference));
    let present = {
        let (store, reference) = (store.clone(), reference.clone());
        tokio::task::spawn_blocking(move || store.get(&reference)).await
    };
    let present = match present {
        Ok(Ok(image)) => image,
        Ok(Err(error)) => return Err(ImageTrouble::new("ImageInspectError", error_chain(&error))),
        Err(error) => return Err(ImageTrouble::new("ImageInspectError", error.to_string())),
    };
    match (present, policy) {
        (Some(image), Policy::IfNotPresent | Policy::Never) => {
            events.container(
                pod,
                Kind::Normal,
                "Pulled",
                format!("Container image {name:?} already present on machine"),
            );
            return Ok(image);
        }
        // A local name belongs to this store alone: there is nowhere to look for something newer.
        (Some(image), Policy::Always) if reference.is_local() => {
            events.container(
                pod,
                Kind::Normal,
                "Pulled",
                format!("Container image {name:?} already present on machine"),
            );
            return Ok(image);
        }
        (None, Policy::Never) => {
            return Err(ImageTrouble::new(
                "ErrImageNeverPull",
                format!("Container image {name:?} is not present with pull policy of Never"),
            ));
        }
        (None, _) if reference.is_local() => {
            let message = format!(
                "image {reference} is not in this node's store, and a name without a registry host is never pulled: import it, or name its registry"
            );
            return Err(ImageTrouble::new("ErrImagePull", message));
        }
        (_, Policy::Always | Policy::IfNotPresent) => {}
    }
    events.container(pod, Kind::Normal, "Pulling", format!("Pulling image {name:?}"));
    let begun = Timestamp::now();
    let options = PullOptions {
        credentials: credentials(client, registries, events, pod).await,
        plain_http: registries.plain_http.clone(),
        ca_files: registries.ca_files.clone(),
        mirrors: registries.mirrors.clone(),
        signatures: registries.signatures.clone(),
        ..PullOptions::default()
    };
    let image = pull(store, &reference, options)
        .await
        .map_err(|error| ImageTrouble::new("ErrImagePull", error_chain(&error)))?;
    let took = go_duration(Timestamp::now().duration_since(begun));
    events.container(
        pod,
        Kind::Normal,
        "Pulled",
        format!(
            "Successfully pulled image {name:?} in {took} ({took} including waiting). Image size: {} bytes.",
            image.transfer_bytes
        ),
    );
    Ok(image)
}

/// The text of a pull secret, if it has one.
pub(crate) async fn docker_config(
    client: &kube::Client,
    namespace: &str,
    name: &str,
) -> Result<Option<String>, kube::Error> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let data = secrets.get(name).await?.data.unwrap_or_default();
    let text = [".dockerconfigjson", ".dockercfg"].iter().find_map(|key| data.get(*key));
    Ok(text.and_then(|bytes| String::from_utf8(bytes.0.clone()).ok()))
}

/// The node's credentials with the pod's pull secrets before them. A secret that is missing is told and passed over, as the
/// kubelet does: the image may be public.
pub(crate) async fn credentials(
    client: &kube::Client,
    registries: &Registries,
    events: &Events,
    pod: &Pod,
) -> Credentials {
    let mut credentials = registries.credentials.clone();
    for reference in pod::spec(pod).and_then(|spec| spec.image_pull_secrets.as_ref()).into_iter().flatten() {
        match docker_config(client, pod::namespace(pod), &reference.name).await {
            Ok(Some(text)) => credentials = credentials.with_docker_config(text),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(secret = reference.name, %error, "pull secret");
                events.pod(
                    pod,
                    Kind::Warning,
                    "FailedToRetrieveImagePullSecret",
                    format!(
                        "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                        reference.name
                    ),
                );
            }
        }
    }
    credentials
}

/// A duration as Go prints it, in milliseconds or seconds.
fn go_duration(duration: SignedDuration) -> String {
    let millis = duration.as_millis();
    if millis < 1000 { format!("{millis}ms") } else { format!("{}.{:03}s", millis / 1000, millis % 1000) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_latest_is_pulled_always_unless_said_otherwise() {
        let policy = |image: &str, said: Option<&str>| {
            let container = Container { image_pull_policy: said.map(str::to_owned), ..Container::default() };
            Policy::of(&container, is_latest(&Reference::parse(image).unwrap()))
        };
        assert_eq!(policy("r.example/x", None), Policy::Always);
        assert_eq!(policy("r.example/x:1", None), Policy::IfNotPresent);
        assert_eq!(policy("r.example/x", Some("Never")), Policy::Never);
        assert_eq!(policy("r.example/x", Some("IfNotPresent")), Policy::IfNotPresent);
        assert_eq!(policy(&format!("r.example/x@sha256:{}", "0".repeat(64)), None), Policy::IfNotPresent);
    }

    #[test]
    fn durations_read_as_go_prints_them() {
        assert_eq!(go_duration(SignedDuration::from_millis(12)), "12ms");
        assert_eq!(go_duration(SignedDuration::from_millis(1042)), "1.042s");
    }
}
