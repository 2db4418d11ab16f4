//! `volume_context` → the runtime that is meant.
//!
//! Two forms are understood: fluid's, as its controller writes it on a PersistentVolume, and our
//! own two keys. An ephemeral inline volume is written by a pod's author, so it may name only a
//! runtime of the pod's namespace, and only by our own keys.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use crate::runtimes::{RuntimeId, RuntimeIdError};

use super::VolumeId;

/// What a volume shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The runtime.
    pub runtime: RuntimeId,
    /// A directory below the runtime's, where not all of it is shown.
    pub sub_path: Option<PathBuf>,
}

/// Why a `volume_context` names no runtime.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// No key says which runtime.
    #[error(
        "volume_context names no runtime: write runtimeNamespace and runtimeName (or, as fluid does, fluid_path)"
    )]
    NoRuntime,
    /// An ephemeral inline volume without a name.
    #[error(
        "volumeAttributes name no runtime: write runtimeName, a VineyardRuntime of the pod's namespace"
    )]
    NoName,
    /// `fluid_path` lies elsewhere.
    #[error("volume_context fluid_path {found:?} is not {}/<namespace>/<name>/vineyard-fuse", root.display())]
    FluidPath {
        /// What was given.
        found: String,
        /// Where runtimes live.
        root: PathBuf,
    },
    /// A namespace or name that cannot be one.
    #[error("volume_context {key}: {source}")]
    Id {
        /// The key.
        key: &'static str,
        /// What is wrong.
        source: RuntimeIdError,
    },
    /// Another kind of runtime.
    #[error("volume_context mount_type {0:?} is not vineyard-fuse")]
    MountType(String),
    /// Two keys that do not agree.
    #[error(
        "volume_context {first} says {this:?} but {second} says {that:?}: write one of them, or the same in both"
    )]
    Contradiction {
        /// One key.
        first: &'static str,
        /// What it says.
        this: String,
        /// The other key.
        second: &'static str,
        /// What it says.
        that: String,
    },
    /// A sub path that leads elsewhere.
    #[error("volume_context fluid_sub_path {0:?} is not a relative path without '..'")]
    SubPath(String),
    /// A key that an ephemeral inline volume must not have.
    #[error(
        "volumeAttributes have the key {0:?}, which is not understood: an ephemeral inline volume takes runtimeName and runtimeNamespace"
    )]
    UnknownKey(String),
    /// `csi.storage.k8s.io/ephemeral` is neither `true` nor `false`.
    #[error("volume_context csi.storage.k8s.io/ephemeral is {0:?}, not \"true\" or \"false\"")]
    Ephemeral(String),
    /// Kubelet does not say whose pod it is.
    #[error(
        "kubelet does not say of which pod this ephemeral inline volume is: set podInfoOnMount: true in the CSIDriver object"
    )]
    NoPodInfo,
    /// The runtime belongs to others.
    #[error(
        "an ephemeral inline volume of a pod in namespace {pod:?} cannot use a runtime of namespace {runtime:?}: leave runtimeNamespace out, or use a PersistentVolume"
    )]
    ForeignNamespace {
        /// The pod's.
        pod: String,
        /// The one asked for.
        runtime: String,
    },
}

const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
/// Keys that kubelet and provisioners add.
const FOREIGN_PREFIXES: [&str; 2] = ["csi.storage.k8s.io/", "storage.kubernetes.io/"];

impl Source {
    /// Understands a `volume_context`, for runtimes that live below `runtime_root`.
    ///
    /// Keys that say nothing here are skipped on a PersistentVolume: fluid adds new ones with
    /// its versions. In a pod's volume they are refused, because there they are typing errors.
    pub fn from_context(
        volume_id: &VolumeId,
        context: &HashMap<String, String>,
        runtime_root: &Path,
    ) -> Result<Self, ContextError> {
        // An empty value is an absent one, as in fluid.
        let get = |key: &str| {
            context
                .get(key)
                .map(String::as_str)
                .filter(|v| !v.is_empty())
        };
        let is_ephemeral = match get(EPHEMERAL) {
            Some("true") => true,
            // Without podInfoOnMount kubelet adds no such key, and a pod's author could.
            Some("false") | None if volume_id.is_inline() => return Err(ContextError::NoPodInfo),
            Some("false") | None => false,
            Some(other) => return Err(ContextError::Ephemeral(other.to_owned())),
        };
        if is_ephemeral {
            ephemeral(context, get)
        } else {
            persistent(get, runtime_root)
        }
    }
}

