//! vmpod-image
