//! The guest's serial console.
