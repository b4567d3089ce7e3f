use serde_json::json;

use super::*;
use crate::kinds::{Context, FieldValidation, Format, Registry, create, decode, update};
use crate::status::Status;
use crate::table::{IncludeObject, render};

fn definition(schema: &Value) -> Value {
    json!({
        "metadata": {"name": "herds.example.dev"},
        "spec": {
            "group": "example.dev", "scope": "Namespaced",
            "names": {"plural": "herds", "singular": "herd", "kind": "Herd", "listKind": "HerdList"},
            "conversion": {"strategy": "None"},
            "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                "additionalPrinterColumns": [{"name": "Size", "type": "integer", "jsonPath": ".spec.size"}],
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": schema, "status": {"type": "object"}}}}}],
        },
    })
}

fn herds(schema: &Value) -> Resource {
    let now = "2026-01-01T12:00:00Z".parse().unwrap();
    let accepted = names_accepted(&Registry::builtin(), &definition(schema), now);
    resources(&accepted).remove(0)
}

fn context() -> Context<'static> {
    Context {
        uid: "u",
        suffix: "abcde",
        namespace: Some("ns"),
        name: Some("h"),
        user: "admin",
        ..Context::plain("test", "2026-01-01T12:00:00Z".parse().unwrap())
    }
}

fn made(schema: &Value, spec: &Value) -> Result<Value, Status> {
    let resource = herds(schema);
    let body =
        json!({"apiVersion": "example.dev/v1", "kind": "Herd", "metadata": {"name": "h"}, "spec": spec}).to_string();
    let decoded = decode(&resource, body.as_bytes(), Format::Json, FieldValidation::Ignore)?;
    create(&resource, decoded.value, &context())
}

fn schema() -> Value {
    json!({"type": "object", "required": ["name"], "properties": {
        "name": {"type": "string", "maxLength": 4, "pattern": "^[a-z]*$"},
        "size": {"type": "integer", "minimum": 1, "maximum": 9, "default": 3},
        "when": {"type": "string", "format": "date-time"},
        "many": {"type": "array", "maxItems": 2, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "required": ["k"], "properties": {"k": {"type": "string"}, "v": {"type": "integer", "default": 1}}}},
        "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        "map": {"type": "object", "additionalProperties": {"type": "integer"}},
        "port": {"x-kubernetes-int-or-string": true},
        "fixed": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "is fixed"}]},
    }})
}

#[test]
fn defaults_and_pruning() {
    let made = made(
        &schema(),
        &json!({"name": "a", "x": 1, "many": [{"k": "a", "y": 2}], "open": {"z": 1}, "port": "http", "map": {"a": 1}}),
    )
    .unwrap();
    assert_eq!(
        made["spec"],
        json!({"name": "a", "size": 3, "many": [{"k": "a", "v": 1}], "open": {"z": 1}, "port": "http", "map": {"a": 1}})
    );
}

#[test]
fn what_a_schema_refuses() {
    for (spec, wanted) in [
        (json!({"name": "abcde"}), "spec.name: Too long: may not be more than 4 bytes"),
        (json!({"name": "A"}), "spec.name: Invalid value: \"A\": spec.name in body should match '^[a-z]*$'"),
        (
            json!({"name": "a", "size": 10}),
            "spec.size: Invalid value: 10: spec.size in body should be less than or equal to 9",
        ),
        (
            json!({"name": "a", "when": "noon"}),
            "spec.when: Invalid value: \"noon\": spec.when in body must be of type date-time",
        ),
        (json!({"name": "a", "many": [{"k": "a"}, {"k": "a"}]}), "spec.many[1]: Duplicate value: {\"k\":\"a\"}"),
        (json!({"name": "a", "many": [{}]}), "spec.many[0].k: Required value"),
        (
            json!({"name": "a", "many": [{"k": "a"}, {"k": "b"}, {"k": "c"}]}),
            "spec.many: Too many: 3: must have at most 2 items",
        ),
        (
            json!({"name": "a", "map": {"a": "x"}}),
            "spec.map.a: Invalid value: \"string\": spec.map.a in body must be of type integer: \"string\"",
        ),
        (json!({"name": "a", "port": true}), "spec.port in body must be of type integer,string: \"boolean\""),
    ] {
        let refused = made(&schema(), &spec).unwrap_err();
        assert!(refused.message.contains(wanted), "{}\n  lacks {wanted}", refused.message);
    }
}

#[test]
fn rules_about_changes_see_the_old_object() {
    let resource = herds(&schema());
    let old = made(&schema(), &json!({"name": "a", "fixed": "x"})).unwrap();
    let mut new = old.clone();
    new["metadata"]["resourceVersion"] = "1".into();
    new["spec"]["fixed"] = "y".into();
    let mut stored = old;
    stored["metadata"]["resourceVersion"] = "1".into();
    let refused = update(&resource, None, &stored, new, &context()).unwrap_err();
    assert!(refused.message.contains("spec.fixed: Invalid value: is fixed"), "{}", refused.message);
}

#[test]
fn a_definition_must_be_structural() {
    let causes = |schema: Value| {
        let mut causes = Vec::new();
        validate_definition(&definition(&schema), &mut causes);
        causes.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(causes(schema()), Vec::<String>::new());
    let field = "spec.versions[0].schema.openAPIV3Schema.properties[spec]";
    assert_eq!(
        causes(json!({"type": "object", "properties": {"a": {}}})),
        [format!("{field}.properties[a].type: Required value: must not be empty for specified object fields")]
    );
    assert_eq!(causes(json!({"type": "array"})), [format!("{field}.items: Required value: must be specified")]);
    assert!(
        causes(json!({"type": "object", "x-kubernetes-validations": [{"rule": "self.("}]}))[0]
            .contains("compilation failed")
    );
    assert!(causes(json!({"type": "string", "pattern": "("}))[0].contains("must be a valid regular expression"));
}

#[test]
fn versions_are_ordered_as_kubernetes_orders_them() {
    let mut versions = ["v1beta1", "foo", "v2", "v1", "v1alpha2", "v10", "v1beta2"];
    versions.sort_by_key(|version| version_rank(version));
    assert_eq!(versions, ["v10", "v2", "v1", "v1beta2", "v1beta1", "v1alpha2", "foo"]);
}

#[test]
fn printer_columns_make_the_table() {
    let resource = herds(&schema());
    let object = made(&schema(), &json!({"name": "a", "size": 7})).unwrap();
    let now = "2026-01-01T12:05:00Z".parse().unwrap();
    let table = render(&resource, &[&object], IncludeObject::None, now, json!({}), true);
    assert_eq!(table["rows"][0]["cells"], json!(["h", 7]));
    assert_eq!(
        table["columnDefinitions"][1]["description"],
        "Custom resource definition column (in JSONPath format): .spec.size"
    );
}
