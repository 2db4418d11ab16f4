//! Replays a recorded conversation: says what the client said, and compares what the server says
//! byte for byte with what vineyardd said, once values that must differ are mapped.

use std::collections::HashMap;
use std::fs::{File, read_to_string};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use crate::mapping::{Figures, Mapping};
use crate::server::{Client, LIMIT, Server, frame};
use vinelet::shard::protocol::zstd::{MAX_CHUNK, Packer, Unpacker};

/// Where we answer otherwise than vineyardd did, and why.
#[derive(Clone, Copy)]
pub(crate) struct Difference {
    /// What the recorded request contains.
    pub(crate) request: &'static str,
    /// What our reply is, or begins with.
    pub(crate) ours: &'static str,
    pub(crate) why: &'static str,
}

/// What makes a conversation special.
#[derive(Default)]
pub(crate) struct Conversation {
    pub(crate) name: &'static str,
    pub(crate) differences: &'static [Difference],
    /// Whether the server has a disk to spill to.
    pub(crate) spills: bool,
    /// Bytes that the recorded server held of other conversations.
    pub(crate) held: u64,
    /// Recorded figures of memory in use, and what they are here: in statuses, and in errors.
    pub(crate) usage: Figures,
    pub(crate) usage_told: Figures,
}

struct Connection {
    client: Client,
    transport: String,
    arena: Option<File>,
    /// What follows is vineyardd's, up to the next request.
    differs: bool,
    packer: Packer,
    unpacker: Unpacker,
}

struct Replay<'a> {
    server: &'a Server,
    conversation: &'a Conversation,
    mapping: Mapping,
    connections: HashMap<u64, Connection>,
    /// Contents written into shared memory, by our blob ids.
    contents: HashMap<u64, Vec<u8>>,
    used: Vec<bool>,
    compared: usize,
}

