//! vmpod-apiserver
