//! What a request's path names.

use percent_encoding::percent_decode_str;

/// A path below `/api/v1` or `/apis/GROUP/VERSION`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) namespace: Option<String>,
    pub(crate) plural: String,
    pub(crate) name: Option<String>,
    pub(crate) subresource: Option<String>,
    /// What follows the subresource (a proxy's path).
    pub(crate) rest: String,
}

/// What a path is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Objects.
    Resource(Target),
    /// Anything else: discovery, health, `OpenAPI`.
    Other,
}

/// Reads a path. `None` when a segment isn't UTF-8.
pub(crate) fn parse(path: &str) -> Option<Route> {
    let segments: Vec<String> = path
        .split('/')
        .filter(|segment| !segment.is_empty())
        .map(|segment| percent_decode_str(segment).decode_utf8().ok().map(std::borrow::Cow::into_owned))
        .collect::<Option<_>>()?;
    let text: Vec<&str> = segments.iter().map(String::as_str).collect();
    let (group, version, rest) = match text.as_slice() {
        ["api", version, rest @ ..] if !rest.is_empty() => ("", *version, rest),
        ["apis", group, version, rest @ ..] if !rest.is_empty() => (*group, *version, rest),
        _ => return Some(Route::Other),
    };
    let mut target = Target { group: group.into(), version: version.into(), ..Target::default() };
    let rest = match rest {
        // A namespace itself, and its subresources.
        ["namespaces"] | ["namespaces", _] | ["namespaces", _, "status" | "finalize"] => rest,
        ["namespaces", namespace, rest @ ..] => {
            target.namespace = Some((*namespace).into());
            rest
        }
        _ => rest,
    };
    let mut rest = rest.iter().copied();
    target.plural = rest.next()?.into();
    target.name = rest.next().map(Into::into);
    target.subresource = rest.next().map(Into::into);
    target.rest = rest.collect::<Vec<_>>().join("/");
    Some(Route::Resource(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(path: &str) -> Target {
        match parse(path) {
            Some(Route::Resource(target)) => target,
            other => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn reads_the_shapes_of_paths() {
        let pod = resource("/api/v1/namespaces/t/pods/p1/log");
        assert_eq!((pod.group.as_str(), pod.version.as_str(), pod.namespace.as_deref()), ("", "v1", Some("t")));
        assert_eq!(
            (pod.plural.as_str(), pod.name.as_deref(), pod.subresource.as_deref()),
            ("pods", Some("p1"), Some("log"))
        );
        let namespace = resource("/api/v1/namespaces/t/finalize");
        assert_eq!((namespace.plural.as_str(), namespace.name.as_deref()), ("namespaces", Some("t")));
        assert_eq!(namespace.namespace, None);
        let lease = resource("/apis/coordination.k8s.io/v1/leases");
        assert_eq!((lease.group.as_str(), lease.name), ("coordination.k8s.io", None));
        assert_eq!(resource("/api/v1/nodes/n1/proxy/a/b").rest, "a/b");
        assert_eq!(resource("/api/v1/nodes/n%2F1").name.as_deref(), Some("n/1"));
        for path in ["/", "", "/api", "/api/v1", "/apis", "/apis/g", "/apis/g/v1/", "/healthz"] {
            assert_eq!(parse(path), Some(Route::Other), "{path}");
        }
        assert_eq!(parse("/api/v1/%ff"), None);
    }
}
