//! VineyardRuntime YAML → what it asks of this node, or every field that is wrong.
//!
//! The API is fluid's `data.fluid.io/v1alpha1`. Reading the file is the caller's business.
//! A field is obeyed, or it has no meaning on a node, or it is refused by name; the tables below
//! are the whole list. Fields that only the proposal of the API had are known, too.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde_norway::Value;

use super::walk::{FieldError, Fields, Known, Table, Walk, described};
use super::{RuntimeId, RuntimeIdError, quantity};

/// A file beyond this size is not read: etcd takes no larger object either.
pub const FILE_LIMIT: usize = 1 << 20;

/// The port of vineyard's RPC server where nothing else is said.
pub const DEFAULT_RPC_PORT: u16 = 9600;

/// What one VineyardRuntime asks of this node.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RuntimeSpec {
    /// `metadata.namespace` (`default` where absent) and `metadata.name`.
    pub id: RuntimeId,
    /// `spec.tieredstore.levels[0].quota` of the level with `mediumtype: MEM`: bytes that blobs
    /// may take together, at least 1.
    pub memory: u64,
    /// `spec.worker.ports.rpc`, 9600 where absent.
    pub rpc_port: u16,
    /// Whether figures are exported: not `spec.disablePrometheus`.
    pub metrics: bool,
}

/// Why a file holds no runtimes. All that is wrong is told at once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// More bytes than any sensible object has.
    #[error("the file has {0} bytes; at most {FILE_LIMIT} are read")]
    TooLarge(usize),
    /// Bytes that are no text.
    #[error("the file is not UTF-8 text: byte {0} begins no character")]
    NotText(usize),
    /// Text that is not YAML.
    #[error("line {line}, column {column}: {what}")]
    Yaml {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// The parser's words.
        what: String,
    },
    /// Text without a document: empty, or comments only.
    #[error("the file holds no VineyardRuntime")]
    Empty,
    /// YAML that is no VineyardRuntime we can run.
    #[error("{}", joined(.0))]
    Fields(Vec<FieldError>),
    /// The file could not be read at all.
    #[error("reading the file: {0}")]
    Unreadable(String),
}

