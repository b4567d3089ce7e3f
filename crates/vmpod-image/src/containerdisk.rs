//! Making a `KubeVirt` containerDisk: a container image whose one layer holds one qcow2 file under `/disk`.
//!
//! The same image gives the same bytes, so that registries have them once: nothing in it tells when or where it was made.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::config::{Boot, Config, Firmware, Os};
use crate::digest::{Digest, Hasher};
use crate::format::containerdisk::{LABEL_FIRMWARE, LABEL_OS, LABEL_USER};
use crate::gzip::ParallelGzip;
use crate::image::Image;
use crate::manifest::{Descriptor, Manifest};
use crate::media;
use crate::native::NativeError;
use crate::qcow2::Writer;
use crate::store::record::Part;
use crate::store::{Store, StoreError};

/// The user that `KubeVirt` runs QEMU as.
const QEMU: u64 = 107;
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A containerDisk whose layer is in a file.
#[derive(Debug)]
pub(crate) struct ContainerDisk {
    pub(crate) layer: Descriptor,
    pub(crate) layer_file: PathBuf,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

impl ContainerDisk {
    /// Makes one of an image that has one disk and boots from it. The layer goes to the file `layer`. Takes a while: don't call it in
    /// async code.
    pub(crate) fn make(
        store: &Store,
        image: &Image,
        layer: &Path,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Self, NativeError> {
        let refuse = |why| NativeError::NoContainerDisk { image: image.digest, why };
        if image.config.disks.len() != 1 {
            return Err(refuse("it must have one disk"));
        }
        let Boot::Firmware(firmware) = image.config.boot else {
            return Err(refuse("it boots a kernel from outside its disk, which a containerDisk has no place for"));
        };
        let record = store.record(image.digest)?.ok_or(StoreError::NoImage(image.digest))?;
        // What is packed here gets a digest of its own, which would vouch for whatever the file holds by now.
        store.check_seal(image, &record)?;
        let path = store.image_dir(image.digest).join(Part::Disk(0).file_name());
        let failed = |source| NativeError::Pack { path: path.clone(), source };
        let disk = File::open(&path).map_err(failed)?;
        let packed = write_layer(&disk, layer).map_err(failed)?;
        let config = serde_json::to_vec(&config(&image.config, firmware, packed.diff)).map_err(NativeError::Json)?;
        let layer_descriptor = Descriptor::new(LAYER, packed.digest, packed.size);
        let manifest = Manifest {
            schema_version: 2,
            media_type: media::OCI_MANIFEST.to_owned(),
            artifact_type: None,
            config: Descriptor::new(media::OCI_CONFIG, Digest::of(&config), config.len() as u64),
            layers: vec![layer_descriptor.clone()],
            subject: None,
            annotations: annotations.clone(),
        };
        let manifest = serde_json::to_vec(&manifest).map_err(NativeError::Json)?;
        Ok(Self { layer: layer_descriptor, layer_file: layer.to_owned(), config, manifest })
    }
}

/// A layer that was written.
struct Packed {
    digest: Digest,
    size: u64,
    /// The digest of the archive before it was packed.
    diff: Digest,
}

fn write_layer(disk: &File, to: &Path) -> io::Result<Packed> {
    let qcow2 = Writer::new(disk)?;
    let out =
        Counted { inner: io::BufWriter::with_capacity(1 << 20, File::create(to)?), hasher: Hasher::new(), size: 0 };
    let mut archive = Counted { inner: ParallelGzip::new(out), hasher: Hasher::new(), size: 0 };
    archive.write_all(&tar_header("disk/", 0, b'5', 0o555))?;
    archive.write_all(&tar_header("disk/disk.qcow2", qcow2.file_size(), b'0', 0o444))?;
    qcow2.write(&mut archive)?;
    // A whole number of blocks already; two blocks of zeros end an archive.
    archive.write_all(&[0; 1024])?;
    let diff = archive.hasher.finish();
    let mut out = archive.inner.finish()?;
    out.flush()?;
    Ok(Packed { digest: out.hasher.finish(), size: out.size, diff })
}

/// Counts and digests what passes.
struct Counted<W> {
    inner: W,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A header of a POSIX archive. Sizes beyond eleven octal digits are binary, as GNU tar, Go and libarchive have it.
fn tar_header(name: &str, size: u64, kind: u8, mode: u64) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, format!("{QEMU:07o}").as_bytes());
    put(116, format!("{QEMU:07o}").as_bytes());
    if size < 1 << 33 {
        put(124, format!("{size:011o}").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, format!("{:011o}", 0).as_bytes());
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

fn config(config: &Config, firmware: Firmware, diff: Digest) -> serde_json::Value {
    let mut labels = config.labels.clone();
    let firmware = match firmware {
        Firmware::Bios => "bios",
        Firmware::Uefi => "uefi",
        Firmware::Secure => "secure",
    };
    labels.insert(LABEL_FIRMWARE.to_owned(), firmware.to_owned());
    labels.insert(LABEL_USER.to_owned(), config.guest.user.clone());
    if config.os != Os::Linux {
        labels.insert(LABEL_OS.to_owned(), config.os.to_string());
    }
    serde_json::json!({
        // The container's system: that of the node which mounts it.
        "os": "linux",
        "architecture": config.architecture,
        "config": {"Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [diff]},
        "history": [{"created_by": "vmpod"}],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_size_is_binary() {
        let small = tar_header("disk/a", (1 << 33) - 1, b'0', 0o444);
        assert_eq!(&small[124..136], b"77777777777\0");
        let large = tar_header("disk/a", 1 << 33, b'0', 0o444);
        assert_eq!(large[124..136], [0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
    }
}
