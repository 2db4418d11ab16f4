//! Kubernetes quantities (`4Gi`, `256Mi`, `0.8`, `1e9`, `500m`) as bytes.
//!
//! The grammar is that of `resource.Quantity` in k8s.io/apimachinery: a sign, digits with an
//! optional fraction, then one suffix or one exponent. All arithmetic is exact; what is no whole
//! number of bytes is rounded up, as Kubernetes rounds.

/// The most a quantity can say: Kubernetes keeps 63 bits.
const MOST: u128 = i64::MAX as u128;

/// Digits that are looked at exactly; 20 of them times 2^60 still fit into 128 bits.
const DIGITS: usize = 20;

/// Why a text is no number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number, or more behind it than one suffix.
    #[error(
        "{0:?} is not a quantity: digits and one of Ki, Mi, Gi, Ti, Pi, Ei, k, M, G, T, P, E, m, u, n or an exponent are wanted, as in 4Gi or 1e9"
    )]
    Malformed(String),
    /// A number with a suffix Kubernetes does not know, but a person writes.
    #[error("{text:?} is not a quantity: Kubernetes has no suffix {suffix:?}; {meant} is wanted")]
    Suffix {
        /// The text.
        text: String,
        /// Its suffix.
        suffix: String,
        /// What was probably meant, with its size.
        meant: &'static str,
    },
    /// Below zero.
    #[error("{0:?} is negative: a size is at least 0")]
    Negative(String),
    /// More than 63 bits.
    #[error("{0:?} is more than 9223372036854775807 bytes, the most a Kubernetes quantity can say")]
    TooLarge(String),
    /// More digits than can be kept exactly.
    #[error("{0:?} has more than 20 significant digits")]
    TooPrecise(String),
}

/// The number of bytes `text` says, rounded up to a whole one.
pub fn bytes(text: &str) -> Result<u64, QuantityError> {
    let malformed = || QuantityError::Malformed(text.to_owned());
    let (negative, unsigned) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let end = unsigned
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(malformed());
    }
    let scale = scale(suffix).ok_or_else(|| match meant(suffix) {
        Some(meant) => QuantityError::Suffix {
            text: text.to_owned(),
            suffix: suffix.to_owned(),
            meant,
        },
        None => malformed(),
    })?;

    let fraction = fraction.trim_end_matches('0');
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Ok(0);
    }
    if negative {
        return Err(QuantityError::Negative(text.to_owned()));
    }
    let too_large = || QuantityError::TooLarge(text.to_owned());
    if digits.len() > DIGITS {
        // A long fraction is a matter of precision, a long whole part one of size.
        let whole = whole.trim_start_matches('0');
        return Err(match whole.len() > DIGITS && scale.decimal >= 0 {
            true => too_large(),
            false => QuantityError::TooPrecise(text.to_owned()),
        });
    }
    let mantissa: u128 = digits.parse().map_err(|_| malformed())?;
    let decimal = i64::from(scale.decimal) - i64::try_from(fraction.len()).unwrap_or(i64::MAX);
    let numerator = mantissa << scale.binary;
    let power = |exponent: u64| {
        u32::try_from(exponent)
            .ok()
            .and_then(|exponent| 10_u128.checked_pow(exponent))
    };
    let value = match decimal < 0 {
        false => power(decimal.unsigned_abs())
            .and_then(|factor| numerator.checked_mul(factor))
            .ok_or_else(too_large)?,
        // A divisor beyond 128 bits leaves less than one byte.
        true => power(decimal.unsigned_abs()).map_or(1, |divisor| numerator.div_ceil(divisor)),
    };
    u64::try_from(value)
        .ok()
        .filter(|_| value <= MOST)
        .ok_or_else(too_large)
}

/// A factor of 10^decimal · 2^binary.
#[derive(Clone, Copy)]
struct Scale {
    decimal: i32,
    binary: u32,
}

