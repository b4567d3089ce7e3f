//! The query parameters of a request.

use crate::status::Status;

/// Parsed query parameters; a name may occur several times.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    pub(crate) fn parse(query: Option<&str>) -> Self {
        let pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect();
        Self { pairs }
    }

    /// The first value of a parameter, unless it is empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(at, _)| at == name).map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// All parameters in their order.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// A yes or no. Kubernetes reads an absent or empty one as no for `watch`-like parameters.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, Status> {
        Ok(self.maybe_flag(name)?.unwrap_or(false))
    }

    /// A yes or no that may be absent.
    pub(crate) fn maybe_flag(&self, name: &str) -> Result<Option<bool>, Status> {
        match self.get(name) {
            None => Ok(None),
            Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(Some(true)),
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(Some(false)),
            Some(other) => Err(Status::bad_request(format!("query parameter {name}: {other:?} is not true or false"))),
        }
    }

    /// A whole number that may be absent.
    pub(crate) fn number(&self, name: &str) -> Result<Option<i64>, Status> {
        self.get(name)
            .map(|text| {
                text.parse()
                    .map_err(|_| Status::bad_request(format!("query parameter {name}: {text:?} is not a whole number")))
            })
            .transpose()
    }

    /// Whether this is a dry run: `dryRun=All`.
    pub(crate) fn dry_run(&self) -> Result<bool, Status> {
        match self.get("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => {
                Err(Status::bad_request(format!("dryRun: Unsupported value: {other:?}: supported values: \"All\"")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_values_flags_and_numbers() {
        let query = Query::parse(Some("a=1&b=x%3Dy+z&watch=true&n=x&e="));
        assert_eq!(query.get("b"), Some("x=y z"));
        assert_eq!(query.get("e"), None);
        assert!(query.flag("watch").unwrap());
        assert!(!query.flag("absent").unwrap());
        assert_eq!(query.flag("n").unwrap_err().code, 400);
        assert_eq!(query.number("a").unwrap(), Some(1));
        assert_eq!(query.number("n").unwrap_err().code, 400);
        assert_eq!(Query::parse(Some("dryRun=some")).dry_run().unwrap_err().code, 400);
    }
}
