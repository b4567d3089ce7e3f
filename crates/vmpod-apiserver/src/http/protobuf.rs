//! Protocol buffers, as far as needed: bodies that kubectl and other Go clients send this way for
//! built-in kinds, without asking first, become JSON. Answers are always JSON, which they take.
//!
//! A body is `k8s\0` and a `runtime.Unknown` that holds the API version, the kind and the message.

use std::collections::HashMap;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::status::Status;

/// The media type.
pub(super) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

const MAGIC: &[u8] = b"k8s\0";
/// Messages don't nest deeper than this.
const DEPTH: usize = 40;

/// How a field is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    One,
    List,
    Map,
}

#[derive(Clone, Copy, Debug)]
struct Field {
    /// The name in JSON; `-` when the field's own fields appear in its place.
    name: &'static str,
    shape: Shape,
    ty: &'static str,
}

type Message = HashMap<u64, Field>;

static MESSAGES: LazyLock<HashMap<&'static str, Message>> = LazyLock::new(|| {
    let mut messages: HashMap<&'static str, Message> = HashMap::new();
    let mut current = "";
    for line in include_str!("protobuf/fields.txt").lines().filter(|line| !line.starts_with('#')) {
        let Some(field) = line.strip_prefix("  ") else {
            current = line;
            messages.insert(line, Message::new());
            continue;
        };
        let mut parts = field.split(' ');
        let (Some(number), Some(name), Some(ty)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (shape, ty) = match (ty.strip_prefix("[]"), ty.strip_prefix("{}")) {
            (Some(ty), _) => (Shape::List, ty),
            (_, Some(ty)) => (Shape::Map, ty),
            _ => (Shape::One, ty),
        };
        if let (Ok(number), Some(message)) = (number.parse(), messages.get_mut(current)) {
            message.insert(number, Field { name, shape, ty });
        }
    }
    messages
});

/// Groups whose messages have another name than the group's first word.
fn message_name(api_version: &str, kind: &str) -> String {
    let group = match api_version.split_once('/') {
        None => "core",
        Some((group, _)) => group.split('.').next().unwrap_or_default(),
    };
    // Options belong to every group.
    if kind == "DeleteOptions" { "meta.DeleteOptions".into() } else { format!("{group}.{kind}") }
}

fn malformed(why: &str) -> Status {
    Status::bad_request(format!("the body of the request is not a valid protocol buffer: {why}"))
}

/// One field on the wire.
enum Wire<'a> {
    Number(u64),
    Fixed(u64),
    Bytes(&'a [u8]),
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (first, rest) = self.bytes.split_first()?;
            self.bytes = rest;
            value |= u64::from(first & 0x7f).checked_shl(shift)?;
            if first & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(length)?;
        self.bytes = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Wire<'a>)> {
        let tag = self.varint()?;
        let little = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |value, byte| (value << 8) | u64::from(*byte));
        let wire = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => Wire::Fixed(little(self.take(8)?)),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Fixed(little(self.take(4)?)),
            _ => return None,
        };
        Some((tag >> 3, wire))
    }

    /// All fields; `None` when the bytes are cut short.
    fn fields(mut self) -> Option<Vec<(u64, Wire<'a>)>> {
        let mut fields = Vec::new();
        while !self.bytes.is_empty() {
            fields.push(self.field()?);
        }
        Some(fields)
    }
}

fn fields(bytes: &[u8]) -> Result<Vec<(u64, Wire<'_>)>, Status> {
    Reader { bytes }.fields().ok_or_else(|| malformed("it is cut short"))
}

fn text(bytes: &[u8]) -> Result<&str, Status> {
    std::str::from_utf8(bytes).map_err(|_| malformed("a string is not UTF-8"))
}

/// A signed number as protocol buffers write it: two's complement.
fn signed(number: u64) -> i64 {
    i64::from_ne_bytes(number.to_ne_bytes())
}

fn bytes_of<'a>(wire: &Wire<'a>) -> Result<&'a [u8], Status> {
    match wire {
        Wire::Bytes(bytes) => Ok(bytes),
        _ => Err(malformed("a field has another type than it should")),
    }
}

fn number_of(wire: &Wire<'_>) -> Result<u64, Status> {
    match wire {
        Wire::Number(number) | Wire::Fixed(number) => Ok(*number),
        Wire::Bytes(_) => Err(malformed("a field has another type than it should")),
    }
}

