//! OCI image layouts: directories with `oci-layout`, `index.json` and `blobs/sha256/`.

use std::io::SeekFrom;
use std::path::{Path, PathBuf};

use futures::StreamExt as _;
use tokio::io::AsyncSeekExt as _;
use tokio_util::io::ReaderStream;

use crate::blobs::{BlobError, BlobErrorKind, Blobs, Body};
use crate::digest::Digest;
use crate::format::Blob;
use crate::manifest::{Descriptor, Index, LARGEST};
use crate::media;
use crate::store::StoreError;
use crate::store::files::{self, io};
use crate::store::record::{read_json, write_json};

/// The content of the file `oci-layout`.
const MARKER: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// A layout directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    dir: PathBuf,
    place: String,
}

impl Layout {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), place: dir.display().to_string() }
    }

    /// Whether a directory is a layout.
    pub(crate) fn is_at(dir: &Path) -> bool {
        dir.join("oci-layout").is_file()
    }

    /// Makes the directory a layout, if it isn't yet.
    pub(crate) fn make(dir: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(dir.join("blobs/sha256")).map_err(io("make the directory", dir))?;
        files::write_whole(&dir.join("oci-layout"), MARKER.as_bytes())?;
        Ok(Self::new(dir))
    }

    pub(crate) fn index(&self) -> Result<Option<Index>, StoreError> {
        read_json(&self.dir.join("index.json"))
    }

    /// Adds a manifest under a tag, which another one may have had.
    pub(crate) fn add(&self, mut manifest: Descriptor, tag: &str) -> Result<(), StoreError> {
        let mut index = self.index()?.unwrap_or(Index {
            schema_version: 2,
            media_type: media::OCI_INDEX.to_owned(),
            manifests: vec![],
        });
        index.manifests.retain(|other| other.annotations.get(media::OCI_REF_NAME).is_none_or(|name| name != tag));
        manifest.annotations.insert(media::OCI_REF_NAME.to_owned(), tag.to_owned());
        index.manifests.push(manifest);
        write_json(&self.dir.join("index.json"), &index)
    }

    /// The file of a blob.
    pub(crate) fn path(&self, digest: Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// A small blob, verified.
    pub(crate) fn read(&self, descriptor: &Descriptor) -> Result<Vec<u8>, BlobError> {
        let path = self.path(descriptor.digest);
        let failed = |error: std::io::Error| {
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let kind = if missing { BlobErrorKind::Missing } else { BlobErrorKind::Fatal };
            BlobError::caused(kind, format!("couldn't read {}", path.display()), error)
        };
        let size = std::fs::metadata(&path).map_err(failed)?.len();
        if size > LARGEST {
            return Err(BlobError::new(
                BlobErrorKind::Fatal,
                format!("{} is too large for what it should be", path.display()),
            ));
        }
        let bytes = std::fs::read(&path).map_err(failed)?;
        if Digest::of(&bytes) != descriptor.digest {
            return Err(BlobError::new(
                BlobErrorKind::Fatal,
                format!("{} doesn't hold what its name says", path.display()),
            ));
        }
        Ok(bytes)
    }
}

#[async_trait::async_trait]
impl Blobs for Layout {
    async fn open(&self, blob: Blob, start: u64, end: u64) -> Result<Body, BlobError> {
        let path = self.path(blob.digest);
        let failed = |error: std::io::Error| {
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let kind = if missing { BlobErrorKind::Missing } else { BlobErrorKind::Fatal };
            BlobError::caused(kind, format!("couldn't read {}", path.display()), error)
        };
        let mut file = tokio::fs::File::open(&path).await.map_err(failed)?;
        let size = file.metadata().await.map_err(failed)?.len();
        if size < end {
            let message = format!("{} has {size} bytes and should have {}", path.display(), blob.size);
            return Err(BlobError::new(BlobErrorKind::Fatal, message));
        }
        file.seek(SeekFrom::Start(start)).await.map_err(failed)?;
        let shown = path.display().to_string();
        let stream = ReaderStream::with_capacity(file, 512 << 10).map(move |part| {
            part.map_err(|error| BlobError::caused(BlobErrorKind::Fatal, format!("couldn't read {shown}"), error))
        });
        Ok(stream.boxed())
    }

    fn has_ranges(&self) -> bool {
        true
    }

    fn place(&self) -> &str {
        &self.place
    }
}
