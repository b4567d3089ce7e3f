//! Media types and annotation keys. They are a contract with every image already pushed: a test pins them.

/// The artifact type of a native image's manifest.
pub const ARTIFACT: &str = "application/vnd.vmpod.image.v1";
/// The native configuration ([`crate::Config`]).
pub const CONFIG: &str = "application/vnd.vmpod.config.v1+json";
/// One window of a disk, compressed by itself with Zstandard.
pub const DISK_CHUNK_ZSTD: &str = "application/vnd.vmpod.disk.chunk.v1+zstd";
/// A kernel for direct boot, as it is.
pub const KERNEL: &str = "application/vnd.vmpod.kernel.v1";
/// The kernel's initial RAM disk, as it is.
pub const INITRD: &str = "application/vnd.vmpod.initrd.v1";
/// Firmware variables or a macOS auxiliary storage, as it is.
pub const NVRAM: &str = "application/vnd.vmpod.nvram.v1";

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// The OCI empty JSON object.
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Docker's manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Annotation of a chunk: the disk's number, from 0.
pub const CHUNK_DISK: &str = "dev.vmpod.chunk.disk";
/// Annotation of a chunk: its offset on the disk in bytes.
pub const CHUNK_OFFSET: &str = "dev.vmpod.chunk.offset";
/// Annotation of a chunk: its size on the disk in bytes.
pub const CHUNK_RAW_SIZE: &str = "dev.vmpod.chunk.raw-size";
/// Annotation of a chunk: the SHA-256 of its bytes on the disk.
pub const CHUNK_RAW_DIGEST: &str = "dev.vmpod.chunk.raw-digest";

/// OCI annotation: where the image's source is kept.
pub const OCI_SOURCE: &str = "org.opencontainers.image.source";
/// OCI annotation: the revision of that source.
pub const OCI_REVISION: &str = "org.opencontainers.image.revision";
/// OCI annotation: when the image was made, RFC 3339.
pub const OCI_CREATED: &str = "org.opencontainers.image.created";
/// OCI annotation in a layout's index: the tag.
pub const OCI_REF_NAME: &str = "org.opencontainers.image.ref.name";
