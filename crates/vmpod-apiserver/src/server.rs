//! What all requests and controllers share.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use serde_json::Value;

use crate::auth::token::Signer;
use crate::kinds::{Registry, Resource};
use crate::pki::Pki;
use crate::proxy::Kubelets;
use crate::status::Status;
use crate::store::{Key, Object, Store, StoreError};

/// The storage name of custom resource definitions.
pub(crate) const CRDS: &str = "customresourcedefinitions.apiextensions.k8s.io";

/// The shared state of an API server.
pub(crate) struct Server {
    pub(crate) store: Store,
    pub(crate) pki: Pki,
    pub(crate) signer: Signer,
    pub(crate) kubelets: Kubelets,
    /// Where the TLS listener is, when there is one.
    pub(crate) address: Option<SocketAddr>,
    pub(crate) policy: crate::auth::policy::Cached,
    pub(crate) readings: crate::metrics::Readings,
    registry: RwLock<Registry>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::TooDeep => Self { message: error.to_string(), ..Self::unprocessable() },
            StoreError::Disk(_) | StoreError::Closed | StoreError::Serialise(_) => Self::internal(error),
        }
    }
}

impl Server {
    pub(crate) fn new(store: Store, pki: Pki, signer: Signer, kubelets: Kubelets, address: Option<SocketAddr>) -> Self {
        let policy = crate::auth::policy::Cached::default();
        let registry = RwLock::new(Registry::builtin());
        let readings = crate::metrics::Readings::default();
        let server = Self { store, pki, signer, kubelets, address, policy, readings, registry };
        server.refresh_registry();
        server
    }

    /// The kinds served now.
    pub(crate) fn registry(&self) -> Registry {
        self.registry.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over the custom resource definitions as they are in the store.
    pub(crate) fn refresh_registry(&self) {
        let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
        let crds: Vec<Value> = self.store.list(CRDS, None).objects.iter().map(|object| object.value()).collect();
        let crds: Vec<&Value> = crds.iter().collect();
        *registry = Registry::builtin().with_crds(&crds);
    }

    /// The kind with this API version, when it is served.
    pub(crate) fn resource_of(&self, api_version: &str, kind: &str) -> Option<Arc<Resource>> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        self.registry().by_kind(group, version, kind)
    }

    /// A served, stored kind with this storage name.
    pub(crate) fn resource_stored_as(&self, storage: &str) -> Option<Arc<Resource>> {
        self.registry()
            .resources()
            .iter()
            .find(|resource| resource.stored && storage_name(resource) == storage)
            .cloned()
    }

    pub(crate) fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.store.get(&Key::new("pods", Some(namespace), name))
    }
}

/// The name that a resource's objects are stored under.
pub(crate) fn storage_name(resource: &Resource) -> String {
    resource.qualified()
}

/// The SHA-256 of some bytes, in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let nibble = |value: u8| char::from(DIGITS[usize::from(value & 15)]);
    sha2::Sha256::digest(bytes).iter().flat_map(|byte| [nibble(byte >> 4), nibble(*byte)]).collect()
}
