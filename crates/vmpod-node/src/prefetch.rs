//! Images that this node is to have before any pod asks for them.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use vmpod_image::{PullOptions, Reference, Store, pull};

use crate::{
    error_chain,
    events::{Events, Kind},
    options::Registries,
};

pub(crate) mod objects;

/// The wait after the first failure; it doubles.
const FIRST: Duration = Duration::from_secs(10);
/// The longest wait: a registry that is down for the night is asked now and then.
const LONGEST: Duration = Duration::from_mins(5);

/// How long to wait after so many failures (from 1).
fn wait(failures: u32) -> Duration {
    FIRST.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST)
}

/// Pulls each image, one after the other, and tells on the Node how it went. What fails is tried again later: a mistake in a
/// registry is mended without a word to the node.
pub(crate) async fn run(store: Store, registries: Registries, images: Vec<String>, events: Events, node: Node) {
    let mut left = images;
    let mut failures = 0;
    while !left.is_empty() {
        let mut failed = Vec::new();
        for name in left {
            match one(&store, &registries, &name).await {
                Ok(true) => {
                    events.node(&node, Kind::Normal, "ImagePrefetched", format!("Image {name} is on this node."));
                }
                Ok(false) => {}
                Err(why) => {
                    events.node(
                        &node,
                        Kind::Warning,
                        "ImagePrefetchFailed",
                        format!("Image {name} can't be had: {why}"),
                    );
                    failed.push(name);
                }
            }
        }
        left = failed;
        if !left.is_empty() {
            failures += 1;
            tokio::time::sleep(wait(failures)).await;
        }
    }
}

/// Whether an image is here.
async fn present(store: &Store, name: &str) -> Result<bool, String> {
    let reference = Reference::parse(name).map_err(|error| error_chain(&error))?;
    let store = store.clone();
    let present = tokio::task::spawn_blocking(move || store.get(&reference)).await;
    Ok(present.map_err(|error| error.to_string())?.map_err(|error| error_chain(&error))?.is_some())
}

/// Makes sure that one image is here. Whether it had to be pulled.
async fn one(store: &Store, registries: &Registries, name: &str) -> Result<bool, String> {
    let reference = Reference::parse(name).map_err(|error| error_chain(&error))?;
    if present(store, name).await? {
        return Ok(false);
    }
    let options = PullOptions {
        credentials: registries.credentials.clone(),
        plain_http: registries.plain_http.clone(),
        ca_files: registries.ca_files.clone(),
        mirrors: registries.mirrors.clone(),
        signatures: registries.signatures.clone(),
        ..PullOptions::default()
    };
    pull(store, &reference, options).await.map(|_| true).map_err(|error| error_chain(&error))
}

#[cfg(test)]
mod tests {
    use vmpod_image::{ImportOptions, Source, import};

    use super::*;

    #[test]
    fn waits_double_up_to_the_longest() {
        let waits: Vec<u64> = (1..=7).map(|failures| wait(failures).as_secs()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(wait(u32::MAX), LONGEST);
    }

    #[tokio::test]
    async fn what_is_here_is_not_asked_for_and_a_local_name_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("images")).unwrap();
        let raw = dir.path().join("disk.raw");
        std::fs::write(&raw, [1; 512]).unwrap();
        let name = Reference::parse("registry.invalid/x:1").unwrap();
        import(&store, Source::Raw(raw), &name, ImportOptions::default()).await.unwrap();
        assert_eq!(one(&store, &Registries::default(), "registry.invalid/x:1").await, Ok(false));
        let told = one(&store, &Registries::default(), "tiny").await.unwrap_err();
        assert!(told.contains("without a registry host is never pulled"), "{told}");
        assert!(one(&store, &Registries::default(), "NOT A NAME").await.is_err());
    }
}
