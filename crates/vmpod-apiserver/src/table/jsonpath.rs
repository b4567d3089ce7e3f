//! The little of `JSONPath` that printer columns use: `.a.b`, `['k']`, `[0]`, `[*]` and `[?(@.type=="Ready")]`.

use serde_json::Value;

/// Everything that a path leads to.
pub(super) fn find<'a>(value: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![value];
    let mut rest = path.trim().trim_start_matches('{').trim_end_matches('}').trim_start_matches('$');
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('[') {
            let Some(end) = closing(after) else { return Vec::new() };
            let inside = after[..end].trim();
            rest = &after[end + 1..];
            found = found.into_iter().flat_map(|one| bracket(one, inside)).collect();
        } else {
            let after = rest.trim_start_matches('.');
            if after.is_empty() {
                return found;
            }
            let (name, length) = name(after);
            rest = &after[length..];
            found = found
                .into_iter()
                .flat_map(|one| match one {
                    Value::Object(map) if name == "*" => map.values().collect(),
                    Value::Array(list) if name == "*" => list.iter().collect(),
                    other => other.get(&name).into_iter().collect::<Vec<_>>(),
                })
                .collect();
        }
    }
    found
}

/// A field name, with `\.` for a point in it; and how many bytes it took.
fn name(text: &str) -> (String, usize) {
    let mut out = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\\' => out.extend(letters.next().map(|(_, next)| next)),
            '.' | '[' => return (out, at),
            other => out.push(other),
        }
    }
    (out, text.len())
}

fn closing(text: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0_usize, None);
    for (at, letter) in text.char_indices() {
        match (quote, letter) {
            (Some(open), _) if open == letter => quote = None,
            (None, '\'' | '"') => quote = Some(letter),
            (None, '[') => depth += 1,
            (None, ']') if depth == 0 => return Some(at),
            (None, ']') => depth -= 1,
            _ => {}
        }
    }
    None
}

fn unquote(text: &str) -> Option<&str> {
    ['\'', '"'].into_iter().find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote))
}

fn bracket<'a>(value: &'a Value, inside: &str) -> Vec<&'a Value> {
    if inside == "*" {
        return match value {
            Value::Array(list) => list.iter().collect(),
            Value::Object(map) => map.values().collect(),
            _ => Vec::new(),
        };
    }
    if let Some(key) = unquote(inside) {
        return value.get(key).into_iter().collect();
    }
    if let Some(filter) = inside.strip_prefix("?(").and_then(|filter| filter.strip_suffix(')')) {
        let list = value.as_array().map_or(&[][..], Vec::as_slice);
        return list.iter().filter(|one| holds(one, filter)).collect();
    }
    match (inside.parse::<i64>(), value.as_array()) {
        (Ok(index), Some(list)) => {
            let length = i64::try_from(list.len()).unwrap_or(i64::MAX);
            let index = if index < 0 { length + index } else { index };
            usize::try_from(index).ok().and_then(|index| list.get(index)).into_iter().collect()
        }
        _ => Vec::new(),
    }
}

fn holds(item: &Value, filter: &str) -> bool {
    let split =
        ["==", "!="].into_iter().find_map(|operator| filter.split_once(operator).map(|parts| (operator, parts)));
    let Some((operator, (left, right))) = split else {
        return !find(item, filter.trim().trim_start_matches('@')).is_empty();
    };
    let right = right.trim();
    let wanted = unquote(right).map_or_else(|| serde_json::from_str(right).unwrap_or(Value::Null), Value::from);
    let found = find(item, left.trim().trim_start_matches('@'));
    found.iter().any(|value| **value == wanted) == (operator == "==")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_of_printer_columns() {
        let value = json!({"spec": {"a.b": 1, "list": [{"n": 1}, {"n": 2}]}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        for (path, wanted) in [
            (".spec.list[1].n", json!([2])),
            (".spec.list[*].n", json!([1, 2])),
            (".spec.list[-1].n", json!([2])),
            (".spec['a.b']", json!([1])),
            (".spec.a\\.b", json!([1])),
            (".status.conditions[?(@.type==\"Ready\")].status", json!(["True"])),
            (".status.conditions[?(@.type=='Absent')].status", json!([])),
            (".nothing", json!([])),
            ("{.spec.list[0].n}", json!([1])),
        ] {
            assert_eq!(json!(find(&value, path)), wanted, "{path}");
        }
        for odd in ["[", "[?(", "..", ".a[[", "]", "\\"] {
            let _found = find(&value, odd);
        }
    }
}