fn ephemeral<'a>(
    context: &HashMap<String, String>,
    get: impl Fn(&str) -> Option<&'a str>,
) -> Result<Source, ContextError> {
    let pod = get(POD_NAMESPACE).ok_or(ContextError::NoPodInfo)?;
    let is_known = |key: &String| {
        ["runtimeName", "runtimeNamespace"].contains(&key.as_str())
            || FOREIGN_PREFIXES
                .iter()
                .any(|prefix| key.starts_with(prefix))
    };
    // The first in order, so that the same mistake reads the same each time.
    if let Some(key) = context.keys().filter(|key| !is_known(key)).min() {
        return Err(ContextError::UnknownKey(key.clone()));
    }
    let name = get("runtimeName").ok_or(ContextError::NoName)?;
    let namespace = get("runtimeNamespace").unwrap_or(pod);
    if namespace != pod {
        return Err(ContextError::ForeignNamespace {
            pod: pod.to_owned(),
            runtime: namespace.to_owned(),
        });
    }
    Ok(Source {
        runtime: id(namespace, name, "runtimeNamespace", "runtimeName")?,
        sub_path: None,
    })
}

fn persistent<'a>(
    get: impl Fn(&str) -> Option<&'a str>,
    runtime_root: &Path,
) -> Result<Source, ContextError> {
    if let Some(other) = get("mount_type").filter(|kind| *kind != "vineyard-fuse") {
        return Err(ContextError::MountType(other.to_owned()));
    }
    let runtime = match (
        get("fluid_path"),
        get("runtimeNamespace"),
        get("runtimeName"),
    ) {
        (Some(path), ..) => from_fluid_path(path, runtime_root)?,
        (None, Some(namespace), Some(name)) => {
            id(namespace, name, "runtimeNamespace", "runtimeName")?
        }
        (None, ..) => return Err(ContextError::NoRuntime),
    };
    let first = match get("fluid_path") {
        Some(_) => "fluid_path",
        None => "runtimeNamespace and runtimeName",
    };
    for (second, is) in [
        ("runtime_namespace", runtime.namespace()),
        ("runtime_name", runtime.name()),
        ("runtimeNamespace", runtime.namespace()),
        ("runtimeName", runtime.name()),
    ] {
        if let Some(says) = get(second).filter(|says| *says != is) {
            return Err(ContextError::Contradiction {
                first,
                this: get("fluid_path").map_or_else(|| runtime.to_string(), str::to_owned),
                second,
                that: says.to_owned(),
            });
        }
    }
    let sub_path = get("fluid_sub_path").map(sub_path).transpose()?.flatten();
    Ok(Source { runtime, sub_path })
}

fn from_fluid_path(text: &str, runtime_root: &Path) -> Result<RuntimeId, ContextError> {
    let elsewhere = || ContextError::FluidPath {
        found: text.to_owned(),
        // Without what a trailing slash would double.
        root: runtime_root.components().collect(),
    };
    let below = Path::new(text)
        .strip_prefix(runtime_root)
        .map_err(|_| elsewhere())?;
    let names: Option<Vec<_>> = below
        .components()
        .map(|component| match component {
            Component::Normal(name) => name.to_str(),
            Component::Prefix(_)
            | Component::RootDir
            | Component::CurDir
            | Component::ParentDir => None,
        })
        .collect();
    match names.as_deref() {
        Some([namespace, name, "vineyard-fuse"]) => id(namespace, name, "fluid_path", "fluid_path"),
        Some(_) | None => Err(elsewhere()),
    }
}

/// Relative, without `..`; none if it names the directory itself.
fn sub_path(text: &str) -> Result<Option<PathBuf>, ContextError> {
    let mut path = PathBuf::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) if !text.contains('\0') => path.push(name),
            Component::CurDir => {}
            Component::Normal(_)
            | Component::Prefix(_)
            | Component::RootDir
            | Component::ParentDir => {
                return Err(ContextError::SubPath(text.to_owned()));
            }
        }
    }
    Ok(Some(path).filter(|path| !path.as_os_str().is_empty()))
}

