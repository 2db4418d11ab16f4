//! vinelet makes vineyard, the shared-memory object store, work on a Kubernetes node.
//!
//! One binary, three roles in three processes:
//!
//! ```text
//! vinelet agent                        supervisor: processes, and the descriptors that outlive them
//!  ├── vinelet node                    kubelet's and fluid's side: CSI, mounts, FUSE, runtimes, HTTP
//!  └── vinelet shard default/vineyard  one vineyard instance per runtime
//! ```
//!
//! # The house
//!
//! Data enters by a door and flows down; nothing flows up. `tests/house.rs` holds the law of
//! who may name whom. `●` marks pure files: values in, values out.
//!
//! ```text
//! main.rs          flags → one role → exit code
//! cli/             one file per subcommand: parse, call a room, print
//! agent.rs         composition of `vinelet agent`
//! node/            composition of `vinelet node`; alone in naming concrete backends
//! telemetry.rs     the tracing subscriber
//! readiness.rs   ● starting, ready, failing, draining: what the rooms may know of each other
//! sockets.rs       listening sockets that are never seen half made
//! http.rs          /healthz, /readyz, /metrics
//! csi/             kubelet's door: Identity, Node, plugin registration
//! volumes/         what it means for a volume to be published
//! mounts/          the kernel's mount table, and the only hands that change it
//! fuse/            fluid's door: the dummy filesystem
//! runtimes/        a VineyardRuntime on this node: its YAML, its paths, its discovery files
//! supervisor/      keeps processes and descriptors
//! shard/           the per-node store: one vineyard instance; knows nothing of Kubernetes
//!   ids.rs       ● ObjectId, InstanceId, SessionId, Signature, and their text forms
//!   protocol/    ● the vineyard wire; no sockets
//!   server/        clients' doors: IPC, RPC
//!   client.rs      speaks to an instance: probe, stats
//!   store/         the domain: blobs, objects, names, leases
//!   memory/        shared memory: allocator and arena
//! ```

pub mod agent;
pub mod cli;
pub mod csi;
pub mod fuse;
pub mod http;
pub mod mounts;
pub mod node;
pub mod readiness;
pub mod runtimes;
pub mod shard;
pub mod sockets;
pub mod supervisor;
pub mod telemetry;
pub mod volumes;
