//! Label and field selectors: parsing, and asking an object.

use serde_json::Value;

use crate::kinds::{Resource, label_key, label_value, text};
use crate::status::{Status, quoted};

/// The longest selector taken, in bytes.
const MAX_LENGTH: usize = 64 * 1024;

/// A parsed `labelSelector`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LabelSelector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Above(i64),
    Below(i64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Symbol(&'static str),
    End,
}

impl Token {
    fn shown(&self) -> &str {
        match self {
            Self::Word(word) => word,
            Self::Symbol(symbol) => symbol,
            Self::End => "",
        }
    }
}

/// Cuts a selector into words and symbols.
fn tokens(selector: &str) -> Vec<Token> {
    const SYMBOLS: [&str; 9] = ["!=", "==", "(", ")", ",", "!", "=", ">", "<"];
    let special = |letter: char| "()!=,<>".contains(letter);
    let mut out = Vec::new();
    let mut rest = selector.trim_start();
    while !rest.is_empty() {
        if let Some(symbol) = SYMBOLS.iter().find(|symbol| rest.starts_with(**symbol)) {
            out.push(Token::Symbol(symbol));
            rest = rest[symbol.len()..].trim_start();
            continue;
        }
        let end = rest.find(|letter: char| special(letter) || letter.is_whitespace()).unwrap_or(rest.len());
        out.push(Token::Word(rest[..end].to_owned()));
        rest = rest[end..].trim_start();
    }
    out.push(Token::End);
    out
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> &Token {
        self.tokens.get(self.at).unwrap_or(&Token::End)
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    fn take(&mut self, symbol: &str) -> bool {
        let found = *self.peek() == Token::Word(symbol.to_owned())
            || matches!(self.peek(), Token::Symbol(one) if *one == symbol);
        self.at += usize::from(found);
        found
    }

    fn requirements(&mut self) -> Result<Vec<Requirement>, String> {
        let mut out = Vec::new();
        loop {
            match self.peek() {
                Token::End => return Ok(out),
                Token::Word(_) | Token::Symbol("!") => out.push(self.requirement()?),
                Token::Symbol(symbol) => {
                    return Err(format!("found '{symbol}', expected: !, identifier, or 'end of string'"));
                }
            }
            match self.next() {
                Token::End => return Ok(out),
                Token::Symbol(",") => {
                    if !matches!(self.peek(), Token::Word(_) | Token::Symbol("!")) {
                        return Err(format!("found '{}', expected: identifier after ','", self.peek().shown()));
                    }
                }
                other => return Err(format!("found '{}', expected: ',' or 'end of string'", other.shown())),
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let negated = self.take("!");
        let key = match self.next() {
            Token::Word(key) => key,
            other => return Err(format!("found '{}', expected: identifier", other.shown())),
        };
        if let Some(why) = label_key(&key).first() {
            return Err(format!("unable to parse requirement: key: Invalid value: {}: {why}", quoted(&key)));
        }
        if negated {
            return Ok(Requirement { key, test: Test::Absent });
        }
        let test = match self.peek().clone() {
            Token::End | Token::Symbol(",") => return Ok(Requirement { key, test: Test::Exists }),
            Token::Symbol("=" | "==") => {
                self.at += 1;
                Test::In(vec![self.value()])
            }
            Token::Symbol("!=") => {
                self.at += 1;
                Test::NotIn(vec![self.value()])
            }
            Token::Symbol(symbol @ (">" | "<")) => {
                self.at += 1;
                let value = self.value();
                let number = value.parse().map_err(|_| {
                    format!(
                        "unable to parse requirement: values[0][{key}]: Invalid value: {}: for 'Gt', 'Lt' operators, the value must be an integer",
                        quoted(&value)
                    )
                })?;
                if symbol == ">" { Test::Above(number) } else { Test::Below(number) }
            }
            Token::Word(word) if word == "in" || word == "notin" => {
                self.at += 1;
                let values = self.values()?;
                if word == "in" { Test::In(values) } else { Test::NotIn(values) }
            }
            other => {
                return Err(format!("found '{}', expected: in, notin, =, ==, !=, gt, lt", other.shown()));
            }
        };
        if let Test::In(values) | Test::NotIn(values) = &test {
            for (index, value) in values.iter().enumerate() {
                if let Some(why) = label_value(value).first() {
                    return Err(format!(
                        "unable to parse requirement: values[{index}][{key}]: Invalid value: {}: {why}",
                        quoted(value)
                    ));
                }
            }
        }
        Ok(Requirement { key, test })
    }

    fn value(&mut self) -> String {
        match self.peek().clone() {
            Token::Word(word) => {
                self.at += 1;
                word
            }
            _ => String::new(),
        }
    }

    fn values(&mut self) -> Result<Vec<String>, String> {
        if !self.take("(") {
            return Err(format!("found '{}' expected: '('", self.peek().shown()));
        }
        let mut out = Vec::new();
        loop {
            match self.next() {
                Token::Word(word) => {
                    out.push(word);
                    match self.next() {
                        Token::Symbol(",") => {
                            if matches!(self.peek(), Token::Symbol(")")) {
                                out.push(String::new());
                            }
                        }
                        Token::Symbol(")") => break,
                        other => return Err(format!("found '{}', expected: ',' or ')'", other.shown())),
                    }
                }
                Token::Symbol(",") => out.push(String::new()),
                Token::Symbol(")") => {
                    if out.is_empty() {
                        out.push(String::new());
                    }
                    break;
                }
                other => return Err(format!("found '{}', expected: ',', ')' or identifier", other.shown())),
            }
        }
        out.sort();
        out.dedup();
        Ok(out)
    }
}

impl LabelSelector {
    /// Parses `a=b,c!=d,e in (f,g),h,!i`.
    pub(crate) fn parse(selector: &str) -> Result<Self, Status> {
        if selector.len() > MAX_LENGTH {
            return Err(Status::bad_request(format!("the label selector is longer than {MAX_LENGTH} bytes")));
        }
        let mut parser = Parser { tokens: tokens(selector), at: 0 };
        parser.requirements().map(Self).map_err(Status::bad_request)
    }

    /// The selector that an object holds (`matchLabels` and `matchExpressions`). An empty one matches everything;
    /// what can't be understood was refused when the object was written, and matches nothing.
    #[must_use]
    pub(crate) fn of(selector: &Value) -> Self {
        let words = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let labels = selector["matchLabels"].as_object().into_iter().flatten();
        let mut out: Vec<Requirement> = labels
            .map(|(key, value)| Requirement {
                key: key.clone(),
                test: Test::In(vec![value.as_str().unwrap_or_default().to_owned()]),
            })
            .collect();
        for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
            let test = match text(expression, &["operator"]) {
                "NotIn" => Test::NotIn(words(&expression["values"])),
                "Exists" => Test::Exists,
                "DoesNotExist" => Test::Absent,
                "In" => Test::In(words(&expression["values"])),
                _ => Test::In(Vec::new()),
            };
            out.push(Requirement { key: text(expression, &["key"]).to_owned(), test });
        }
        Self(out)
    }

    /// Whether an object's labels match.
    #[must_use]
    pub(crate) fn matches(&self, object: &Value) -> bool {
        let labels = object.get("metadata").and_then(|metadata| metadata.get("labels"));
        self.0.iter().all(|requirement| {
            let value = labels.and_then(|labels| labels.get(&requirement.key)).and_then(Value::as_str);
            let number = || value.and_then(|value| value.parse::<i64>().ok());
            match &requirement.test {
                Test::In(values) => value.is_some_and(|value| values.iter().any(|one| one == value)),
                Test::NotIn(values) => value.is_none_or(|value| values.iter().all(|one| one != value)),
                Test::Exists => value.is_some(),
                Test::Absent => value.is_none(),
                Test::Above(limit) => number().is_some_and(|number| number > *limit),
                Test::Below(limit) => number().is_some_and(|number| number < *limit),
            }
        })
    }
}

/// A parsed `fieldSelector`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldSelector(Vec<(String, bool, String)>);

const COMMON: [&str; 2] = ["metadata.name", "metadata.namespace"];

/// The fields that a kind can be selected by.
fn known_fields(resource: &Resource) -> Vec<String> {
    let more: &[&str] = match resource.kind.as_str() {
        _ if resource.is_custom() => &[],
        "Pod" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.podIPs",
            "status.nominatedNodeName",
        ],
        "Node" => &["spec.unschedulable"],
        "Namespace" => &["status.phase"],
        "Secret" => &["type"],
        "Event" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        "CertificateSigningRequest" => &["spec.signerName"],
        _ => &[],
    };
    let custom = resource.custom.as_ref().map(|custom| custom.selectable.clone()).unwrap_or_default();
    COMMON.iter().chain(more).map(|&field| field.to_owned()).chain(custom).collect()
}

impl FieldSelector {
    /// Parses `a=b,c!=d` with the fields that this kind can be selected by.
    pub(crate) fn parse(resource: &Resource, selector: &str) -> Result<Self, Status> {
        if selector.len() > MAX_LENGTH {
            return Err(Status::bad_request(format!("the field selector is longer than {MAX_LENGTH} bytes")));
        }
        let known = known_fields(resource);
        let mut out = Vec::new();
        for part in terms(selector) {
            if part.is_empty() {
                continue;
            }
            let split = [("!=", false), ("==", true), ("=", true)]
                .into_iter()
                .filter_map(|(operator, equal)| part.find(operator).map(|at| (at, operator.len(), equal)));
            let Some((at, length, equal)) = split.min_by_key(|&(at, length, _)| (at, std::cmp::Reverse(length))) else {
                return Err(Status::bad_request(format!("invalid selector: '{selector}'; can't understand '{part}'")));
            };
            let field = part[..at].to_owned();
            let value = unescape(&part[at + length..]).ok_or_else(|| {
                Status::bad_request(format!("invalid field selector: invalid escape sequence in {}", quoted(&part)))
            })?;
            if !known.contains(&field) {
                return Err(Status::bad_request(unknown_field(resource, &field)));
            }
            out.push((field, equal, value));
        }
        Ok(Self(out))
    }

    /// Whether an object matches.
    #[must_use]
    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(field, equal, value)| (field_value(object, field) == *value) == *equal)
    }
}

