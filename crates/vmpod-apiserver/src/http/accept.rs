//! Content negotiation: the API speaks JSON, as objects, tables or metadata only.

use http::{HeaderMap, header};

use crate::status::Status;

/// The shape of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The object itself.
    Object,
    /// A `meta.k8s.io/v1` Table.
    Table,
    /// Metadata only.
    Partial,
}

/// The media types offered, as an error tells them.
const OFFERED: [&str; 1] = ["application/json"];

/// Finds the first acceptable shape. A missing header accepts anything.
pub(crate) fn negotiate(headers: &HeaderMap) -> Result<Shape, Status> {
    let mut asked = false;
    for value in headers.get_all(header::ACCEPT) {
        let Ok(value) = value.to_str() else { continue };
        for clause in value.split(',') {
            asked = true;
            if let Some(shape) = one(clause) {
                return Ok(shape);
            }
        }
    }
    if asked { Err(Status::not_acceptable(&OFFERED)) } else { Ok(Shape::Object) }
}

fn one(clause: &str) -> Option<Shape> {
    let mut parts = clause.split(';').map(str::trim);
    if !matches!(parts.next()?, "application/json" | "application/*" | "*/*") {
        return None;
    }
    let (mut kind, mut group, mut version) = (None, "", "");
    for part in parts {
        match part.split_once('=') {
            Some(("as", value)) => kind = Some(value),
            Some(("g", value)) => group = value,
            Some(("v", value)) => version = value,
            // A stream of JSON frames is what a watch is anyway.
            _ => {}
        }
    }
    match kind {
        None => Some(Shape::Object),
        Some(_) if group != "meta.k8s.io" || !matches!(version, "v1" | "v1beta1") => None,
        Some("Table") => Some(Shape::Table),
        Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Some(Shape::Partial),
        Some(_) => None,
    }
}

/// Whether the client asked for aggregated discovery, and in which version.
pub(crate) fn aggregated(headers: &HeaderMap) -> Option<&'static str> {
    for value in headers.get_all(header::ACCEPT) {
        let Ok(value) = value.to_str() else { continue };
        for clause in value.split(',') {
            let parts: Vec<&str> = clause.split(';').map(str::trim).collect();
            if parts.first() != Some(&"application/json") {
                continue;
            }
            if parts.contains(&"as=APIGroupDiscoveryList") && parts.contains(&"g=apidiscovery.k8s.io") {
                if parts.contains(&"v=v2") {
                    return Some("v2");
                }
                if parts.contains(&"v=v2beta1") {
                    return Some("v2beta1");
                }
            } else if parts.len() == 1 {
                return None;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::ACCEPT, value.parse().unwrap())])
    }

    #[test]
    fn takes_the_first_shape_it_can_give() {
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        assert_eq!(negotiate(&accept(table)).unwrap(), Shape::Table);
        assert_eq!(negotiate(&accept("application/vnd.kubernetes.protobuf, */*")).unwrap(), Shape::Object);
        assert_eq!(
            negotiate(&accept("application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1")).unwrap(),
            Shape::Partial
        );
        assert_eq!(
            negotiate(&accept("application/json;as=Nonsense;g=meta.k8s.io;v=v1,application/json")).unwrap(),
            Shape::Object
        );
        assert_eq!(negotiate(&accept("application/vnd.kubernetes.protobuf")).unwrap_err().code, 406);
        assert_eq!(negotiate(&HeaderMap::new()).unwrap(), Shape::Object);
    }

    #[test]
    fn notices_aggregated_discovery() {
        let v2 = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(aggregated(&accept(v2)), Some("v2"));
        assert_eq!(aggregated(&accept("application/json")), None);
    }
}
