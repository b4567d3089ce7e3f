//! Quoting for a POSIX shell.
