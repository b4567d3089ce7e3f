//! A scripted hypervisor.