fn id(
    namespace: &str,
    name: &str,
    namespace_key: &'static str,
    name_key: &'static str,
) -> Result<RuntimeId, ContextError> {
    RuntimeId::new(namespace, name).map_err(|source| {
        let is_name = matches!(&source, RuntimeIdError::Name { field: "name", .. });
        let key = if is_name { name_key } else { namespace_key };
        ContextError::Id { key, source }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "/runtime-mnt/vineyard/";
    const FLUID: &[(&str, &str)] = &[
        (
            "fluid_path",
            "/runtime-mnt/vineyard/default/vineyard/vineyard-fuse",
        ),
        ("mount_type", "vineyard-fuse"),
        ("runtime_name", "vineyard"),
        ("runtime_namespace", "default"),
        ("mount_pod_node_selector_key", "fluid.io/f-default-vineyard"),
        ("node_publish_method", "symlink"),
    ];
    const POD: &[(&str, &str)] = &[
        ("csi.storage.k8s.io/ephemeral", "true"),
        ("csi.storage.k8s.io/pod.name", "p"),
        ("csi.storage.k8s.io/pod.namespace", "ml"),
        ("csi.storage.k8s.io/pod.uid", "u"),
        ("csi.storage.k8s.io/serviceAccount.name", "default"),
    ];

    fn check(
        base: &[(&str, &str)],
        more: &[(&str, &str)],
        expected: Result<(&str, Option<&str>), &str>,
    ) {
        check_id("default-vineyard", base, more, expected);
    }

    fn check_id(
        id: &str,
        base: &[(&str, &str)],
        more: &[(&str, &str)],
        expected: Result<(&str, Option<&str>), &str>,
    ) {
        let context = base.iter().chain(more);
        let context = context
            .map(|&(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
        let outcome = Source::from_context(&VolumeId::new(id), &context, Path::new(ROOT));
        let outcome = outcome.map_err(|e| e.to_string()).map(|source| {
            let sub = source
                .sub_path
                .map(|path| path.to_str().unwrap().to_owned());
            (source.runtime.to_string(), sub)
        });
        let expected = expected
            .map(|(id, sub)| (id.to_owned(), sub.map(str::to_owned)))
            .map_err(str::to_owned);
        assert_eq!(outcome, expected, "{more:?}");
    }

    #[test]
    fn what_fluid_writes_is_understood() {
        check(FLUID, &[], Ok(("default/vineyard", None)));
        let slash = [(
            "fluid_path",
            "/runtime-mnt//vineyard/default/vineyard/vineyard-fuse/",
        )];
        check(FLUID, &slash, Ok(("default/vineyard", None)));
        check(FLUID, &[("mount_type", "")], Ok(("default/vineyard", None)));
        let skip = [("fluid.io/skip-check-mount-ready-target", "All")];
        check(FLUID, &skip, Ok(("default/vineyard", None)));
        check(
            FLUID,
            &[("of_a_later_version", "x")],
            Ok(("default/vineyard", None)),
        );
    }

    #[test]
    fn our_own_keys_are_enough() {
        let own = [("runtimeNamespace", "ml"), ("runtimeName", "features")];
        check(&own, &[], Ok(("ml/features", None)));
        check(
            &own,
            &[("storage.kubernetes.io/csiProvisionerIdentity", "x")],
            Ok(("ml/features", None)),
        );
    }

    #[test]
    fn without_a_runtime_it_says_what_to_write() {
        let refused = "volume_context names no runtime: write runtimeNamespace and runtimeName (or, as fluid does, fluid_path)";
        check(&[], &[], Err(refused));
        check(&[("runtimeName", "x")], &[], Err(refused));
        check(FLUID, &[("fluid_path", "")], Err(refused));
    }

    #[test]
    fn a_fluid_path_elsewhere_is_refused() {
        for path in [
            "/etc",
            "/runtime-mnt/vineyard/default/vineyard",
            "/runtime-mnt/vineyard/default/vineyard/vineyard-fuse/x",
            "/runtime-mnt/vineyard/default/../vineyard/vineyard-fuse",
            "/runtime-mnt/vineyardx/default/vineyard/vineyard-fuse",
            "runtime-mnt/vineyard/default/vineyard/vineyard-fuse",
        ] {
            let refused = format!(
                "volume_context fluid_path {path:?} is not /runtime-mnt/vineyard/<namespace>/<name>/vineyard-fuse"
            );
            check(FLUID, &[("fluid_path", path)], Err(&refused));
        }
        check(
            FLUID,
            &[("fluid_path", "/runtime-mnt/vineyard/a/b$(x)/vineyard-fuse")],
            Err(
                "volume_context fluid_path: name \"b$(x)\" is not a Kubernetes name: lower-case letters, digits and '-', beginning and ending with a letter or digit, at most 63 characters",
            ),
        );
    }

    #[test]
    fn keys_that_contradict_each_other_are_both_named() {
        check(
            FLUID,
            &[("runtimeName", "other")],
            Err(
                "volume_context fluid_path says \"/runtime-mnt/vineyard/default/vineyard/vineyard-fuse\" but runtimeName says \"other\": write one of them, or the same in both",
            ),
        );
        check(
            &[("runtimeNamespace", "ml"), ("runtimeName", "features")],
            &[("runtime_namespace", "default")],
            Err(
                "volume_context runtimeNamespace and runtimeName says \"ml/features\" but runtime_namespace says \"default\": write one of them, or the same in both",
            ),
        );
        check(
            FLUID,
            &[("mount_type", "fuse.alluxio-fuse")],
            Err("volume_context mount_type \"fuse.alluxio-fuse\" is not vineyard-fuse"),
        );
    }

    #[test]
    fn a_sub_path_stays_below_the_runtime() {
        check(
            FLUID,
            &[("fluid_sub_path", "a/b/")],
            Ok(("default/vineyard", Some("a/b"))),
        );
        check(
            FLUID,
            &[("fluid_sub_path", "./")],
            Ok(("default/vineyard", None)),
        );
        for bad in ["../../../../../etc", "/etc", "a/../b", "a\0b"] {
            let refused = format!(
                "volume_context fluid_sub_path {bad:?} is not a relative path without '..'"
            );
            check(FLUID, &[("fluid_sub_path", bad)], Err(&refused));
        }
    }

    #[test]
    fn an_inline_volume_may_use_its_own_namespace_only() {
        check(
            POD,
            &[("runtimeName", "features")],
            Ok(("ml/features", None)),
        );
        let own = [("runtimeName", "features"), ("runtimeNamespace", "ml")];
        check(POD, &own, Ok(("ml/features", None)));
        check(
            POD,
            &[("runtimeName", "vineyard"), ("runtimeNamespace", "default")],
            Err(
                "an ephemeral inline volume of a pod in namespace \"ml\" cannot use a runtime of namespace \"default\": leave runtimeNamespace out, or use a PersistentVolume",
            ),
        );
        check(
            POD,
            FLUID,
            Err(
                "volumeAttributes have the key \"fluid_path\", which is not understood: an ephemeral inline volume takes runtimeName and runtimeNamespace",
            ),
        );
        check(
            POD,
            &[("runtimename", "x")],
            Err(
                "volumeAttributes have the key \"runtimename\", which is not understood: an ephemeral inline volume takes runtimeName and runtimeNamespace",
            ),
        );
        check(
            POD,
            &[],
            Err(
                "volumeAttributes name no runtime: write runtimeName, a VineyardRuntime of the pod's namespace",
            ),
        );
    }

    #[test]
    fn an_inline_volume_without_pod_info_is_refused() {
        let no_info = "kubelet does not say of which pod this ephemeral inline volume is: set podInfoOnMount: true in the CSIDriver object";
        let inline = format!("csi-{}", "0a".repeat(32));
        let own = [("runtimeNamespace", "ml"), ("runtimeName", "features")];
        check_id(&inline, &own, &[], Err(no_info));
        // Nor does a pod's author make it a persistent one.
        check_id(
            &inline,
            &own,
            &[("csi.storage.k8s.io/ephemeral", "false")],
            Err(no_info),
        );
        check_id(
            "v",
            &own,
            &[("csi.storage.k8s.io/ephemeral", "true")],
            Err(no_info),
        );
        check(
            FLUID,
            &[("csi.storage.k8s.io/ephemeral", "yes")],
            Err(
                "volume_context csi.storage.k8s.io/ephemeral is \"yes\", not \"true\" or \"false\"",
            ),
        );
    }
}
