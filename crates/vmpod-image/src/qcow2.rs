//! QEMU's qcow2 files, as far as images need them: reading one, writing one that stands alone, and making an empty
//! overlay.
//!
//! The format is described in QEMU's `docs/interop/qcow2.txt`.

mod overlay;
mod reader;
mod writer;

pub(crate) use overlay::Overlay;
pub(crate) use reader::Qcow2;
pub use reader::Qcow2Error;
pub(crate) use writer::Writer;

/// The first four bytes of a qcow2 file.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
