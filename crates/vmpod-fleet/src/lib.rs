//! vmpod-fleet