/// The value of one field.
fn value(ty: &str, wire: &Wire<'_>, depth: usize) -> Result<Value, Status> {
    Ok(match ty {
        "string" => text(bytes_of(wire)?)?.into(),
        "bytes" => STANDARD.encode(bytes_of(wire)?).into(),
        "bool" => (number_of(wire)? != 0).into(),
        "int32" | "int64" => signed(number_of(wire)?).into(),
        "uint32" | "uint64" => number_of(wire)?.into(),
        "double" => f64::from_bits(number_of(wire)?).into(),
        "json" => embedded(bytes_of(wire)?)?,
        "quantity" => first_text(bytes_of(wire)?)?.into(),
        "strings" => {
            let items = fields(bytes_of(wire)?)?;
            items
                .iter()
                .map(|(_, item)| Ok(Value::from(text(bytes_of(item)?)?)))
                .collect::<Result<Vec<_>, Status>>()?
                .into()
        }
        "time" | "microtime" => time(ty, bytes_of(wire)?)?,
        "intorstring" => int_or_string(bytes_of(wire)?)?,
        message => Value::Object(decode(message, bytes_of(wire)?, depth + 1)?),
    })
}

/// JSON inside a message: its first field.
fn embedded(bytes: &[u8]) -> Result<Value, Status> {
    for (number, wire) in fields(bytes)? {
        if number == 1 {
            let raw = bytes_of(&wire)?;
            if raw.is_empty() {
                break;
            }
            return serde_json::from_slice(raw).map_err(|error| malformed(&error.to_string()));
        }
    }
    Ok(Value::Null)
}

fn first_text(bytes: &[u8]) -> Result<String, Status> {
    for (number, wire) in fields(bytes)? {
        if number == 1 {
            return Ok(text(bytes_of(&wire)?)?.to_owned());
        }
    }
    Ok("0".into())
}

fn time(ty: &str, bytes: &[u8]) -> Result<Value, Status> {
    let (mut seconds, mut nanos) = (0, 0);
    for (number, wire) in fields(bytes)? {
        match number {
            1 => seconds = signed(number_of(&wire)?),
            2 => nanos = signed(number_of(&wire)?),
            _ => {}
        }
    }
    // Go's zero time is in the year 1.
    if (seconds, nanos) == (0, 0) || seconds < -62_000_000_000 {
        return Ok(Value::Null);
    }
    let nanos = i32::try_from(nanos).map_err(|_| malformed("a time is out of range"))?;
    let at = Timestamp::new(seconds, nanos).map_err(|_| malformed("a time is out of range"))?;
    Ok(if ty == "time" { crate::time::seconds(at) } else { at.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string() }.into())
}

fn int_or_string(bytes: &[u8]) -> Result<Value, Status> {
    let (mut is_text, mut number_value, mut text_value) = (false, 0, String::new());
    for (number, wire) in fields(bytes)? {
        match number {
            1 => is_text = number_of(&wire)? == 1,
            2 => number_value = signed(number_of(&wire)?),
            3 => text(bytes_of(&wire)?)?.clone_into(&mut text_value),
            _ => {}
        }
    }
    Ok(if is_text { text_value.into() } else { number_value.into() })
}

fn decode(message: &str, bytes: &[u8], depth: usize) -> Result<Map<String, Value>, Status> {
    if depth > DEPTH {
        return Err(malformed("it is nested too deeply"));
    }
    let known = MESSAGES.get(message).ok_or_else(|| unsupported(message))?;
    let mut object = Map::new();
    for (number, wire) in fields(bytes)? {
        // A field of a newer version.
        let Some(field) = known.get(&number) else { continue };
        if field.name == "-" {
            object.extend(decode(field.ty, bytes_of(&wire)?, depth + 1)?);
            continue;
        }
        match field.shape {
            Shape::One => {
                object.insert(field.name.into(), value(field.ty, &wire, depth)?);
            }
            Shape::List => {
                let item = value(field.ty, &wire, depth)?;
                match object.entry(field.name).or_insert_with(|| Value::Array(Vec::new())) {
                    Value::Array(list) => list.push(item),
                    other => *other = item,
                }
            }
            Shape::Map => {
                let (mut key, mut item) = (String::new(), None);
                for (number, wire) in fields(bytes_of(&wire)?)? {
                    match number {
                        1 => text(bytes_of(&wire)?)?.clone_into(&mut key),
                        2 => item = Some(value(field.ty, &wire, depth)?),
                        _ => {}
                    }
                }
                let item = match item {
                    Some(item) => item,
                    None if matches!(field.ty, "string" | "bytes") => "".into(),
                    None => value(field.ty, &Wire::Bytes(&[]), depth)?,
                };
                if let Value::Object(map) = object.entry(field.name).or_insert_with(|| Value::Object(Map::new())) {
                    map.insert(key, item);
                }
            }
        }
    }
    Ok(object)
}

