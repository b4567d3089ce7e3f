//! vmpod-node
