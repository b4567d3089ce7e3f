//! Times as the API writes them.

use jiff::Timestamp;

/// `metav1.Time`: seconds, UTC.
pub(crate) fn seconds(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_written_in_utc() {
        let at: Timestamp = "2026-01-02T03:04:05.006007Z".parse().unwrap();
        assert_eq!(seconds(at), "2026-01-02T03:04:05Z");
    }
}
