//! From the bytes of a request to a value of the kind asked for.
//!
//! A value that has been through here looks like one that went through the real server's Go structs: fields
//! nobody knows are gone (and reported), zero values are shown or left out as the wire format has it, quantities
//! and times are in their canonical form.

use std::fmt;

use jiff::Timestamp;
use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::Resource;
use crate::quantity::Quantity;
use crate::schema::{Field, Scalar, Struct, Type};
use crate::status::{Status, quoted};

/// What to do about fields nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    /// Drop them.
    Ignore,
    /// Drop them and say so in a `Warning` header.
    Warn,
    /// Refuse the request.
    Strict,
}

impl FieldValidation {
    /// Parses the `fieldValidation` query parameter; the default is `Warn`.
    pub(crate) fn parse(parameter: Option<&str>) -> Result<Self, Status> {
        match parameter {
            None | Some("" | "Warn") => Ok(Self::Warn),
            Some("Ignore") => Ok(Self::Ignore),
            Some("Strict") => Ok(Self::Strict),
            Some(other) => Err(Status::invalid_kind(
                "meta.k8s.io",
                "CreateOptions",
                "",
                vec![crate::status::Cause::not_supported(
                    "fieldValidation",
                    &other.into(),
                    &["Ignore", "Strict", "Warn"],
                )],
            )),
        }
    }
}

/// How a request body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// `application/json`
    Json,
    /// `application/yaml`
    Yaml,
}

/// The content types that [`Format::of`] takes.
const BODY_TYPES: [&str; 2] = ["application/json", "application/yaml"];

impl Format {
    /// The format a `Content-Type` names; JSON when there is none.
    pub(crate) fn of(content_type: Option<&str>) -> Result<Self, Status> {
        let essence = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        match essence {
            "" | "application/json" | "*/*" => Ok(Self::Json),
            "application/yaml" | "application/x-yaml" | "text/yaml" => Ok(Self::Yaml),
            _ => Err(Status::unsupported_media_type(&BODY_TYPES)),
        }
    }
}

/// A decoded body.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Decoded {
    /// The object.
    pub(crate) value: Value,
    /// What to tell the client in `Warning` headers.
    pub(crate) warnings: Vec<String>,
}

/// A `Warning` header for a message.
#[must_use]
pub(crate) fn warning_header(message: &str) -> String {
    format!("299 - {}", quoted(message))
}

/// Decodes the body of a create or an update of `resource`.
pub(crate) fn decode(
    resource: &Resource,
    body: &[u8],
    format: Format,
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let (value, duplicates) = parse(body, format).map_err(|why| {
        Status::bad_request(format!(
            "the object provided is unrecognized (must be of type {}): couldn't get version/kind; json parse error: {why}",
            resource.kind
        ))
    })?;
    conform(resource, value, &duplicates, validation)
}

/// Parses a body that has no kind of its own to hold it against, such as a patch.
pub(crate) fn parse(body: &[u8], format: Format) -> Result<(Value, Vec<String>), String> {
    let mut duplicates = Vec::new();
    let value = match format {
        Format::Json => {
            let mut input = serde_json::Deserializer::from_slice(body);
            let value = Tree { path: String::new(), duplicates: &mut duplicates }
                .deserialize(&mut input)
                .map_err(|why| why.to_string())?;
            input.end().map_err(|why| why.to_string())?;
            value
        }
        Format::Yaml => {
            let text = std::str::from_utf8(body).map_err(|why| why.to_string())?;
            serde_saphyr::from_str::<Value>(text).map_err(|why| why.to_string())?
        }
    };
    Ok((value, duplicates))
}

/// Decodes a `DeleteOptions` body; none at all is the default options.
pub(crate) fn decode_options(body: &[u8], format: Format) -> Result<Value, Status> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Object(Map::new()));
    }
    let (value, _) = parse(body, format)
        .map_err(|why| Status::bad_request(format!("couldn't get version/kind; json parse error: {why}")))?;
    let mut unknown = Vec::new();
    if let Some(kind) =
        value.get("kind").and_then(Value::as_str).filter(|kind| !kind.is_empty() && *kind != "DeleteOptions")
    {
        return Err(Status::bad_request(format!(
            "decoded object cannot be converted to DeleteOptions: it is a {kind}"
        )));
    }
    shape(&Type::named("meta.DeleteOptions"), value, &mut unknown).map_err(Status::bad_request)
}

