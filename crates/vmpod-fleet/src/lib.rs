//! The place of the fleet operator: pools of CI runners that scale to a wait target and never kill a job.
//!
//! Nothing is built here yet. The crate exists so that its one direction holds from the beginning: it may know
//! `vmpod-api`, and neither machines, images, the node nor the API server.