/// Replays a conversation against a server of its own; the number of replies compared.
pub(crate) fn replay(conversation: &Conversation) -> usize {
    let server = match conversation.spills {
        true => Server::spilling(),
        false => Server::start(),
    };
    if conversation.held > 0 {
        let mut before = server.registered_rpc();
        let held = serde_json::json!({"type": "create_buffer_request", "size": conversation.held});
        let id = before.ask(&held)["id"].clone();
        before.ask(&serde_json::json!({"type": "seal_request", "object_id": id}));
        assert!(before.rest().is_empty());
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/transcripts")
        .join(conversation.name)
        .with_extension("jsonl");
    let mut replay = Replay {
        server: &server,
        conversation,
        mapping: Mapping::new(conversation.usage, conversation.usage_told),
        connections: HashMap::new(),
        contents: HashMap::new(),
        used: vec![false; conversation.differences.len()],
        compared: 0,
    };
    for line in read_to_string(path).unwrap().lines() {
        replay.event(&serde_json::from_str(line).unwrap());
    }
    for (difference, used) in conversation.differences.iter().zip(&replay.used) {
        assert!(used, "never asked: {}", difference.request);
    }
    replay.compared
}

impl Replay<'_> {
    fn event(&mut self, event: &Value) {
        let kind = event["kind"].as_str().unwrap();
        if matches!(kind, "title" | "note") {
            return;
        }
        let id = event["conn"].as_u64().unwrap();
        let from_client = event["dir"] == "c2s";
        if kind == "eof" {
            if let Some(connection) = self.connections.remove(&id) {
                let rest = connection.client.rest();
                assert!(
                    rest.is_empty(),
                    "unasked: {}",
                    String::from_utf8_lossy(&rest)
                );
                self.count();
            }
            return;
        }
        self.connect(id, event);
        match kind {
            "frame" if from_client => self.request(id, event),
            "open" => {}
            "blob_content" => self.write_content(id, event),
            _ if self.connections[&id].differs => {}
            "frame" => self.reply(id, event),
            "fd" => {
                let connection = self.connections.get_mut(&id).unwrap();
                let arena = connection.client.receive_descriptor();
                // Clients map map_size - 8 bytes.
                assert!(arena.metadata().unwrap().len() >= LIMIT);
                connection.arena = Some(arena);
            }
            "payload" => self.payload(id, event, from_client),
            "chunk" => self.chunk(id, event, from_client),
            other => panic!("{other}: {event}"),
        }
    }

    fn connect(&mut self, id: u64, event: &Value) {
        if self.connections.contains_key(&id) {
            return;
        }
        let transport = event["tr"].as_str().unwrap().to_owned();
        let mut client = match transport.as_str() {
            "ipc" => self.server.ipc(),
            _ => self.server.rpc(),
        };
        // Some were recorded in the midst of a connection.
        if event["kind"] == "frame" {
            client.register();
        }
        let connection = Connection {
            client,
            transport,
            arena: None,
            differs: false,
            packer: Packer::default(),
            unpacker: Unpacker::default(),
        };
        self.connections.insert(id, connection);
        self.count();
    }

    fn count(&mut self) {
        let count = |transport| {
            let of = |connection: &&Connection| connection.transport == transport;
            self.connections.values().filter(of).count() as u64
        };
        (self.mapping.ipc_connections, self.mapping.rpc_connections) = (count("ipc"), count("rpc"));
    }

    fn request(&mut self, id: u64, event: &Value) {
        let raw = match event["raw"].as_str() {
            Some(raw) => raw.as_bytes().to_vec(),
            None => hex(event["hex"].as_str().unwrap()),
        };
        let body = match serde_json::from_slice::<Value>(&raw) {
            Ok(recorded) => {
                let ours = self.mapping.request(&recorded);
                if ours == recorded {
                    raw.clone()
                } else {
                    ours.to_string().into_bytes()
                }
            }
            Err(_) => raw.clone(),
        };
        let text = String::from_utf8_lossy(&raw);
        let differences = self.conversation.differences;
        let difference = differences
            .iter()
            .position(|difference| text.contains(difference.request));
        let connection = self.connections.get_mut(&id).unwrap();
        connection.differs = difference.is_some();
        connection.client.send(&body);
        if let Some(at) = difference {
            self.used[at] = true;
            let reply = connection.client.receive();
            let Difference { ours, why, .. } = differences[at];
            assert!(
                reply.starts_with(ours),
                "{text}: {reply} is not {ours} ({why})"
            );
        }
    }

    fn reply(&mut self, id: u64, event: &Value) {
        let recorded: Value = serde_json::from_str(event["raw"].as_str().unwrap()).unwrap();
        let connection = self.connections.get_mut(&id).unwrap();
        let text = connection.client.receive();
        let ours: Value = serde_json::from_str(&text).unwrap();
        self.compared += 1;
        if is_parse_error(&recorded) {
            // What follows is the words of a C++ library.
            assert!(is_parse_error(&ours), "{text}");
            return;
        }
        let mut expected = self.mapping.reply(&recorded, &ours);
        if recorded["type"] == "register_reply" {
            // Bytes travel as they are.
            expected["support_rpc_compression"] = false.into();
        }
        assert_eq!(text, expected.to_string(), "{}", event["seq"]);
        self.check_payloads(id, &ours);
    }

    /// Every blob lies aligned within the arena, and has the contents that were written.
    fn check_payloads(&self, id: u64, reply: &Value) {
        let created = reply.get("created").into_iter();
        let all = created.chain(reply["payloads"].as_array().into_iter().flatten());
        for payload in all.filter(|payload| payload["store_fd"] != -1) {
            let [offset, size, map_size] =
                ["data_offset", "data_size", "map_size"].map(|key| payload[key].as_u64().unwrap());
            assert!(
                offset % 64 == 0 && offset + size <= map_size - 8,
                "{payload}"
            );
            let content = self.contents.get(&payload["object_id"].as_u64().unwrap());
            if let (Some(content), Some(arena)) = (content, &self.connections[&id].arena) {
                assert_eq!(&read_at(arena, offset, content.len()), content);
            }
        }
        for payload in reply.get("created").into_iter() {
            assert_eq!(payload["object_id"], reply["id"]);
        }
    }

    /// Does what the client did to the shared memory.
    fn write_content(&mut self, id: u64, event: &Value) {
        let blob = self.mapping.our_id(event["object_id"].as_u64().unwrap());
        let content = base64(event["head_b64"].as_str().unwrap());
        let connection = self.connections.get_mut(&id).unwrap();
        let Some(arena) = &connection.arena else {
            return;
        };
        // Where the blob lies, asked on a connection of our own.
        let mut other = self.server.registered();
        let reply = other.ask(&serde_json::json!(
            {"type": "get_buffers_request", "ids": [blob], "unsafe": true}
        ));
        drop(other.receive_descriptor());
        let offset = reply["payloads"][0]["data_offset"].as_u64().unwrap();
        arena.write_all_at(&content, offset).unwrap();
        self.contents.insert(blob, content);
    }

    fn payload(&mut self, id: u64, event: &Value, from_client: bool) {
        let length = usize::try_from(event["len"].as_u64().unwrap()).unwrap();
        let mut bytes = base64(event["head_b64"].as_str().unwrap());
        bytes.resize(length, 0xa5);
        let client = &mut self.connections.get_mut(&id).unwrap().client;
        if from_client {
            client.send_raw(&bytes);
        } else {
            let mut received = vec![0; length];
            client.receive_raw(&mut received);
            assert!(received == bytes, "{} bytes differ", length);
        }
    }
}

