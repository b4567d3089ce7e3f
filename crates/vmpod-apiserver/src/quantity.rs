//! `resource.Quantity`: parsing, comparing, and the canonical form the API gives back.

use std::cmp::Ordering;
use std::fmt;

/// An amount: `value × 10^-9`, with the suffix family it was written in.
///
/// Like the real one it is exact to 10⁻⁹ and rounds up beyond that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quantity {
    nanos: i128,
    family: Family,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Decimal,
    Binary,
    Exponent,
}

/// Why a text is no quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuantityError {
    /// The shape is wrong.
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Format,
    /// The suffix isn't one.
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

const NANO: i128 = 1_000_000_000;

impl Quantity {
    /// Parses `1`, `500m`, `1.5Gi`, `1e3`.
    pub(crate) fn parse(text: &str) -> Result<Self, QuantityError> {
        if text.is_empty() || text.len() > 64 {
            return Err(QuantityError::Format);
        }
        let bytes = text.as_bytes();
        let (negative, rest) = match bytes[0] {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let digits = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(digits);
        if number.is_empty() || number == "." || number.matches('.').count() > 1 {
            return Err(QuantityError::Format);
        }
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let (family, base, exponent) = scale(suffix)?;
        // value = digits × 10^-len(fraction) × base^exponent, in nanos, rounded away from zero
        let all: String = [whole, fraction].concat();
        let mantissa: i128 =
            if all.len() > 30 { i128::MAX / NANO / 4 } else { all.parse().map_err(|_| QuantityError::Format)? };
        let shift = i32::try_from(fraction.len()).map_err(|_| QuantityError::Format)?;
        let mut nanos = if base == 2 {
            let factor = 1_i128 << exponent;
            scaled(mantissa.saturating_mul(factor), 9 - shift)
        } else {
            scaled(mantissa, 9 - shift + exponent)
        };
        let limit = i128::from(i64::MAX) * NANO;
        nanos = nanos.min(limit);
        Ok(Self { nanos: if negative { -nanos } else { nanos }, family })
    }

    /// The amount in billionths.
    #[must_use]
    pub(crate) fn nanos(self) -> i128 {
        self.nanos
    }

    /// Whether the amount is a whole number.
    #[must_use]
    pub(crate) fn is_whole(self) -> bool {
        self.nanos % NANO == 0
    }
}

/// `mantissa × 10^power`, rounded up where digits are lost.
fn scaled(mantissa: i128, power: i32) -> i128 {
    let magnitude = 10_i128.checked_pow(power.unsigned_abs());
    match (power < 0, magnitude) {
        (false, Some(factor)) => mantissa.saturating_mul(factor),
        (false, None) => {
            if mantissa == 0 {
                0
            } else {
                i128::MAX
            }
        }
        (true, Some(factor)) => mantissa / factor + i128::from(mantissa % factor != 0),
        (true, None) => i128::from(mantissa != 0),
    }
}

fn scale(suffix: &str) -> Result<(Family, u8, i32), QuantityError> {
    let table = |power| Ok((Family::Decimal, 10, power));
    match suffix {
        "" => table(0),
        "n" => table(-9),
        "u" => table(-6),
        "m" => table(-3),
        "k" => table(3),
        "M" => table(6),
        "G" => table(9),
        "T" => table(12),
        "P" => table(15),
        "E" => table(18),
        "Ki" => Ok((Family::Binary, 2, 10)),
        "Mi" => Ok((Family::Binary, 2, 20)),
        "Gi" => Ok((Family::Binary, 2, 30)),
        "Ti" => Ok((Family::Binary, 2, 40)),
        "Pi" => Ok((Family::Binary, 2, 50)),
        "Ei" => Ok((Family::Binary, 2, 60)),
        other => {
            let Some(power) = other.strip_prefix(['e', 'E']) else {
                let known = other.chars().all(|letter| "eEinumkKMGTP+-0123456789".contains(letter));
                return Err(if known { QuantityError::Suffix } else { QuantityError::Format });
            };
            let power: i32 = power.parse().map_err(|_| QuantityError::Suffix)?;
            if power.abs() > 60 {
                return Err(QuantityError::Suffix);
            }
            Ok((Family::Exponent, 10, power))
        }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.nanos;
        if nanos == 0 {
            return write!(f, "0");
        }
        // Binary suffixes are only kept for whole amounts of at least 1024.
        if self.family == Family::Binary && nanos % NANO == 0 && nanos.abs() >= 1024 * NANO {
            let mut whole = nanos / NANO;
            let mut at = 0;
            while whole % 1024 == 0 && at < 6 {
                whole /= 1024;
                at += 1;
            }
            return write!(f, "{whole}{}", ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][at]);
        }
        let (mut amount, mut at) = (nanos, 0_usize);
        while amount % 1000 == 0 && at < 9 {
            amount /= 1000;
            at += 1;
        }
        if self.family == Family::Exponent {
            let power = [-9, -6, -3, 0, 3, 6, 9, 12, 15, 18][at];
            return if power == 0 { write!(f, "{amount}") } else { write!(f, "{amount}e{power}") };
        }
        write!(f, "{amount}{}", ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"][at])
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn canonical_forms() {
        for (given, canonical) in [
            ("0", "0"),
            ("1", "1"),
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1.5Gi", "1536Mi"),
            ("1024Mi", "1Gi"),
            ("1000", "1k"),
            ("1e3", "1e3"),
            ("100Ki", "100Ki"),
            ("0.5Mi", "512Ki"),
            ("1500m", "1500m"),
            ("2000000", "2M"),
            ("12e6", "12e6"),
            ("0.1n", "1n"),
            ("-1.5", "-1500m"),
            ("+3", "3"),
            ("1536", "1536"),
            ("512", "512"),
            ("0.001Ki", "1024m"),
        ] {
            assert_eq!(Quantity::parse(given).map(|q| q.to_string()), Ok(canonical.to_owned()), "{given}");
        }
        for wrong in ["", "x", "1.2.3", "1Gib", "--1", ".", "1 Gi", "1e", "Gi", "1e999"] {
            assert!(Quantity::parse(wrong).is_err(), "{wrong}");
        }
        assert!(Quantity::parse("1Gi").unwrap() > Quantity::parse("1G").unwrap());
    }

    proptest! {
        #[test]
        fn canonical_text_parses_to_the_same_amount(text in "[+-]?[0-9]{1,9}(\\.[0-9]{1,4})?(n|u|m|k|M|G|Ki|Mi|Gi|e3|)") {
            let first = Quantity::parse(&text).unwrap();
            let again = Quantity::parse(&first.to_string()).unwrap();
            prop_assert_eq!(first, again);
            prop_assert_eq!(first.to_string(), again.to_string());
        }

        #[test]
        fn never_panics(text in ".{0,24}") {
            let _parsed = Quantity::parse(&text);
        }
    }
}