fn unsupported(message: &str) -> Status {
    let mut status = Status::unsupported_media_type(&["application/json", "application/yaml"]);
    status.message = format!("{} (as a protocol buffer, {message} is unknown)", status.message);
    status
}

/// A body as JSON.
pub(crate) fn to_json(bytes: &[u8]) -> Result<Value, Status> {
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| malformed("it doesn't begin with k8s"))?;
    let (mut api_version, mut kind, mut raw): (String, String, &[u8]) = (String::new(), String::new(), &[]);
    for (number, wire) in fields(rest)? {
        match number {
            1 => {
                for (number, wire) in fields(bytes_of(&wire)?)? {
                    match number {
                        1 => text(bytes_of(&wire)?)?.clone_into(&mut api_version),
                        2 => text(bytes_of(&wire)?)?.clone_into(&mut kind),
                        _ => {}
                    }
                }
            }
            2 => raw = bytes_of(&wire)?,
            _ => {}
        }
    }
    let mut object = decode(&message_name(&api_version, &kind), raw, 0)?;
    object.insert("apiVersion".into(), api_version.into());
    object.insert("kind".into(), kind.into());
    Ok(Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let length = u8::try_from(bytes.len()).unwrap();
        assert!(length < 128);
        [&[(number << 3) | 2, length], bytes].concat()
    }

    fn number(field: u8, value: u8) -> Vec<u8> {
        vec![field << 3, value]
    }

    fn unknown(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let ty = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &ty), field(2, raw)].concat()
    }

    #[test]
    fn reads_what_kubectl_sends() {
        let meta = [field(1, b"s"), field(11, &[field(1, b"a"), field(2, b"b")].concat()), field(8, &[])].concat();
        let secret =
            [field(1, &meta), field(2, &[field(1, b"k"), field(2, b"v")].concat()), field(3, b"Opaque"), number(5, 1)]
                .concat();
        assert_eq!(
            to_json(&unknown("v1", "Secret", &secret)).unwrap(),
            json!({
                "apiVersion": "v1", "kind": "Secret", "type": "Opaque", "immutable": true, "data": { "k": "dg==" },
                "metadata": { "name": "s", "labels": { "a": "b" }, "creationTimestamp": null },
            })
        );
        let options = [number(1, 0), field(4, b"Background")].concat();
        assert_eq!(
            to_json(&unknown("v1", "DeleteOptions", &options)).unwrap(),
            json!({ "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0, "propagationPolicy": "Background" })
        );
    }

    #[test]
    fn inlines_quantities_and_either_or() {
        let quantity = field(1, b"1Gi");
        let requests = field(2, &[field(1, b"memory"), field(2, &quantity)].concat());
        let port = [number(1, 0), number(2, 80)].concat();
        let probe = field(1, &field(2, &[field(1, b"/x"), field(2, &port)].concat()));
        let container = [field(1, b"vm"), field(8, &requests), field(10, &probe)].concat();
        let volume = [field(1, b"v"), field(2, &field(2, &[]))].concat();
        let spec = [field(1, &volume), field(2, &container)].concat();
        let pod = to_json(&unknown("v1", "Pod", &field(2, &spec))).unwrap();
        assert_eq!(pod["spec"]["containers"][0]["resources"]["requests"]["memory"], "1Gi");
        assert_eq!(pod["spec"]["containers"][0]["livenessProbe"]["httpGet"], json!({ "path": "/x", "port": 80 }));
        assert_eq!(pod["spec"]["volumes"][0], json!({ "name": "v", "emptyDir": {} }));
    }

    #[test]
    fn refuses_what_it_doesnt_know() {
        assert_eq!(to_json(&unknown("apps/v1", "Deployment", &[])).unwrap_err().code, 415);
        assert_eq!(to_json(b"{}").unwrap_err().code, 400);
        assert_eq!(to_json(&[MAGIC, &[0x0a, 0x7f]].concat()).unwrap_err().code, 400);
    }

    #[test]
    fn every_message_named_is_there() {
        let known = [
            "string",
            "bytes",
            "bool",
            "int32",
            "int64",
            "double",
            "json",
            "quantity",
            "strings",
            "time",
            "microtime",
            "intorstring",
        ];
        for (name, message) in MESSAGES.iter() {
            for field in message.values() {
                assert!(known.contains(&field.ty) || MESSAGES.contains_key(field.ty), "{name}: {}", field.ty);
            }
        }
        assert!(MESSAGES.len() > 100);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let raw = [MAGIC, &bytes].concat();
            prop_assert!(to_json(&raw).is_ok() || to_json(&raw).is_err());
            let pod = unknown("v1", "Pod", &bytes);
            prop_assert!(to_json(&pod).is_ok() || to_json(&pod).is_err());
        }
    }
}