/// Brings a parsed value into the shape of `resource`: kind and version, unknown fields, types, zero values.
pub(crate) fn conform(
    resource: &Resource,
    mut value: Value,
    duplicates: &[String],
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let Some(object) = value.as_object_mut() else {
        return Err(Status::bad_request(format!(
            "the object provided is unrecognized (must be of type {}): couldn't get version/kind; json parse error: json: cannot unmarshal {} into Go value of type struct {{ APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \"json:\\\"kind,omitempty\\\"\" }}",
            resource.kind,
            json_word(&value)
        )));
    };
    check_kind(resource, object)?;
    let mut problems: Vec<String> = duplicates.iter().map(|path| format!("duplicate field {}", quoted(path))).collect();
    let mut unknown = Vec::new();
    let refuse = |why: String| {
        Status::bad_request(format!(
            "{} in version {} cannot be handled as a {}: {why}",
            resource.kind,
            quoted(&resource.version),
            resource.kind
        ))
    };
    let value = match &resource.custom {
        Some(custom) => custom.prune(value, &mut unknown).map_err(refuse)?,
        None => shape(&resource.ty, value, &mut unknown).map_err(refuse)?,
    };
    problems.extend(unknown.into_iter().map(|path| format!("unknown field {}", quoted(&path))));
    match validation {
        FieldValidation::Ignore => problems.clear(),
        FieldValidation::Warn => {}
        FieldValidation::Strict if problems.is_empty() => {}
        FieldValidation::Strict => return Err(refuse(format!("strict decoding error: {}", problems.join(", ")))),
    }
    Ok(Decoded { value, warnings: problems })
}

fn check_kind(resource: &Resource, object: &mut Map<String, Value>) -> Result<(), Status> {
    let given = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (version, kind) = (given("apiVersion"), given("kind"));
    let expected = resource.api_version();
    if resource.is_custom() {
        if !version.is_empty() && version != expected {
            return Err(Status::bad_request(format!(
                "the API version in the data ({version}) does not match the expected API version ({expected})"
            )));
        }
        if !kind.is_empty() && kind != resource.kind {
            return Err(Status::bad_request(format!(
                "the kind in the data ({kind}) does not match the expected kind ({})",
                resource.kind
            )));
        }
    } else if (!version.is_empty() && version != expected) || (!kind.is_empty() && kind != resource.kind) {
        let version = if version.is_empty() { expected.clone() } else { version };
        let kind = if kind.is_empty() { resource.kind.clone() } else { kind };
        let (group, short) = version.rsplit_once('/').unwrap_or(("", &version));
        let why = if super::registry::known(group, short, &kind) {
            format!("converting ({short}.{kind}) to ({}.{}): unknown conversion", resource.go_package(), resource.kind)
        } else {
            format!(
                "no kind {} is registered for version {} in scheme \"pkg/runtime/scheme.go:111\"",
                quoted(&kind),
                quoted(&version)
            )
        };
        return Err(Status::bad_request(format!(
            "{kind} in version {} cannot be handled as a {}: {why}",
            quoted(short),
            resource.kind
        )));
    }
    object.insert("apiVersion".into(), expected.into());
    object.insert("kind".into(), resource.kind.clone().into());
    Ok(())
}

/// Brings `value` into the shape of `ty`, naming the fields dropped in `unknown`.
pub(crate) fn shape(ty: &Type, value: Value, unknown: &mut Vec<String>) -> Result<Value, String> {
    walk(ty, value, &Path::Root, "", unknown)
}

/// The value a Go struct of this type has before anything is decoded into it.
pub(crate) fn zero(ty: &Type) -> Value {
    match ty {
        Type::Scalar(Scalar::String | Scalar::Bytes) => "".into(),
        Type::Scalar(Scalar::Bool) => false.into(),
        Type::Scalar(Scalar::Int32 | Scalar::Int64 | Scalar::Float64 | Scalar::IntOrString) => 0.into(),
        Type::Scalar(Scalar::Quantity) => "0".into(),
        Type::Struct(_) | Type::Named(_) => {
            let mut map = Map::new();
            if let Some(inner) = ty.as_struct() {
                fill(inner, &mut map);
            }
            Value::Object(map)
        }
        _ => Value::Null,
    }
}

/// Whether Go always writes this field, because it is a struct there and not a pointer to one.
fn always_written(field: &Field) -> bool {
    !field.pointer
        && !field.omit_zero
        && matches!(
            field.ty,
            Type::Named(_) | Type::Scalar(Scalar::Time | Scalar::MicroTime | Scalar::Quantity | Scalar::IntOrString)
        )
}

