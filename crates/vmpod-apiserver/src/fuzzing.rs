//! What the fuzz targets in `fuzz/` feed: the parsers that read what strangers send.
//!
//! Compiled for `--cfg fuzzing` and for tests, which run the kept corpus and its mutations through the same functions.

use serde_json::{Value, json};

use crate::http::protobuf_to_json;
use crate::kinds::{self, Context, FieldValidation, Format, Registry};
use crate::patch::{self, PatchKind};
use crate::selector::{FieldSelector, LabelSelector};

fn pod() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "p", "namespace": "t", "uid": "u", "resourceVersion": "7", "labels": { "a": "b" },
            "managedFields": [{
                "manager": "m", "operation": "Apply", "apiVersion": "v1", "fieldsType": "FieldsV1",
                "fieldsV1": { "f:spec": { "f:containers": { "k:{\"name\":\"c\"}": { ".": {}, "f:image": {} } } } },
            }],
        },
        "spec": {
            "containers": [
                { "name": "c", "image": "i", "ports": [{ "containerPort": 80, "protocol": "TCP" }], "env": [{ "name": "E", "value": "1" }] },
                { "name": "d", "image": "i" },
            ],
            "tolerations": [{ "key": "k", "operator": "Exists" }],
        },
        "status": { "phase": "Pending", "conditions": [{ "type": "Ready", "status": "False" }] },
    })
}

/// A patch of a pod: the first byte says which kind, the rest is the body.
///
/// # Panics
/// When a bad patch is answered with something else than a client error.
pub fn patch(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else { return };
    let kind = match choice % 4 {
        0 => PatchKind::Json,
        1 => PatchKind::Merge,
        2 => PatchKind::Strategic,
        _ => PatchKind::Apply,
    };
    let Some(pods) = Registry::builtin().resource("", "v1", "pods") else { return };
    let context = Context {
        uid: "u",
        suffix: "xxxxx",
        namespace: Some("t"),
        name: Some("p"),
        apply: kind == PatchKind::Apply,
        patch: true,
        ..Context::plain("fuzz", jiff::Timestamp::UNIX_EPOCH)
    };
    let old = pod();
    let force = choice & 4 != 0;
    match patch::apply(kind, &pods, None, Some(&old), body, FieldValidation::Strict, force, &context) {
        Ok(patched) => {
            // What comes of it is judged like any object, and never by a panic.
            let context = Context { apply: patched.apply, ..context };
            drop(kinds::update(&pods, None, &old, patched.value, &context));
        }
        Err(status) => {
            // The real server answers an apply of unknown fields like this.
            let known = status.code == 500 && status.message.starts_with("failed to create typed patch object");
            assert!(known || (400..500).contains(&status.code), "{}: {}", status.code, status.message);
        }
    }
}

/// A label selector or, when the first byte is odd, a field selector.
pub fn selector(data: &[u8]) {
    let Some((choice, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let object = pod();
    if choice % 2 == 0 {
        if let Ok(selector) = LabelSelector::parse(text) {
            std::hint::black_box(selector.matches(&object));
        }
        if let Ok(value) = serde_json::from_str::<Value>(text) {
            std::hint::black_box(LabelSelector::of(&value).matches(&object));
        }
    } else if let Some(pods) = Registry::builtin().resource("", "v1", "pods")
        && let Ok(selector) = FieldSelector::parse(&pods, text)
    {
        std::hint::black_box(selector.matches(&object));
    }
}

/// The body of a create: JSON, YAML or, by the first byte, protocol buffers.
///
/// # Panics
/// When a bad body is answered with something else than a client error.
pub fn body(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else { return };
    let Some(pods) = Registry::builtin().resource("", "v1", "pods") else { return };
    let validation = if choice & 4 == 0 { FieldValidation::Strict } else { FieldValidation::Warn };
    let decoded = match choice % 3 {
        0 => kinds::decode(&pods, body, Format::Json, validation),
        1 => kinds::decode(&pods, body, Format::Yaml, validation),
        _ => match protobuf_to_json(body) {
            Ok(json) => kinds::decode(&pods, json.to_string().as_bytes(), Format::Json, validation),
            Err(status) => Err(status),
        },
    };
    if let Err(status) = decoded {
        assert!((400..500).contains(&status.code), "{}: {}", status.code, status.message);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    type Target = fn(&[u8]);
    const TARGETS: [(&str, Target); 3] = [("patch", patch), ("selector", selector), ("body", body)];

    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
        let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.iter().map(|file| std::fs::read(file).unwrap()).collect()
    }

    #[test]
    fn the_kept_corpus_breaks_nothing() {
        for (name, target) in TARGETS {
            let inputs = corpus(name);
            assert!(!inputs.is_empty(), "no corpus for {name}");
            for input in inputs {
                target(&input);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        /// For where there is no nightly compiler: the corpus with some bytes changed, cut out or doubled.
        #[test]
        fn mutations_of_the_corpus_break_nothing(
            pick in any::<prop::sample::Index>(),
            edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..4_u8, any::<u8>()), 1..8),
        ) {
            for (name, target) in TARGETS {
                let inputs = corpus(name);
                let mut input = inputs[pick.index(inputs.len())].clone();
                for (place, edit, byte) in &edits {
                    if input.is_empty() {
                        break;
                    }
                    let at = place.index(input.len());
                    match edit {
                        0 => input[at] = *byte,
                        1 => drop(input.remove(at)),
                        2 => input.insert(at, *byte),
                        _ => input.extend_from_within(at..),
                    }
                }
                target(&input);
            }
        }
    }
}
