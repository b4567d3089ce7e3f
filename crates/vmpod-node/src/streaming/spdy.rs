//! The server's half of SPDY/3.1, as much of it as Kubernetes' streaming uses.
//!
//! `kubectl` and API servers upgrade an HTTP/1.1 connection to SPDY/3.1 and open streams on it; the server opens
//! none. Their implementation (moby/spdystream) knows no flow control: it sends without regard to windows, never
//! sends `WINDOW_UPDATE` and ignores those it gets. Other peers do it as the draft says. So:
//!
//! - We always send `WINDOW_UPDATE`, and hold a bounded buffer per stream. When a peer sends more than fits, its
//!   connection is not read until there is room.
//! - We obey the peer's windows from the moment it showed that it has some: by a SETTINGS frame with an initial window
//!   or by a `WINDOW_UPDATE`. Until then only the connection itself holds us back.
//!
//! Protocol facts are from the SPDY protocol draft 3.1 and the sources of spdystream.

#[cfg(test)]
pub(crate) mod client;
mod frame;
mod headers;
mod session;
mod stream;

pub use headers::Headers;
pub use session::{Incoming, Limits, Session};
pub use stream::Stream;