fn fill(inner: &Struct, map: &mut Map<String, Value>) {
    for (name, field) in &inner.fields {
        if map.contains_key(name) || (field.omit_empty && !always_written(field)) || field.omit_zero {
            continue;
        }
        let value = if field.pointer { Value::Null } else { zero(&field.ty) };
        map.insert(name.clone(), value);
    }
}

enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Field(Self::Root, name) => write!(f, "{name}"),
            Self::Field(parent, name) => write!(f, "{parent}.{name}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

impl Path<'_> {
    /// The path as Go's decoder gives it: names only.
    fn names(&self) -> String {
        match self {
            Self::Root => String::new(),
            Self::Field(parent, name) => {
                let head = parent.names();
                if head.is_empty() { (*name).to_owned() } else { format!("{head}.{name}") }
            }
            Self::Index(parent, _) => parent.names(),
        }
    }
}

fn json_word(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn go_type(ty: &Type) -> String {
    match ty {
        Type::Scalar(scalar) => match scalar {
            Scalar::Bool => "bool",
            Scalar::Int32 => "int32",
            Scalar::Int64 => "int64",
            Scalar::Float64 => "float64",
            Scalar::Bytes => "[]uint8",
            _ => "string",
        }
        .to_owned(),
        Type::List(list) => format!("[]{}", go_type(&list.item)),
        Type::Map(map) => format!("map[string]{}", go_type(&map.value)),
        Type::Named(_) | Type::Struct(_) => format!("v1.{}", ty.as_struct().map_or("", |inner| &inner.name)),
        Type::Any => "runtime.RawExtension".to_owned(),
    }
}

fn mismatch(ty: &Type, value: &Value, path: &Path<'_>, owner: &str) -> String {
    let word = match value {
        Value::Number(number) if matches!(ty, Type::Scalar(Scalar::Int32 | Scalar::Int64)) => {
            format!("number {number}")
        }
        other => json_word(other).to_owned(),
    };
    let names = path.names();
    if names.is_empty() {
        return format!("json: cannot unmarshal {word} into Go value of type {}", go_type(ty));
    }
    format!("json: cannot unmarshal {word} into Go struct field {owner}.{names} of type {}", go_type(ty))
}

fn walk(ty: &Type, value: Value, path: &Path<'_>, owner: &str, unknown: &mut Vec<String>) -> Result<Value, String> {
    match ty {
        Type::Any => Ok(value),
        Type::Scalar(scalar) => walk_scalar(*scalar, ty, value, path, owner),
        Type::List(list) => match value {
            Value::Null => Ok(Value::Null),
            Value::Array(items) => {
                let mut out = Vec::with_capacity(items.len());
                for (index, item) in items.into_iter().enumerate() {
                    let item = if item.is_null() { zero(&list.item) } else { item };
                    out.push(walk(&list.item, item, &Path::Index(path, index), owner, unknown)?);
                }
                Ok(Value::Array(out))
            }
            other => Err(mismatch(ty, &other, path, owner)),
        },
        Type::Map(map) => match value {
            Value::Null => Ok(Value::Null),
            Value::Object(entries) => {
                let mut out = Map::new();
                for (key, entry) in entries {
                    let entry = if entry.is_null() { zero(&map.value) } else { entry };
                    let entry = walk(&map.value, entry, &Path::Field(path, &key), owner, unknown)?;
                    out.insert(key, entry);
                }
                Ok(Value::Object(out))
            }
            other => Err(mismatch(ty, &other, path, owner)),
        },
        Type::Named(_) | Type::Struct(_) => {
            let Some(inner) = ty.as_struct() else { return Ok(value) };
            match value {
                Value::Object(entries) => walk_struct(inner, entries, path, unknown),
                Value::Null => Ok(zero(ty)),
                other => Err(mismatch(ty, &other, path, owner)),
            }
        }
    }
}

fn walk_struct(
    inner: &Struct,
    entries: Map<String, Value>,
    path: &Path<'_>,
    unknown: &mut Vec<String>,
) -> Result<Value, String> {
    let mut out = Map::new();
    for (key, entry) in entries {
        let here = Path::Field(path, &key);
        let Some(field) = inner.fields.get(&key) else {
            unknown.push(here.to_string());
            continue;
        };
        if entry.is_null() {
            continue;
        }
        let entry = walk(&field.ty, entry, &here, &inner.name, unknown)?;
        if field.omit_empty && is_empty(field, &entry) {
            continue;
        }
        if field.omit_zero && !field.pointer && (entry.is_null() || entry == zero(&field.ty)) {
            continue;
        }
        out.insert(key, entry);
    }
    fill(inner, &mut out);
    Ok(Value::Object(out))
}

/// Whether Go's `omitempty` leaves this value out.
fn is_empty(field: &Field, value: &Value) -> bool {
    match value {
        Value::Null => !always_written(field),
        Value::Array(items) => items.is_empty() && matches!(field.ty, Type::List(_)),
        Value::Object(entries) => entries.is_empty() && matches!(field.ty, Type::Map(_)),
        _ if field.pointer || always_written(field) => false,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
    }
}

fn walk_scalar(scalar: Scalar, ty: &Type, value: Value, path: &Path<'_>, owner: &str) -> Result<Value, String> {
    let fits = match (scalar, &value) {
        (Scalar::Untyped, _)
        | (Scalar::String, Value::String(_))
        | (Scalar::Bool, Value::Bool(_))
        | (Scalar::Float64, Value::Number(_))
        | (Scalar::Time | Scalar::MicroTime, Value::Null) => return Ok(value),
        (Scalar::Int32, Value::Number(number)) => number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()),
        (Scalar::Int64, Value::Number(number)) => number.as_i64().is_some(),
        (Scalar::IntOrString, Value::Number(number)) => number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()),
        (Scalar::IntOrString, Value::String(_)) => true,
        (Scalar::Bytes, Value::String(text)) => return bytes(text),
        (Scalar::Quantity, Value::String(text)) => {
            return Quantity::parse(text).map(|amount| amount.to_string().into()).map_err(|why| why.to_string());
        }
        (Scalar::Quantity, Value::Number(number)) => {
            return Quantity::parse(&number.to_string())
                .map(|amount| amount.to_string().into())
                .map_err(|why| why.to_string());
        }
        (Scalar::Time | Scalar::MicroTime, Value::String(text)) => return time(scalar, text),
        _ => false,
    };
    if fits { Ok(value) } else { Err(mismatch(ty, &value, path, owner)) }
}

