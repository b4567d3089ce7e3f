//! Objects on the wire: lists and watch events are put together from stored bytes.

use bytes::{BufMut, Bytes, BytesMut};

/// The members of a top-level JSON object, as ranges of `name` (without quotes) and whole member.
/// Stored bytes are compact JSON that this server wrote, so little can be wrong with them;
/// what is unexpected ends the iteration.
struct Members<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Members<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        Self { bytes, at: usize::from(bytes.first() == Some(&b'{')) }
    }

    /// The end of the string that begins (with its quote) at `from`.
    fn string_end(&self, from: usize) -> Option<usize> {
        let mut at = from + 1;
        loop {
            match self.bytes.get(at)? {
                b'"' => return Some(at + 1),
                b'\\' => at += 2,
                _ => at += 1,
            }
        }
    }
}

impl<'a> Iterator for Members<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.at;
        if self.bytes.get(start)? != &b'"' {
            return None;
        }
        let name_end = self.string_end(start)?;
        let mut at = name_end;
        let mut depth = 0_usize;
        loop {
            match self.bytes.get(at)? {
                b'"' => {
                    at = self.string_end(at)?;
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' | b',' if depth == 0 => break,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            at += 1;
        }
        let member = self.bytes.get(start..at)?;
        let name = self.bytes.get(start + 1..name_end - 1)?;
        self.at = at + 1;
        Some((name, member))
    }
}

/// Appends an object without its kind and apiVersion, as items of a typed list are.
pub(crate) fn put_item(into: &mut BytesMut, bytes: &[u8]) {
    into.put_u8(b'{');
    let mut first = true;
    for (name, member) in Members::of(bytes) {
        if matches!(name, b"kind" | b"apiVersion") {
            continue;
        }
        if !first {
            into.put_u8(b',');
        }
        first = false;
        into.extend_from_slice(member);
    }
    into.put_u8(b'}');
}

/// One line of a watch.
pub(crate) fn event_line(kind: &str, object: &[u8]) -> Bytes {
    let mut line = BytesMut::with_capacity(object.len() + kind.len() + 24);
    line.extend_from_slice(b"{\"type\":\"");
    line.extend_from_slice(kind.as_bytes());
    line.extend_from_slice(b"\",\"object\":");
    line.extend_from_slice(object);
    line.extend_from_slice(b"}\n");
    line.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from)
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(".*", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn an_item_is_the_object_without_its_type(data in any_json(), other in any_json()) {
            let whole = json!({ "apiVersion": "v1", "data": data, "kind": "X", "metadata": other });
            let mut out = BytesMut::new();
            put_item(&mut out, &serde_json::to_vec(&whole).unwrap());
            let found: Value = serde_json::from_slice(&out).unwrap();
            prop_assert_eq!(found, json!({ "data": whole["data"], "metadata": whole["metadata"] }));
        }
    }

    #[test]
    fn an_event_is_one_line() {
        assert_eq!(&event_line("ADDED", b"{}")[..], b"{\"type\":\"ADDED\",\"object\":{}}\n");
    }
}
