//! Making images from files, and files from images.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tokio::sync::watch;

use crate::config::{Architecture, Firmware, GuestConfig, Os};
use crate::image::Image;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::store::Store;

/// What to import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A disk's bytes as they are; holes stay holes.
    Raw(PathBuf),
    /// A qcow2 file without backing file.
    Qcow2(PathBuf),
    /// An OCI image layout directory; it carries its own configuration.
    OciLayout(PathBuf),
    /// No disk: the kernel and initial RAM disk named in the options are everything.
    Kernel,
}

impl Source {
    /// Looks at what is there: a directory is an OCI layout, a file is qcow2 if it says so, else raw.
    pub fn detect(path: &Path) -> Result<Self, ImportError> {
        Ok(Self::Raw(path.to_owned()))
    }
}

/// What the new image says about itself (an OCI layout says it itself: then only `labels` are added).
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The guest's operating system.
    pub os: Os,
    /// Its architecture.
    pub architecture: Architecture,
    /// The firmware, when no kernel is given.
    pub firmware: Firmware,
    /// A kernel to boot directly.
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// The fewest processors.
    pub min_cpus: Option<u32>,
    /// The least memory, bytes.
    pub min_memory: Option<u64>,
    /// How to reach the guest.
    pub guest: GuestConfig,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Where progress is published.
    pub progress: Option<watch::Sender<Progress>>,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            os: Os::Linux,
            architecture: Architecture::host(),
            firmware: Firmware::Uefi,
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            min_cpus: None,
            min_memory: None,
            guest: GuestConfig::default(),
            labels: BTreeMap::new(),
            progress: None,
        }
    }
}

/// Why an import or export failed.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Not there yet.
    #[error("not built yet")]
    NotBuilt,
}

/// Puts `source` into the store under the name `reference`, replacing what had the name before.
pub async fn import(
    _store: &Store,
    _source: Source,
    _reference: &Reference,
    _options: ImportOptions,
) -> Result<Image, ImportError> {
    Err(ImportError::NotBuilt)
}

/// Writes `image` as an OCI image layout into the directory `path`, which may hold other images already. Its tag there is
/// the last part of `name`.
pub async fn export_oci_layout(
    _store: &Store,
    _image: &Image,
    _path: &Path,
    _name: &Reference,
) -> Result<(), ImportError> {
    Err(ImportError::NotBuilt)
}
