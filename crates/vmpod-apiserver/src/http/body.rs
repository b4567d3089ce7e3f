//! Request bodies, bounded.

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::Request;
use http_body_util::BodyExt as _;
use std::time::Duration;

use super::BODY_LIMIT;
use crate::status::Status;

/// How long a body may take to arrive.
const PATIENCE: Duration = Duration::from_mins(1);

/// Reads the whole body, or refuses it when it is too large or too slow.
pub(super) async fn read(request: Request<Body>) -> Result<Bytes, Status> {
    let too_large = || Status::too_large(format!("Request entity too large: limit is {BODY_LIMIT}"));
    let mut body = request.into_body();
    let collect = async {
        let mut all = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame
                .map_err(|error| Status::bad_request(format!("the body of the request can't be read: {error}")))?;
            if let Some(data) = frame.data_ref() {
                if all.len() + data.len() > BODY_LIMIT {
                    return Err(too_large());
                }
                all.extend_from_slice(data);
            }
        }
        Ok(all.freeze())
    };
    match tokio::time::timeout(PATIENCE, collect).await {
        Ok(result) => result,
        Err(_) => Err(Status::timeout("the body of the request didn't arrive in time")),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// A body whose two parts come so long after each other.
    fn slow(gap: Duration) -> Request<Body> {
        let parts = futures::stream::unfold(0, move |part| async move {
            if part == 1 {
                tokio::time::sleep(gap).await;
            }
            (part < 2).then_some((Ok::<_, Infallible>(Bytes::from_static(b"x")), part + 1))
        });
        Request::new(Body::from_stream(parts))
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_a_minute() {
        assert_eq!(read(slow(Duration::from_secs(59))).await.unwrap(), "xx");
        let late = read(slow(Duration::from_secs(61))).await.unwrap_err();
        assert_eq!((late.code, late.message.as_str()), (504, "the body of the request didn't arrive in time"));
    }
}
