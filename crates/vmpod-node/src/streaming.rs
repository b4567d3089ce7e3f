//! The protocols that carry a terminal, a command's output or a forwarded port through HTTP.

pub mod forward;
pub mod remote;
pub mod spdy;
pub mod websocket;

use std::time::Duration;

/// A session without traffic for so long is closed, as by the kubelet.
pub const IDLE: Duration = Duration::from_hours(4);

/// So long a client has to open the streams it announced, as with the kubelet.
pub const STREAM_CREATION: Duration = Duration::from_secs(30);

/// So long a client may take what was sent before its connection is cut.
pub const GRACE: Duration = Duration::from_secs(10);

/// Chooses the first of `ours` that the peer offers.
#[must_use]
pub fn negotiate<'a>(ours: &[&'a str], offered: &[String]) -> Option<&'a str> {
    ours.iter().copied().find(|own| offered.iter().any(|offer| offer == own))
}