fn joined(errors: &[FieldError]) -> impl fmt::Display {
    let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

const ROOT: Table = &[
    ("apiVersion", Known::Read),
    ("kind", Known::Read),
    ("metadata", Known::Read),
    ("spec", Known::Read),
    // Written by controllers about a running cluster; says nothing about what is wanted.
    ("status", Known::Ignored),
];

/// ObjectMeta of Kubernetes; only the key of the object matters here.
const METADATA: Table = &[
    ("name", Known::Read),
    ("namespace", Known::Read),
    ("annotations", Known::Ignored),
    ("creationTimestamp", Known::Ignored),
    ("deletionGracePeriodSeconds", Known::Ignored),
    ("deletionTimestamp", Known::Ignored),
    ("finalizers", Known::Ignored),
    ("generateName", Known::Ignored),
    ("generation", Known::Ignored),
    ("labels", Known::Ignored),
    ("managedFields", Known::Ignored),
    ("ownerReferences", Known::Ignored),
    ("resourceVersion", Known::Ignored),
    ("selfLink", Known::Ignored),
    ("uid", Known::Ignored),
];

const SPEC: Table = &[
    // How many nodes run a worker. Every node with an agent and this file runs one, so the
    // number is not about this node.
    ("replicas", Known::Read),
    ("master", Known::Read),
    ("worker", Known::Read),
    ("fuse", Known::Read),
    ("tieredstore", Known::Read),
    ("disablePrometheus", Known::Read),
    ("podMetadata", Known::Later),
    ("volumes", Known::Later),
];

/// etcd, which the embedded metadata store makes unnecessary.
const MASTER: Table = &[
    ("enabled", Known::Later),
    ("endpoint", Known::Later),
    ("env", Known::Later),
    ("image", Known::Later),
    ("imagePullPolicy", Known::Later),
    ("imageTag", Known::Later),
    ("networkMode", Known::Later),
    ("nodeSelector", Known::Later),
    ("options", Known::Later),
    ("podMetadata", Known::Later),
    ("ports", Known::Later),
    ("replicas", Known::Later),
    ("resources", Known::Later),
    ("volumeMounts", Known::Later),
];

const WORKER: Table = &[
    // As `spec.replicas`, in the proposal's place.
    ("replicas", Known::Read),
    ("ports", Known::Read),
    ("env", Known::Later),
    ("image", Known::Later),
    ("imagePullPolicy", Known::Later),
    ("imageTag", Known::Later),
    ("networkMode", Known::Later),
    ("nodeSelector", Known::Later),
    ("options", Known::Later),
    ("podMetadata", Known::Later),
    ("properties", Known::Later),
    ("resources", Known::Later),
    ("volumeMounts", Known::Later),
];

const WORKER_PORTS: Table = &[("rpc", Known::Read), ("exporter", Known::Later)];

const FUSE: Table = &[
    ("cleanPolicy", Known::Later),
    ("env", Known::Later),
    ("image", Known::Later),
    ("imagePullPolicy", Known::Later),
    ("imageTag", Known::Later),
    ("networkMode", Known::Later),
    ("options", Known::Later),
    ("podMetadata", Known::Later),
    ("resources", Known::Later),
];

const TIEREDSTORE: Table = &[("levels", Known::Read)];

const LEVEL: Table = &[
    // The proposal numbers the levels; the list has an order of its own.
    ("level", Known::Read),
    ("mediumtype", Known::Read),
    // The proposal's prose and other runtimes of fluid write it so.
    ("mediumType", Known::Read),
    ("quota", Known::Read),
    // The API server fills in `hostPath` here even for memory, which lies on no volume.
    ("volumeType", Known::Read),
    ("high", Known::Later),
    ("low", Known::Later),
    ("path", Known::Later),
    ("quotaList", Known::Later),
    ("volumeSource", Known::Later),
];

/// The runtimes of a file: one per document, all of them or none.
pub fn parse(file: &[u8]) -> Result<Vec<RuntimeSpec>, SpecError> {
    if file.len() > FILE_LIMIT {
        return Err(SpecError::TooLarge(file.len()));
    }
    let text = std::str::from_utf8(file).map_err(|e| SpecError::NotText(e.valid_up_to()))?;
    let mut documents = Vec::new();
    for document in serde_norway::Deserializer::from_str(text) {
        let value = Value::deserialize(document).map_err(yaml_error)?;
        // `---` at the end of a file begins a document that says nothing.
        if !value.is_null() {
            documents.push(value);
        }
    }
    if documents.is_empty() {
        return Err(SpecError::Empty);
    }

    let several = documents.len() > 1;
    let mut specs = Vec::new();
    let mut errors = Vec::new();
    let mut ids = BTreeSet::new();
    for (index, document) in documents.iter().enumerate() {
        let mut found = runtime(document);
        if let Ok(spec) = &found
            && !ids.insert(spec.id.clone())
        {
            found = Err(vec![FieldError {
                path: "metadata.name".to_owned(),
                what: format!("{} is in this file already", spec.id),
            }]);
        }
        match found {
            Ok(spec) => specs.push(spec),
            Err(found) => errors.extend(found.into_iter().map(|mut error| {
                if several {
                    error.path = format!("document {}: {}", index + 1, error.path);
                }
                error
            })),
        }
    }
    match errors.is_empty() {
        true => Ok(specs),
        false => Err(SpecError::Fields(errors)),
    }
}

fn yaml_error(error: serde_norway::Error) -> SpecError {
    let (line, column) = error
        .location()
        .map_or((1, 1), |at| (at.line(), at.column()));
    let what = error.to_string();
    // The parser ends its text with the place, which is told already.
    let place = format!(" at line {line} column {column}");
    SpecError::Yaml {
        line,
        column,
        what: what.replace(&place, ""),
    }
}

/// One document.
fn runtime(document: &Value) -> Result<RuntimeSpec, Vec<FieldError>> {
    let mut walk = Walk::default();
    if !document.is_mapping() {
        walk.complain(
            "kind",
            format!(
                "a VineyardRuntime is wanted here, not {}",
                described(document)
            ),
        );
        return walk.finish(None);
    }
    let api_version = document.get("apiVersion").and_then(Value::as_str);
    let kind = document.get("kind").and_then(Value::as_str);
    let mut is_ours = true;
    for (field, found, wanted) in [
        ("apiVersion", api_version, "data.fluid.io/v1alpha1"),
        ("kind", kind, "VineyardRuntime"),
    ] {
        if found != Some(wanted) {
            is_ours = false;
            let what = match document.get(field) {
                None | Some(Value::Null) => format!("{wanted} is wanted here"),
                Some(other) => format!("{wanted} is wanted here, not {}", described(other)),
            };
            walk.complain(field, what);
        }
    }
    if !is_ours {
        // The fields of some other object would only be noise.
        return walk.finish(None);
    }
    let root = walk.mapping("", Some(document), ROOT);
    let id = id(&mut walk, &root);
    let spec = walk.mapping("spec", root.get("spec"), SPEC);
    walk.integer(&spec, "replicas", 0, i32::MAX.into());
    walk.mapping("spec.master", spec.get("master"), MASTER);
    walk.mapping("spec.fuse", spec.get("fuse"), FUSE);
    let rpc_port = rpc_port(&mut walk, &spec);
    let memory = memory(&mut walk, &spec);
    let metrics = !walk.boolean(&spec, "disablePrometheus").unwrap_or(false);
    let found = match (id, memory) {
        (Some(id), Some(memory)) => Some(RuntimeSpec {
            id,
            memory,
            rpc_port,
            metrics,
        }),
        _ => None,
    };
    walk.finish(found)
}

fn id(walk: &mut Walk, root: &Fields<'_>) -> Option<RuntimeId> {
    let metadata = walk.mapping("metadata", root.get("metadata"), METADATA);
    if metadata.get("name").is_none() {
        walk.complain("metadata.name", "a name is required");
    }
    let name = walk.text(&metadata, "name");
    let namespace = match metadata.get("namespace") {
        None => Some("default"),
        Some(_) => walk.text(&metadata, "namespace"),
    };
    match RuntimeId::new(namespace?, name?) {
        Ok(id) => Some(id),
        Err(RuntimeIdError::Name { field, value }) => {
            walk.complain(
                format!("metadata.{field}"),
                format!(
                    "{value:?} is not a Kubernetes name: lower-case letters, digits and '-' are wanted, \
                     beginning and ending with a letter or digit, at most 63 characters"
                ),
            );
            None
        }
        Err(error @ RuntimeIdError::Shape(_)) => {
            walk.complain("metadata", error.to_string());
            None
        }
    }
}

fn rpc_port(walk: &mut Walk, spec: &Fields<'_>) -> u16 {
    let worker = walk.mapping("spec.worker", spec.get("worker"), WORKER);
    walk.integer(&worker, "replicas", 0, i32::MAX.into());
    let ports = walk.mapping("spec.worker.ports", worker.get("ports"), WORKER_PORTS);
    walk.integer(&ports, "rpc", 1, u16::MAX.into())
        .and_then(|port| u16::try_from(port).ok())
        .unwrap_or(DEFAULT_RPC_PORT)
}

fn memory(walk: &mut Walk, spec: &Fields<'_>) -> Option<u64> {
    let store = walk.mapping("spec.tieredstore", spec.get("tieredstore"), TIEREDSTORE);
    let levels = match store.get("levels") {
        Some(Value::Sequence(levels)) => levels.as_slice(),
        None => &[],
        Some(other) => {
            let what = format!("a list is wanted here, not {}", described(other));
            walk.complain("spec.tieredstore.levels", what);
            return None;
        }
    };
    let Some((first, more)) = levels.split_first() else {
        walk.complain(
            "spec.tieredstore.levels",
            "a level is required, as in [{mediumtype: MEM, quota: 4Gi}]",
        );
        return None;
    };
    for (index, _) in more.iter().enumerate() {
        walk.complain(
            format!("spec.tieredstore.levels[{}]", index + 1),
            "not supported yet: memory alone, level 0, can be used",
        );
    }

    let level = walk.mapping("spec.tieredstore.levels[0]", Some(first), LEVEL);
    walk.integer(&level, "level", 0, 0);
    medium(walk, &level);
    if let Some(volume_type) = walk.text(&level, "volumeType")
        && !["hostPath", "emptyDir"].contains(&volume_type)
    {
        let what = format!("hostPath or emptyDir is wanted here, not the text {volume_type:?}");
        walk.complain(level.path_of("volumeType"), what);
    }
    quota(walk, &level)
}

fn medium(walk: &mut Walk, level: &Fields<'_>) {
    let spellings = ["mediumtype", "mediumType"];
    let there: Vec<_> = spellings
        .into_iter()
        .filter(|name| level.get(name).is_some())
        .collect();
    if there.is_empty() {
        walk.complain(level.path_of("mediumtype"), "MEM is required for level 0");
    }
    if there == spellings {
        walk.complain(
            level.path_of("mediumType"),
            "mediumtype is there already; one of the two is wanted",
        );
    }
    for name in there {
        if let Some(medium) = walk.text(level, name)
            && medium != "MEM"
        {
            let what = format!("MEM is wanted for level 0, not the text {medium:?}");
            walk.complain(level.path_of(name), what);
        }
    }
}

fn quota(walk: &mut Walk, level: &Fields<'_>) -> Option<u64> {
    let path = level.path_of("quota");
    let text = match level.get("quota") {
        None => {
            walk.complain(path, "a size is required, as in 4Gi");
            return None;
        }
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) if !number.is_f64() => number.to_string(),
        Some(other) => {
            let what = format!("a size is wanted here, as in 4Gi, not {}", described(other));
            walk.complain(path, what);
            return None;
        }
    };
    match quantity::bytes(&text) {
        Ok(0) => {
            walk.complain(
                path,
                format!("{text:?} is no memory at all: a size such as 4Gi is wanted"),
            );
            None
        }
        Ok(bytes) => Some(bytes),
        Err(error) => {
            walk.complain(path, error.to_string());
            None
        }
    }
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
