//! Kubernetes quantities as numbers.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Why a text is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a quantity")]
pub(crate) struct NotAQuantity(String);

/// A quantity in billionths, exact for everything the API accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Nanos(i128);

const BILLION: i128 = 1_000_000_000;

impl Nanos {
    /// Parses the text form (`1500m`, `2Gi`, `1e3`, `0.5`).
    pub(crate) fn parse(text: &str) -> Result<Self, NotAQuantity> {
        let bad = || NotAQuantity(text.to_owned());
        let (negative, body) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let end = body.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(body.len());
        let (number, suffix) = body.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return Err(bad());
        }
        let (numerator, denominator) = scale(suffix).ok_or_else(bad)?;
        let mut digits: i128 = 0;
        for digit in whole.bytes().chain(fraction.bytes()) {
            digits = digits.checked_mul(10).and_then(|v| v.checked_add(i128::from(digit - b'0'))).ok_or_else(bad)?;
        }
        let places = u32::try_from(fraction.len()).map_err(|_| bad())?;
        let divisor = 10_i128.checked_pow(places).and_then(|d| d.checked_mul(denominator)).ok_or_else(bad)?;
        let product = digits.checked_mul(BILLION).and_then(|v| v.checked_mul(numerator)).ok_or_else(bad)?;
        // Round away from zero, as the API does below a billionth.
        let nanos = product.div_euclid(divisor) + i128::from(product.rem_euclid(divisor) != 0);
        Ok(Self(if negative { -nanos } else { nanos }))
    }

    /// Whole units, rounded up; negative values are zero.
    pub(crate) fn units_up(self) -> u64 {
        let units = self.0.div_euclid(BILLION) + i128::from(self.0.rem_euclid(BILLION) != 0);
        u64::try_from(units.max(0)).unwrap_or(u64::MAX)
    }

    /// Thousandths, rounded up; negative values are zero.
    pub(crate) fn millis_up(self) -> u64 {
        let million = BILLION / 1000;
        let millis = self.0.div_euclid(million) + i128::from(self.0.rem_euclid(million) != 0);
        u64::try_from(millis.max(0)).unwrap_or(u64::MAX)
    }

    /// The quotient by `divisor`, rounded up: how the downward API shows resources.
    pub(crate) fn divided_up(self, divisor: Self) -> u64 {
        let by = if divisor.0 <= 0 { BILLION } else { divisor.0 };
        let quotient = self.0.div_euclid(by) + i128::from(self.0.rem_euclid(by) != 0);
        u64::try_from(quotient.max(0)).unwrap_or(u64::MAX)
    }

    /// From whole units.
    pub(crate) fn from_units(units: u64) -> Self {
        Self(i128::from(units) * BILLION)
    }

    /// From thousandths.
    pub(crate) fn from_millis(millis: u64) -> Self {
        Self(i128::from(millis) * (BILLION / 1000))
    }
}

/// A suffix as a fraction.
fn scale(suffix: &str) -> Option<(i128, i128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, BILLION),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (BILLION, 1),
        "T" => (1_000 * BILLION, 1),
        "P" => (1_000_000 * BILLION, 1),
        "E" => (BILLION * BILLION, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
            if exponent < 0 { (1, power) } else { (power, 1) }
        }
    })
}

/// The named quantity of a resource list. A text that is no quantity counts as absent: the API never lets one through.
pub(crate) fn of(list: Option<&BTreeMap<String, Quantity>>, name: &str) -> Option<Nanos> {
    Nanos::parse(&list?.get(name)?.0).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_exactly() {
        for (text, millis) in [
            ("1", 1000),
            ("100m", 100),
            ("0.5", 500),
            (".5", 500),
            ("1.", 1000),
            ("1500u", 2),
            ("2k", 2_000_000),
            ("1e3", 1_000_000),
            ("1E-2", 10),
            ("-1", 0),
            ("1n", 1),
        ] {
            assert_eq!(Nanos::parse(text).unwrap().millis_up(), millis, "{text}");
        }
        for (text, bytes) in [
            ("2Gi", 2 << 30),
            ("1.5Gi", 3 << 29),
            ("128974848", 128_974_848),
            ("129e6", 129_000_000),
            ("129M", 129_000_000),
            ("128974848000m", 128_974_848),
            ("7Ei", 7 << 60),
            ("1m", 1),
        ] {
            assert_eq!(Nanos::parse(text).unwrap().units_up(), bytes, "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "x", "1 Gi", "1..2", "1Qi", "--1", ".", "1e", "1ee3", "9999999999999999999999999999999999999999999"]
        {
            assert!(Nanos::parse(text).is_err(), "{text}");
        }
    }
}
