//! `<namespace>/<name>`, the key of everything about a runtime.

use std::fmt;
use std::str::FromStr;

/// Namespace and name of a VineyardRuntime, both valid Kubernetes names, so that they are safe
/// as path components and in log lines.
///
/// Serialized as it is displayed: `<namespace>/<name>`.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct RuntimeId {
    namespace: String,
    name: String,
}

/// Why a text is no runtime's id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeIdError {
    /// Not `<namespace>/<name>`.
    #[error("{0:?} is not <namespace>/<name>")]
    Shape(String),
    /// One of the two is not a Kubernetes name.
    #[error(
        "{field} {value:?} is not a Kubernetes name: lower-case letters, digits and '-', beginning and ending with a letter or digit, at most 63 characters"
    )]
    Name {
        /// `namespace` or `name`.
        field: &'static str,
        /// The text.
        value: String,
    },
}

impl RuntimeId {
    /// The runtime `name` of `namespace`.
    pub fn new(namespace: &str, name: &str) -> Result<Self, RuntimeIdError> {
        for (field, value) in [("namespace", namespace), ("name", name)] {
            if !is_dns_label(value) {
                return Err(RuntimeIdError::Name {
                    field,
                    value: value.to_owned(),
                });
            }
        }
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for RuntimeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl From<RuntimeId> for String {
    fn from(id: RuntimeId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for RuntimeId {
    type Error = RuntimeIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for RuntimeId {
    type Err = RuntimeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| RuntimeIdError::Shape(text.to_owned()))?;
        Self::new(namespace, name)
    }
}

/// RFC 1123 label, as Kubernetes uses it for namespaces and for the names of these objects.
fn is_dns_label(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|&b| alphanumeric(b) || b == b'-')
        && alphanumeric(bytes[0])
        && alphanumeric(bytes[bytes.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_safe_as_a_path() {
        for good in ["default/vineyard", "a/b", "ml-1/0features"] {
            assert_eq!(good.parse::<RuntimeId>().unwrap().to_string(), good);
        }
        for bad in [
            "vineyard", "../x", "a/..", "A/b", "a/", "/b", "a/b/c", "a/-b",
        ] {
            assert!(bad.parse::<RuntimeId>().is_err(), "{bad}");
        }
        assert!(RuntimeId::new("a", &"x".repeat(64)).is_err());
    }
}
