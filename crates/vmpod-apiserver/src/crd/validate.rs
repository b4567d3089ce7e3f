//! Checking a custom object against its schema, with the real server's words.

use std::collections::HashMap;

use kube_cel::ValidationError;
use regex::Regex;
use serde_json::{Map, Value};

use crate::kinds::{items, text};
use crate::status::{Cause, CauseReason, quoted};

/// The JSON type of a value as schemas name it.
fn word(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() && number.as_f64().is_some_and(|float| float.fract() != 0.0) => {
            "number"
        }
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The Go type of a decoded value.
pub(super) fn go_word(value: &Value) -> &'static str {
    match value {
        Value::Null => "<nil>",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// Everything about a value that its schema doesn't allow.
pub(super) fn schema(
    schema: &Value,
    value: &Value,
    path: &str,
    root: bool,
    patterns: &HashMap<String, Regex>,
    out: &mut Vec<Cause>,
) {
    let field = if path.is_empty() { "<nil>" } else { path };
    if value.is_null() && schema.get("nullable") == Some(&Value::Bool(true)) {
        return;
    }
    if let Some(expected) = wrong_type(schema, value) {
        let found = word(value);
        out.push(Cause::type_invalid(
            field,
            found,
            &format!("{path} in body must be of type {expected}: {}", quoted(found)),
        ));
        return;
    }
    combined(schema, value, path, patterns, out);
    match value {
        Value::String(text) => string(schema, text, path, patterns, out),
        Value::Number(_) => number(schema, value, path, out),
        Value::Array(list) => {
            if let Some(max) = schema.get("maxItems").and_then(Value::as_u64).and_then(|max| usize::try_from(max).ok())
                && list.len() > max
            {
                out.push(Cause::too_many(field, list.len(), max));
            }
            if let Some(min) = schema.get("minItems").and_then(Value::as_u64)
                && (list.len() as u64) < min
            {
                let why = format!("{path} in body should have at least {min} items");
                out.push(Cause::invalid(field, &list.len().into(), &why));
            }
            if let Some(inner) = schema.get("items").filter(|inner| inner.is_object()) {
                for (index, one) in list.iter().enumerate() {
                    self::schema(inner, one, &format!("{path}[{index}]"), false, patterns, out);
                }
            }
        }
        Value::Object(entries) => object(schema, entries, path, root, patterns, out),
        _ => {}
    }
    let allowed = items(schema, &["enum"]);
    if !allowed.is_empty() && !allowed.contains(value) {
        let words: Vec<String> =
            allowed.iter().map(|one| one.as_str().map_or_else(|| one.to_string(), str::to_owned)).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        out.push(Cause::not_supported(field, value, &words));
    }
}

fn wrong_type(schema: &Value, value: &Value) -> Option<String> {
    if schema.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
        return (!matches!(word(value), "integer" | "string")).then(|| "integer,string".to_owned());
    }
    let expected = text(schema, &["type"]);
    let found = word(value);
    let fits = expected.is_empty() || expected == found || (expected == "number" && found == "integer");
    (!fits).then(|| expected.to_owned())
}

fn combined(schema: &Value, value: &Value, path: &str, patterns: &HashMap<String, Regex>, out: &mut Vec<Cause>) {
    let passes = |inner: &Value| {
        let mut found = Vec::new();
        self::schema(inner, value, path, false, patterns, &mut found);
        found
    };
    let field = if path.is_empty() { "<nil>" } else { path };
    let mut refuse = |what: &str| out.push(Cause::invalid(field, &"".into(), &format!("{} {what}", quoted(path))));
    let any = items(schema, &["anyOf"]);
    if !any.is_empty() && !any.iter().any(|inner| passes(inner).is_empty()) {
        refuse("must validate at least one schema (anyOf)");
    }
    let one = items(schema, &["oneOf"]);
    if !one.is_empty() {
        match one.iter().filter(|inner| passes(inner).is_empty()).count() {
            1 => {}
            0 => refuse("must validate one and only one schema (oneOf). Found none valid"),
            more => refuse(&format!("must validate one and only one schema (oneOf). Found {more} valid alternatives")),
        }
    }
    if schema.get("not").is_some_and(|inner| passes(inner).is_empty()) {
        refuse("must not validate the schema (not)");
    }
    let mut failed = false;
    for inner in items(schema, &["allOf"]) {
        let found = passes(inner);
        failed |= !found.is_empty();
        out.extend(found);
    }
    if failed {
        out.push(Cause::invalid(field, &"".into(), &format!("{} must validate all the schemas (allOf)", quoted(path))));
    }
}

fn string(schema: &Value, value: &str, path: &str, patterns: &HashMap<String, Regex>, out: &mut Vec<Cause>) {
    let length = value.chars().count();
    let number = |key: &str| schema.get(key).and_then(Value::as_u64).and_then(|limit| usize::try_from(limit).ok());
    if let Some(max) = number("maxLength").filter(|&max| length > max) {
        out.push(Cause::too_long(path, max));
    }
    if let Some(min) = number("minLength").filter(|&min| length < min) {
        let why = format!("{path} in body should be at least {min} chars long");
        out.push(Cause::invalid(path, &value.into(), &why));
    }
    let pattern = text(schema, &["pattern"]);
    if patterns.get(pattern).is_some_and(|compiled| !compiled.is_match(value)) {
        out.push(Cause::invalid(path, &value.into(), &format!("{path} in body should match '{pattern}'")));
    }
    let format = text(schema, &["format"]);
    if !fits_format(format, value) {
        out.push(Cause::invalid(
            path,
            &value.into(),
            &format!("{path} in body must be of type {format}: {}", quoted(value)),
        ));
    }
}

fn fits_format(format: &str, value: &str) -> bool {
    use base64::Engine as _;
    match format {
        "date-time" => value.len() >= 20 && value.parse::<jiff::Timestamp>().is_ok(),
        "date" => value.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => value.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => value.parse::<std::net::Ipv6Addr>().is_ok(),
        "uuid" => uuid::Uuid::parse_str(value).is_ok(),
        "byte" => base64::engine::general_purpose::STANDARD.decode(value).is_ok(),
        "cidr" => value.split_once('/').is_some_and(|(address, bits)| {
            address.parse::<std::net::IpAddr>().is_ok_and(|address| {
                bits.parse::<u8>().is_ok_and(|bits| bits <= if address.is_ipv4() { 32 } else { 128 })
            })
        }),
        _ => true,
    }
}

fn number(schema: &Value, value: &Value, path: &str, out: &mut Vec<Cause>) {
    let Some(found) = value.as_f64() else { return };
    let on = |key: &str| schema.get(key) == Some(&Value::Bool(true));
    let mut refuse = |why: String| out.push(Cause::invalid(path, value, &format!("{path} in body should be {why}")));
    if let Some(max) = schema.get("maximum") {
        let limit = max.as_f64().unwrap_or(f64::INFINITY);
        if found > limit || (on("exclusiveMaximum") && found >= limit) {
            refuse(format!("less than {}{max}", if on("exclusiveMaximum") { "" } else { "or equal to " }));
        }
    }
    if let Some(min) = schema.get("minimum") {
        let limit = min.as_f64().unwrap_or(f64::NEG_INFINITY);
        if found < limit || (on("exclusiveMinimum") && found <= limit) {
            refuse(format!("greater than {}{min}", if on("exclusiveMinimum") { "" } else { "or equal to " }));
        }
    }
    if let Some(step) = schema.get("multipleOf") {
        let ratio = found / step.as_f64().unwrap_or(1.0);
        if (ratio - ratio.round()).abs() > 1e-9 {
            refuse(format!("a multiple of {step}"));
        }
    }
}

fn object(
    schema: &Value,
    entries: &Map<String, Value>,
    path: &str,
    root: bool,
    patterns: &HashMap<String, Regex>,
    out: &mut Vec<Cause>,
) {
    let field = if path.is_empty() { "<nil>" } else { path };
    let number = |key: &str| schema.get(key).and_then(Value::as_u64).and_then(|limit| usize::try_from(limit).ok());
    if let Some(max) = number("maxProperties").filter(|&max| entries.len() > max) {
        out.push(Cause::too_many(field, entries.len(), max));
    }
    if let Some(min) = number("minProperties").filter(|&min| entries.len() < min) {
        let why = format!("{path} in body should have at least {min} properties");
        out.push(Cause::invalid(field, &entries.len().into(), &why));
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    let additional = schema.get("additionalProperties").filter(|inner| inner.is_object());
    for (name, one) in entries {
        if root && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
            continue;
        }
        if let Some(inner) = properties.and_then(|all| all.get(name)).or(additional) {
            self::schema(inner, one, &join(path, name), false, patterns, out);
        }
    }
    for name in items(schema, &["required"]).iter().filter_map(Value::as_str) {
        if !entries.contains_key(name) {
            out.push(Cause::required(join(path, name), ""));
        }
    }
}

/// Sets hold each value once, keyed lists each key.
pub(super) fn lists(schema: &Value, value: &Value, path: &str, out: &mut Vec<Cause>) {
    match value {
        Value::Array(list) => {
            let kind = text(schema, &["x-kubernetes-list-type"]);
            let keys: Vec<&str> =
                items(schema, &["x-kubernetes-list-map-keys"]).iter().filter_map(Value::as_str).collect();
            let mut seen: Vec<Value> = Vec::new();
            for (index, one) in list.iter().enumerate() {
                let identity = match kind {
                    "set" => one.clone(),
                    "map" => Value::Object(
                        keys.iter().filter_map(|key| Some(((*key).to_owned(), one.get(key)?.clone()))).collect(),
                    ),
                    _ => continue,
                };
                if seen.contains(&identity) {
                    out.push(Cause::duplicate(format!("{path}[{index}]"), &identity));
                } else {
                    seen.push(identity);
                }
            }
            if let Some(inner) = schema.get("items").filter(|inner| inner.is_object()) {
                for (index, one) in list.iter().enumerate() {
                    lists(inner, one, &format!("{path}[{index}]"), out);
                }
            }
        }
        Value::Object(entries) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            let additional = schema.get("additionalProperties").filter(|inner| inner.is_object());
            for (name, one) in entries {
                if let Some(inner) = properties.and_then(|all| all.get(name)).or(additional) {
                    lists(inner, one, &join(path, name), out);
                }
            }
        }
        _ => {}
    }
}

/// Whether an object is so wrong that its rules in CEL can't be evaluated.
pub(super) fn blocks_rules(cause: &Cause) -> bool {
    matches!(
        cause.reason,
        CauseReason::NotSupported
            | CauseReason::Required
            | CauseReason::TooLong
            | CauseReason::TooMany
            | CauseReason::TypeInvalid
    )
}

/// A rule in CEL that an object breaks.
pub(super) fn rule_cause(error: &ValidationError) -> Cause {
    let field = if error.field_path.is_empty() { "<nil>" } else { &error.field_path };
    match error.reason.as_deref() {
        Some("FieldValueRequired") => Cause::required(field, &error.message),
        Some("FieldValueForbidden") => Cause::forbidden(field, &error.message),
        _ => Cause::invalid_message(field, &error.message),
    }
}
