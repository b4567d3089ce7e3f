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
