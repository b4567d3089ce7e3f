//! Virtual machine images as OCI artifacts: formats, registries, the local store and its copy-on-write clones.
//!
//! ```text
//! registry ─┐
//! OCI layout ├─ format → Plan → pull pipeline ─┐
//! raw, qcow2 ┴───────────── ingest ────────────┴→ Store ─→ clone (reflink or qcow2 overlay)
//!                                                  └─→ push, export
//! ```
//!
//! Nothing here knows Kubernetes or a hypervisor. An image is visible in the [`Store`] only when every byte of it was
//! verified.

mod blobs;
mod capture;
mod clone;
mod config;
mod containerdisk;
mod credentials;
mod digest;
mod export;
mod format;
mod gzip;
mod image;
mod import;
mod ingest;
mod layout;
mod manifest;
pub mod media;
mod mirror;
mod native;
mod progress;
mod pull;
mod push;
mod qcow2;
mod reference;
mod registry;
mod signature;
mod store;
mod transfer;

pub use blobs::{BlobError, Retry};
pub use capture::{CaptureError, CaptureOptions, CapturedDisk, DiskCopies, capture};
pub use clone::clone_disk;
pub use config::{
    Architecture, Boot, Config, DeviceKind, DiskConfig, Firmware, GuestConfig, Hardware, MacIdentity, Os, SeedKind,
    UnknownName,
};
pub use credentials::{Credential, Credentials, CredentialsError, Secret};
pub use digest::{Digest, DigestError};
pub use export::{ExportError, ExportFormat, export, export_oci_layout};
pub use format::FormatError;
pub use image::{ClonedBoot, ClonedDisk, ClonedImage, DiskFormat, Image};
pub use import::{ImportError, ImportOptions, Source, convert, import};
pub use mirror::{InvalidMirror, Mirror};
pub use native::NativeError;
pub use progress::{Bytes, Meter, Phase, Progress};
pub use pull::{PullError, PullOptions, pull};
pub use push::{PushError, PushFormat, PushOptions, push};
pub use qcow2::Qcow2Error;
pub use reference::{Reference, ReferenceError};
pub use registry::{RegistryError, install_crypto_provider};
pub use signature::{PublicKey, SignatureError, SignaturePolicy};
pub use store::{Damage, FileSystem, Holder, Prune, Pruned, Store, StoreError};
pub use transfer::TransferError;
