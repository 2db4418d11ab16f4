//! ObjectId, InstanceId, SessionId, Signature, and their text forms.
//!
//! All are 64 bits wide. Clients send them as bare JSON numbers, Java's negative ones included:
//! they never pass through a float.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// An object's id; a blob's has the top bit set. Prints as `o` and 16 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ObjectId(pub u64);

/// What is equal in an object and its migrated copies. Prints as `s` and 16 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Signature(pub u64);

/// A store among those that share metadata. Prints as `i` and a decimal number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct InstanceId(pub u64);

/// An isolated store within the instance; the root session is 0. Prints as `S` and 16 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct SessionId(pub i64);

impl ObjectId {
    /// The blob of no bytes. It is not stored; every zero-sized creation yields it.
    pub const EMPTY_BLOB: Self = Self(1 << 63);
    /// "No object". As an argument of `get_data` it means: bring the metadata up to date.
    pub const INVALID: Self = Self(u64::MAX);

    /// Whether the id is of a blob.
    pub fn is_blob(self) -> bool {
        self.0 >> 63 == 1
    }
}

impl InstanceId {
    /// "Several, or unknown": the instance of a global object with members on many.
    pub const UNSPECIFIED: Self = Self(u64::MAX);
}

impl SessionId {
    /// The session of the instance's own socket.
    pub const ROOT: Self = Self(0);
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "o{:016x}", self.0)
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{:016x}", self.0)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "i{}", self.0)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S{:016x}", self.0)
    }
}

/// A text that is no id of the kind asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an id: one letter and 16 hex digits are expected")]
pub struct ParseIdError(String);

impl FromStr for ObjectId {
    type Err = ParseIdError;

    /// Reads `o` and 1 to 16 hex digits.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix('o')
            .filter(|hex| (1..=16).contains(&hex.len()))
            .filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|hex| u64::from_str_radix(hex, 16).ok())
            .map(Self)
            .ok_or_else(|| ParseIdError(text.to_owned()))
    }
}

/// An integer of 64 bits, signed or not, by its bits: `-1` is `u64::MAX`, as the real server
/// reads it.
pub fn bits64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    struct Bits;
    impl serde::de::Visitor<'_> for Bits {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an integer of 64 bits")
        }

        fn visit_u64<E>(self, v: u64) -> Result<u64, E> {
            Ok(v)
        }

        fn visit_i64<E>(self, v: i64) -> Result<u64, E> {
            Ok(v.cast_unsigned())
        }

        fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<u64, E> {
            // The real server takes 5.0 for 5; nothing beyond 2^53 survives the way anyway.
            if v.fract() == 0.0 && v.abs() <= 9_007_199_254_740_992.0 {
                #[allow(clippy::cast_possible_truncation)]
                return Ok((v as i64).cast_unsigned());
            }
            Err(E::invalid_value(serde::de::Unexpected::Float(v), &self))
        }
    }
    deserializer.deserialize_any(Bits)
}

impl<'de> Deserialize<'de> for ObjectId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bits64(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for InstanceId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bits64(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for SessionId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bits64(deserializer).map(|bits| Self(bits.cast_signed()))
    }
}

/// Makes ids that are unique in this process, shaped as vineyard shapes them:
/// milliseconds (41 bits), instance (10 bits), counter (12 bits).
#[derive(Debug, Default)]
pub struct IdGenerator {
    millis: u64,
    counter: u64,
}

impl IdGenerator {
    const COUNTER: u64 = 1 << 12;

    /// The next value, never one given before: when a millisecond's 4096 are used up, or the
    /// clock steps back, the time field runs ahead of the clock.
    fn next(&mut self, now_millis: u64, instance: u64) -> u64 {
        if now_millis > self.millis {
            self.millis = now_millis;
            self.counter = 0;
        } else if self.counter + 1 == Self::COUNTER {
            self.millis += 1;
            self.counter = 0;
        } else {
            self.counter += 1;
        }
        ((self.millis & ((1 << 41) - 1)) << 22) | ((instance & 0x3ff) << 12) | self.counter
    }

    /// A new object's signature and id, in this order consecutive.
    pub fn object(&mut self, now_millis: u64, instance: InstanceId) -> (Signature, ObjectId) {
        let signature = Signature(self.next(now_millis, instance.0));
        (signature, ObjectId(self.next(now_millis, instance.0)))
    }

    /// A new blob's id. Its instance field is 0: blobs are known by (instance, id).
    pub fn blob(&mut self, now_millis: u64) -> ObjectId {
        ObjectId(self.next(now_millis, 0) | ObjectId::EMPTY_BLOB.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_as_vineyard_prints_them() {
        assert_eq!(
            ObjectId(0x6880a01c20400024).to_string(),
            "o6880a01c20400024"
        );
        assert_eq!(ObjectId::EMPTY_BLOB.to_string(), "o8000000000000000");
        assert_eq!(Signature(1).to_string(), "s0000000000000001");
        assert_eq!(InstanceId(7).to_string(), "i7");
        assert_eq!(SessionId(-1).to_string(), "Sffffffffffffffff");
        assert_eq!(
            "o6880a01c20400024".parse(),
            Ok(ObjectId(0x6880a01c20400024))
        );
        for bad in ["", "o", "6880", "o+1", "o12345678123456781", "s1"] {
            assert!(bad.parse::<ObjectId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn negative_and_unsigned_numbers_are_the_same_id() {
        let blob: ObjectId = serde_json::from_str("-9223372036854775808").unwrap();
        assert_eq!(blob, ObjectId::EMPTY_BLOB);
        let max: ObjectId = serde_json::from_str("18446744073709551615").unwrap();
        assert_eq!(max, ObjectId::INVALID);
        assert_eq!(
            serde_json::from_str::<ObjectId>("5.0").unwrap(),
            ObjectId(5)
        );
        assert!(serde_json::from_str::<ObjectId>("\"5\"").is_err());
        assert!(serde_json::from_str::<ObjectId>("5.5").is_err());
    }

    #[test]
    fn ids_never_repeat_even_when_the_clock_stands_or_steps_back() {
        let mut ids = IdGenerator::default();
        let mut seen = std::collections::HashSet::new();
        for round in 0..30_000_u64 {
            let now = if round < 20_000 { 1_000 } else { 5 };
            let (signature, object) = ids.object(now, InstanceId(3));
            let blob = ids.blob(now);
            assert!(seen.insert(signature.0) && seen.insert(object.0) && seen.insert(blob.0));
            assert!(blob.is_blob() && !object.is_blob());
        }
    }
}
