//! vmpod-machine
