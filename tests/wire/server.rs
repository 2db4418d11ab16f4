//! A server on sockets of its own, and a client that sees every byte.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use vinelet::shard::spill::Directory;
use vinelet::shard::store::{Config, Spilling, Store, Watermarks};
use vinelet::shard::{self, Listeners};

/// Nothing here takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// The limit that the transcripts were recorded with.
pub(crate) const LIMIT: u64 = 256 << 20;

pub(crate) struct Server {
    pub(crate) socket: PathBuf,
    pub(crate) port: u16,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    _directory: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with_limit(LIMIT)
    }

    pub(crate) fn with_limit(memory_limit: u64) -> Self {
        Self::open(memory_limit, false)
    }

    /// A server that has a disk.
    pub(crate) fn spilling() -> Self {
        Self::open(LIMIT, true)
    }

    fn open(memory_limit: u64, spills: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vineyard.sock");
        let ipc = shard::bind_ipc(&socket).unwrap();
        let rpc = shard::bind_rpc("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = rpc.local_addr().unwrap().port();
        let spilling = spills.then(|| Spilling {
            disk: Box::new(Directory::open(&directory.path().join("spill"), None).unwrap()),
            watermarks: Watermarks::of(memory_limit, 0.3, 0.8).unwrap(),
        });
        let config = Config {
            memory_limit,
            arena_dir: None,
            reserve_memory: false,
            deployment: "local".into(),
            hostname: "host".into(),
            nodename: "node".into(),
            ipc_socket: socket.to_string_lossy().into_owned(),
            rpc_endpoint: format!("host:{port}"),
        };
        let store = Store::open_with(config, spilling).unwrap();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let listeners = Listeners {
                ipc,
                rpc: Some(rpc),
            };
            runtime.block_on(shard::serve(store, listeners, async {
                drop(stopped.await);
            }))
        });
        Self {
            socket,
            port,
            stop: Some(stop),
            thread: Some(thread),
            _directory: directory,
        }
    }

    pub(crate) fn ipc(&self) -> Client {
        let stream = UnixStream::connect(&self.socket).unwrap();
        Client::new(Stream::Ipc(stream))
    }

    pub(crate) fn rpc(&self) -> Client {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client::new(Stream::Rpc(stream))
    }

    pub(crate) fn registered(&self) -> Client {
        let mut client = self.ipc();
        client.register();
        client
    }

    pub(crate) fn registered_rpc(&self) -> Client {
        let mut client = self.rpc();
        client.register();
        client
    }

    /// Asks to stop, and waits until the server has ended.
    pub(crate) fn stop(mut self) -> std::io::Result<()> {
        self.ask_to_stop();
        self.thread.take().unwrap().join().unwrap()
    }

    pub(crate) fn ask_to_stop(&mut self) {
        drop(self.stop.take());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ask_to_stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

enum Stream {
    Ipc(UnixStream),
    Rpc(TcpStream),
}

pub(crate) struct Client {
    stream: Stream,
}

impl Client {
    fn new(stream: Stream) -> Self {
        match &stream {
            Stream::Ipc(stream) => stream.set_read_timeout(Some(PATIENCE)).unwrap(),
            Stream::Rpc(stream) => stream.set_read_timeout(Some(PATIENCE)).unwrap(),
        }
        Self { stream }
    }

    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        self.try_send_raw(bytes).unwrap();
    }

    pub(crate) fn try_send_raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match &mut self.stream {
            Stream::Ipc(stream) => stream.write_all(bytes),
            Stream::Rpc(stream) => stream.write_all(bytes),
        }
    }

    pub(crate) fn send(&mut self, body: &[u8]) {
        self.send_raw(&frame(body));
    }

    pub(crate) fn receive_raw(&mut self, into: &mut [u8]) {
        match &mut self.stream {
            Stream::Ipc(stream) => stream.read_exact(into).unwrap(),
            Stream::Rpc(stream) => stream.read_exact(into).unwrap(),
        }
    }

    pub(crate) fn receive(&mut self) -> String {
        let mut header = [0; 8];
        self.receive_raw(&mut header);
        let mut body = vec![0; usize::try_from(u64::from_le_bytes(header)).unwrap()];
        self.receive_raw(&mut body);
        String::from_utf8(body).unwrap()
    }

    pub(crate) fn ask_text(&mut self, body: &str) -> String {
        self.send(body.as_bytes());
        self.receive()
    }

    pub(crate) fn ask(&mut self, request: &Value) -> Value {
        serde_json::from_str(&self.ask_text(&request.to_string())).unwrap()
    }

    pub(crate) fn register(&mut self) -> Value {
        let reply =
            self.ask(&json!({"type": "register_request", "version": "0.24.2", "store_type": 1}));
        assert_eq!(reply["type"], "register_reply");
        reply
    }

    /// One byte, and the one descriptor that travels with it.
    pub(crate) fn receive_descriptor(&mut self) -> File {
        let Stream::Ipc(stream) = &self.stream else {
            panic!("no descriptors over TCP");
        };
        let mut bytes = [0; 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            stream.as_fd(),
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .unwrap();
        assert_eq!(received.bytes, 1, "the byte travels alone");
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        assert_eq!(descriptors.len(), 1);
        File::from(descriptors.pop().unwrap())
    }

    /// What the server still says when the client says no more.
    pub(crate) fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match &mut self.stream {
            Stream::Ipc(stream) => {
                drop(stream.shutdown(std::net::Shutdown::Write));
                drop(stream.read_to_end(&mut rest));
            }
            Stream::Rpc(stream) => {
                drop(stream.shutdown(std::net::Shutdown::Write));
                drop(stream.read_to_end(&mut rest));
            }
        }
        rest
    }

    /// Whether the server closes, having said nothing more.
    pub(crate) fn is_closed_by_server(&mut self) -> bool {
        let mut byte = [0];
        let read = match &mut self.stream {
            Stream::Ipc(stream) => stream.read(&mut byte),
            Stream::Rpc(stream) => stream.read(&mut byte),
        };
        match read {
            Ok(0) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
            Ok(_) => false,
        }
    }
}

pub(crate) fn frame(body: &[u8]) -> Vec<u8> {
    let mut frame = (body.len() as u64).to_le_bytes().to_vec();
    frame.extend_from_slice(body);
    frame
}
