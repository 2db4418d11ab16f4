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
//! node/            composition of `vinelet node`; alone in naming concrete backends; its keeper
//!                  and local carry out what runtimes' files ask for
//! telemetry.rs     the tracing subscriber
//! readiness.rs   ● starting, ready, failing, draining: what the rooms may know of each other
//! errors.rs      ● an error with its causes, on one line
//! sockets.rs       listening sockets that are never seen half made
//! http.rs          /healthz, /readyz, /metrics
//! csi/             kubelet's door
//!   identity, node   decode, call volumes, encode
//!   request.rs     ● protobuf message → validated request
//!   status.rs      ● our errors → gRPC codes, one table
//!   registration.rs  kubelet's plugin registration
//!   authority.rs     the header that kubelet gets wrong, mended below HTTP/2
//!   door.rs, dial.rs the two ends of a CSI socket
//! volumes/         what it means for a volume to be published
//!   context.rs     ● volume_context → which runtime, which directory
//!   plan.rs        ● request + what is at the target → Plan
//!   in_flight.rs   ● one operation per volume and target at a time
//! mounts/          the kernel's mount table, and the only hands that change it
//!   table.rs       ● mountinfo text → MountTable
//!   linux.rs, sys.rs Mounter by syscalls; fake.rs in memory, with faults on demand
//! fuse/            fluid's door: the dummy filesystem
//!   tree.rs        ● inodes and entries; session.rs and adapter.rs bring fuser to it
//! runtimes/        a VineyardRuntime on this node
//!   spec.rs        ● YAML → what it asks for, or which fields are wrong
//!   reconcile.rs   ● wanted + present → steps
//!   layout.rs      ● <ns>/<name> → every path
//!   board.rs         how each runtime fares, for everyone who has to wait
//!   discovery.rs     what clients read; watch.rs: the directory of runtimes
//! supervisor/      keeps processes and descriptors
//!   policy.rs      ● (history, event, now) → what next
//!   message.rs     ● what supervisor and child say to each other
//!   custody.rs       deposits: named descriptors that outlive their users
//!   channel.rs       a child's end of the socketpair; peer.rs: the supervisor's
//! shard/           the per-node store: one vineyard instance; knows nothing of Kubernetes
//!   ids.rs         ● ObjectId, InstanceId, SessionId, Signature, and their text forms
//!   protocol/      ● the vineyard wire; no sockets
//!   server/          clients' doors: IPC, RPC
//!   client.rs        speaks to an instance: probe, figures
//!   store/           the domain: blobs, objects, names, streams, leases
//!     state.rs     ● all maps; every transition returns Effects
//!     graph.rs     ● who uses whom, and what a deletion takes with it
//!     eviction.rs  ● watermarks and coldness → what to spill
//!   memory/          shared memory: allocator and pool (●), and the arena
//!   spill/           blobs on disk: format.rs (●), directory.rs
//! ```

pub mod agent;
pub mod cli;
pub mod csi;
pub mod errors;
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