/// Cuts at commas that aren't escaped.
fn terms(selector: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut escaped = false;
    for letter in selector.chars() {
        if letter == ',' && !escaped {
            out.push(String::new());
            continue;
        }
        escaped = letter == '\\' && !escaped;
        if let Some(last) = out.last_mut() {
            last.push(letter);
        }
    }
    out
}

fn unescape(value: &str) -> Option<String> {
    let mut out = String::new();
    let mut letters = value.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => out.push(letters.next().filter(|next| matches!(next, '\\' | ',' | '='))?),
            ',' | '=' => return None,
            other => out.push(other),
        }
    }
    Some(out)
}

fn unknown_field(resource: &Resource, field: &str) -> String {
    match resource.kind.as_str() {
        _ if resource.is_custom() => format!("field label not supported: {field}"),
        "Pod" | "Node" | "Event" | "Namespace" | "Secret" | "CertificateSigningRequest" => {
            format!("field label not supported: {field}")
        }
        _ => format!("{} is not a known field selector: only \"metadata.name\", \"metadata.namespace\"", quoted(field)),
    }
}

/// The text of a field, as selectors compare it.
fn field_value(object: &Value, field: &str) -> String {
    if field == "source" {
        let source = text(object, &["source", "component"]);
        let source = if source.is_empty() { text(object, &["reportingComponent"]) } else { source };
        return source.to_owned();
    }
    let parts: Vec<&str> = field.split('.').collect();
    let boolean = matches!(field, "spec.unschedulable" | "spec.hostNetwork");
    match crate::kinds::at(object, &parts) {
        Some(Value::String(value)) => value.clone(),
        Some(Value::Array(list)) => {
            let ips: Vec<&str> = list.iter().map(|one| text(one, &["ip"])).collect();
            ips.join(",")
        }
        Some(other) => other.to_string(),
        None if boolean => "false".to_owned(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests;