fn bytes(text: &str) -> Result<Value, String> {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    let clean: String = text.chars().filter(|letter| !matches!(letter, '\r' | '\n')).collect();
    match STANDARD.decode(&clean) {
        Ok(decoded) => Ok(STANDARD.encode(decoded).into()),
        Err(base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _)) => {
            Err(format!("illegal base64 data at input byte {at}"))
        }
        Err(_) => Err(format!("illegal base64 data at input byte {}", clean.len() / 4 * 4)),
    }
}

fn time(scalar: Scalar, text: &str) -> Result<Value, String> {
    if text.is_empty() {
        return Ok(Value::Null);
    }
    let layout = if scalar == Scalar::Time { "2006-01-02T15:04:05Z07:00" } else { "2006-01-02T15:04:05.000000Z07:00" };
    let looks_right = text.len() >= 20 && text.as_bytes()[10] == b'T';
    match text.parse::<Timestamp>() {
        Ok(instant) if looks_right => {
            Ok(if scalar == Scalar::Time { rfc3339(instant) } else { rfc3339_micro(instant) }.into())
        }
        _ => Err(format!(
            "parsing time {} as {}: cannot parse {} as \"2006\"",
            quoted(text),
            quoted(layout),
            quoted(text)
        )),
    }
}

/// `metav1.Time` on the wire.
#[must_use]
pub(crate) fn rfc3339(instant: Timestamp) -> String {
    instant.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `metav1.MicroTime` on the wire.
fn rfc3339_micro(instant: Timestamp) -> String {
    instant.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// Deserializes any JSON, noting keys that are given twice (the last one counts).
struct Tree<'a> {
    path: String,
    duplicates: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, input: D) -> Result<Value, D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut input: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        loop {
            let path = format!("{}[{}]", self.path, items.len());
            match input.next_element_seed(Tree { path, duplicates: &mut *self.duplicates })? {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut input: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = input.next_key::<String>()? {
            let path = if self.path.is_empty() { key.clone() } else { format!("{}.{key}", self.path) };
            if map.contains_key(&key) && self.duplicates.len() < 100 {
                self.duplicates.push(path.clone());
            }
            let value = input.next_value_seed(Tree { path, duplicates: &mut *self.duplicates })?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}