fn scale(suffix: &str) -> Option<Scale> {
    let decimal = |decimal| Some(Scale { decimal, binary: 0 });
    let binary = |binary| Some(Scale { decimal: 0, binary });
    match suffix {
        "" => decimal(0),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            // Beyond nine digits the sign alone decides.
            let clamped = if digits.len() > 9 {
                "999999999"
            } else {
                digits
            };
            let size: i32 = clamped.parse().ok().filter(|_| is_number)?;
            decimal(if exponent.starts_with('-') {
                -size
            } else {
                size
            })
        }
    }
}

/// What people mean by the suffixes of other programs.
fn meant(suffix: &str) -> Option<&'static str> {
    match suffix.to_ascii_lowercase().as_str() {
        "k" | "kb" => Some("k (10^3) or Ki (2^10)"),
        "mb" => Some("M (10^6) or Mi (2^20)"),
        "g" | "gb" => Some("G (10^9) or Gi (2^30)"),
        "t" | "tb" => Some("T (10^12) or Ti (2^40)"),
        "p" | "pb" => Some("P (10^15) or Pi (2^50)"),
        "eb" => Some("E (10^18) or Ei (2^60)"),
        "ki" | "kib" => Some("Ki"),
        "mi" | "mib" => Some("Mi"),
        "gi" | "gib" => Some("Gi"),
        "ti" | "tib" => Some("Ti"),
        "pi" | "pib" => Some("Pi"),
        "ei" | "eib" => Some("Ei"),
        "b" => Some("no suffix at all"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubernetes_accepts_is_understood_exactly() {
        for (text, want) in [
            ("0", 0),
            ("-0", 0),
            ("+1", 1),
            ("4Gi", 4 << 30),
            ("256Mi", 256 << 20),
            ("1Ki", 1024),
            ("1k", 1000),
            ("1.5Gi", 3 << 29),
            (".5Ki", 512),
            ("5.", 5),
            ("1e9", 1_000_000_000),
            ("1E3", 1000),
            ("1E", 1_000_000_000_000_000_000),
            ("12e-1", 2),
            ("7Ei", 7 << 60),
            ("500m", 1),
            ("1001m", 2),
            ("1n", 1),
            ("0.8", 1),
            ("0.1Ki", 103),
            ("1e-999999999999", 1),
            ("0e999999999999", 0),
            ("9223372036854775807", i64::MAX as u64),
            ("00000000000000000000000000001", 1),
            ("1.000000000000000000000000000", 1),
        ] {
            assert_eq!(bytes(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused_with_what_would_be_right() {
        for (text, want) in [
            (
                "4Gib",
                "\"4Gib\" is not a quantity: Kubernetes has no suffix \"Gib\"; Gi is wanted",
            ),
            (
                "2GB",
                "\"2GB\" is not a quantity: Kubernetes has no suffix \"GB\"; G (10^9) or Gi (2^30) is wanted",
            ),
            (
                "1K",
                "\"1K\" is not a quantity: Kubernetes has no suffix \"K\"; k (10^3) or Ki (2^10) is wanted",
            ),
            ("-1", "\"-1\" is negative: a size is at least 0"),
            ("-1e9", "\"-1e9\" is negative: a size is at least 0"),
            (
                "8Ei",
                "\"8Ei\" is more than 9223372036854775807 bytes, the most a Kubernetes quantity can say",
            ),
            (
                "1e99",
                "\"1e99\" is more than 9223372036854775807 bytes, the most a Kubernetes quantity can say",
            ),
            (
                "99999999999999999999999",
                "\"99999999999999999999999\" is more than 9223372036854775807 bytes, the most a Kubernetes quantity can say",
            ),
            (
                "1.00000000000000000000001",
                "\"1.00000000000000000000001\" has more than 20 significant digits",
            ),
        ] {
            assert_eq!(bytes(text).unwrap_err().to_string(), want, "{text}");
        }
        for text in [
            "", "-", ".", "Gi", "four", "4 Gi", " 4Gi", "1..2", "1.2.3", "1e", "1e1.5", "0x10",
            "1ee3", "٤Gi", "--1",
        ] {
            assert!(
                matches!(bytes(text), Err(QuantityError::Malformed(_))),
                "{text:?}: {:?}",
                bytes(text)
            );
        }
    }
}
