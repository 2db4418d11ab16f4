//! `<namespace>/<name>` → every path of a runtime on this node.
//!
//! ```text
//! R/<ns>/<name>/
//!   vineyard-worker.sock                  the instance's socket
//!   vineyard.sock -> vineyard-worker.sock the name that clients use
//!   vineyard-config.yaml                  what official clients read
//!   rpc-conf/VINEYARD_RPC_ENDPOINT        service discovery, as fluid's configmap
//!   vineyard-fuse/                        the runtime's directory once more: fluid_path
//!     dummy-path/                         the dummy FUSE filesystem
//! ```

use std::path::{Path, PathBuf};

use super::RuntimeId;

/// File name of the instance's socket.
pub const WORKER_SOCKET: &str = "vineyard-worker.sock";
/// File name of the link that clients use.
pub const SOCKET: &str = "vineyard.sock";
/// File name of what official clients read.
pub const CONFIG: &str = "vineyard-config.yaml";
/// File name of the endpoint file within `rpc-conf`.
pub const RPC_ENDPOINT: &str = "VINEYARD_RPC_ENDPOINT";

/// Name of the directory that fluid calls `fluid_path`.
pub const FLUID_PATH: &str = "vineyard-fuse";

/// `sun_path` has 108 bytes, one of them for the terminating NUL: unix(7).
pub const SOCKET_PATH_LIMIT: usize = 107;

/// All paths of one runtime. Nothing is looked up: they need not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    id: RuntimeId,
    dir: PathBuf,
}

/// Why a runtime has no place below a root.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The socket could not be bound.
    #[error("socket path {} is {length} bytes long; unix(7) allows {SOCKET_PATH_LIMIT}: choose a shorter runtime root or shorter names", path.display())]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
}

impl Layout {
    /// The paths of `id` below `runtime_root`, if its sockets can be bound there.
    pub fn new(runtime_root: &Path, id: &RuntimeId) -> Result<Self, LayoutError> {
        let layout = Self {
            id: id.clone(),
            dir: runtime_root.join(id.namespace()).join(id.name()),
        };
        // The longest of the two; nobody binds or connects elsewhere on the node.
        let path = layout.worker_socket();
        let length = path.as_os_str().len();
        match length > SOCKET_PATH_LIMIT {
            true => Err(LayoutError::SocketPathTooLong { path, length }),
            false => Ok(layout),
        }
    }

    /// The runtime.
    pub fn id(&self) -> &RuntimeId {
        &self.id
    }

    /// Its directory, which holds all else.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The instance's socket.
    pub fn worker_socket(&self) -> PathBuf {
        self.dir.join(WORKER_SOCKET)
    }

    /// The link to it.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// What official clients read.
    pub fn config(&self) -> PathBuf {
        self.dir.join(CONFIG)
    }

    /// Directory of the endpoint file.
    pub fn rpc_conf_dir(&self) -> PathBuf {
        self.dir.join("rpc-conf")
    }

    /// The endpoint file.
    pub fn rpc_conf(&self) -> PathBuf {
        self.rpc_conf_dir().join(RPC_ENDPOINT)
    }

    /// What fluid calls `fluid_path`: where the runtime's directory is shown to pods.
    pub fn fuse_dir(&self) -> PathBuf {
        self.dir.join(FLUID_PATH)
    }

    /// Where the dummy filesystem is mounted, as everybody else sees it. The directory itself
    /// must exist as [`Layout::dummy_dir`], because the bind at `fuse_dir` is read-only.
    pub fn dummy_path(&self) -> PathBuf {
        self.fuse_dir().join("dummy-path")
    }

    /// The directory in the runtime's own directory that shows up as [`Layout::dummy_path`].
    pub fn dummy_dir(&self) -> PathBuf {
        self.dir.join("dummy-path")
    }

    /// The directory of the runtime's arena on the tmpfs `shm_dir`.
    pub fn arena_dir(&self, shm_dir: &Path) -> PathBuf {
        shm_dir.join(self.id.namespace()).join(self.id.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_that_fluid_and_the_clients_look_for() {
        let id = RuntimeId::new("default", "vineyard").unwrap();
        let layout = Layout::new(Path::new("/runtime-mnt/vineyard"), &id).unwrap();
        let dir = "/runtime-mnt/vineyard/default/vineyard";
        for (path, want) in [
            (layout.dir().to_path_buf(), ""),
            (layout.worker_socket(), "/vineyard-worker.sock"),
            (layout.socket(), "/vineyard.sock"),
            (layout.config(), "/vineyard-config.yaml"),
            (layout.rpc_conf_dir(), "/rpc-conf"),
            (layout.rpc_conf(), "/rpc-conf/VINEYARD_RPC_ENDPOINT"),
            (layout.fuse_dir(), "/vineyard-fuse"),
            (layout.dummy_path(), "/vineyard-fuse/dummy-path"),
            (layout.dummy_dir(), "/dummy-path"),
        ] {
            assert_eq!(path.to_str().unwrap(), format!("{dir}{want}"));
        }
        assert_eq!(
            layout.arena_dir(Path::new("/run/vinelet/shm")),
            Path::new("/run/vinelet/shm/default/vineyard")
        );
    }

    #[test]
    fn a_socket_path_of_107_bytes_is_the_longest() {
        let id = RuntimeId::new("ns", &"n".repeat(63)).unwrap();
        // root + "/ns/" + 63 + "/vineyard-worker.sock"
        let root = |length: usize| PathBuf::from(format!("/{}", "r".repeat(length - 1)));
        let fits = 107 - 4 - 63 - 21;
        assert!(Layout::new(&root(fits), &id).is_ok());
        let error = Layout::new(&root(fits + 1), &id).unwrap_err().to_string();
        assert!(error.starts_with("socket path /rrr"), "{error}");
        assert!(
            error.contains("is 108 bytes long; unix(7) allows 107"),
            "{error}"
        );
    }
}
