//! First-boot data in the `NoCloud` form.

use crate::directory::MachineDir;
use crate::spec::Seed;

/// Why a seed couldn't be made.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The file couldn't be written.
    #[error("can't write the seed")]
    Io(#[from] std::io::Error),
}

/// Writes `seed.iso` into the machine's directory.
pub(crate) fn write(_dir: &MachineDir, _seed: &Seed) -> Result<(), SeedError> {
    Err(SeedError::Io(std::io::Error::other("not built yet")))
}