impl Replay<'_> {
    /// A compressed chunk. Short ones are sent as recorded; of long ones the head only is known,
    /// and there are as many of them as blocks of 128 KiB in their blob.
    fn chunk(&mut self, id: u64, event: &Value, from_client: bool) {
        let length = usize::try_from(event["len"].as_u64().unwrap()).unwrap();
        let head = base64(event["head_b64"].as_str().unwrap());
        let is_first = head.starts_with(b"\x28\xb5\x2f\xfd");
        let connection = self.connections.get_mut(&id).unwrap();
        if from_client {
            if head.len() == length {
                connection.client.send_raw(&frame(&head));
            } else {
                if is_first {
                    connection.packer = Packer::default();
                }
                let mut chunk = Vec::new();
                let bytes: Vec<u8> = (0..Packer::MOST).map(|at| (at % 251) as u8).collect();
                connection.packer.chunk(&bytes, &mut chunk);
                connection.client.send_raw(&chunk);
            }
            return;
        }
        if is_first {
            connection.unpacker = Unpacker::default();
        }
        let mut length = [0; 8];
        connection.client.receive_raw(&mut length);
        let length = u64::from_le_bytes(length);
        assert!(length <= MAX_CHUNK);
        let mut chunk = vec![0; usize::try_from(length).unwrap()];
        connection.client.receive_raw(&mut chunk);
        connection.unpacker.feed(&chunk);
        assert!(connection.unpacker.next_block().unwrap().is_some());
        assert_eq!(connection.unpacker.next_block(), Ok(None));
        assert!(!connection.unpacker.is_in_midst(), "flushed");
    }
}

fn read_at(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn is_parse_error(reply: &Value) -> bool {
    let message = reply["message"].as_str().unwrap_or_default();
    reply["code"] == 1 && message.starts_with("Failed to parse the JSON message: json error: ")
}

fn hex(text: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digits).collect()
}

/// RFC 4648.
fn base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for letter in text.bytes().filter(|&letter| letter != b'=') {
        let value = ALPHABET.iter().position(|&known| known == letter).unwrap();
        bits = bits << 6 | u32::try_from(value).unwrap();
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    bytes
}
