//! From recorded values to ours.
//!
//! Ids, signatures and regions are one to one: a recorded id stands for one of ours for the rest
//! of the conversation, in numbers, in texts like `o6880a01c20400024` and as keys. What no client
//! interprets, or what depends on the machine, may be anything of the same kind.

use std::collections::HashMap;

use regex::{Captures, Regex};
use serde_json::{Map, Value};

/// Fields with ids and signatures.
const IDS: &[&str] = &[
    "chunk",
    "deleted_bids",
    "id",
    "ids",
    "object_id",
    "signature",
    "signatures",
    "target_id",
];

/// Keys of regions; -1 is none.
const REGIONS: &[&str] = &["fd", "fds", "store_fd"];

/// Numbers that may be any.
const FREE_NUMBERS: &[&str] = &[
    "__timestamp",
    "data_offset",
    "hostid",
    "map_size",
    "pointer",
    "timestamp",
];

/// Texts that may be any.
const FREE_TEXTS: &[&str] = &["hostname", "ipc_socket", "nodename", "rpc_endpoint"];

/// Pairs of a recorded number and ours.
pub(crate) type Figures = &'static [(u64, u64)];

/// A bijection that is learnt.
#[derive(Default)]
struct Pairs {
    to_ours: HashMap<u64, u64>,
    to_recorded: HashMap<u64, u64>,
}

impl Pairs {
    fn learn(&mut self, recorded: u64, ours: u64) -> u64 {
        if let Some(&known) = self.to_ours.get(&recorded) {
            return known;
        }
        // Two recorded ids must not become one of ours; the comparison shows it.
        if self.to_recorded.contains_key(&ours) {
            return recorded;
        }
        self.to_ours.insert(recorded, ours);
        self.to_recorded.insert(ours, recorded);
        ours
    }
}

pub(crate) struct Mapping {
    ids: Pairs,
    regions: Pairs,
    id_text: Regex,
    usage_text: Regex,
    /// Recorded figures of memory in use, and what they are here: in statuses, and in errors.
    usage: Figures,
    usage_told: Figures,
    /// What our status says of connections.
    pub(crate) ipc_connections: u64,
    pub(crate) rpc_connections: u64,
}

impl Mapping {
    pub(crate) fn new(usage: Figures, usage_told: Figures) -> Self {
        let mut ids = Pairs::default();
        for fixed in [1 << 63, u64::MAX] {
            ids.learn(fixed, fixed);
        }
        Self {
            ids,
            regions: Pairs::default(),
            id_text: Regex::new("([os])([0-9a-f]{16})").unwrap(),
            usage_text: Regex::new("and ([0-9]+) are already in use$").unwrap(),
            usage,
            usage_told,
            ipc_connections: 0,
            rpc_connections: 0,
        }
    }

    pub(crate) fn our_id(&self, recorded: u64) -> u64 {
        self.ids.to_ours.get(&recorded).copied().unwrap_or(recorded)
    }

    /// A recorded request, as our server has to be asked. Ids that no reply told are the client's
    /// own invention and stay.
    pub(crate) fn request(&mut self, recorded: &Value) -> Value {
        self.translate(recorded, None, "")
    }

    /// A recorded reply, as our server has to give it; `ours` tells what differs by nature.
    pub(crate) fn reply(&mut self, recorded: &Value, ours: &Value) -> Value {
        self.translate(recorded, Some(ours), "")
    }

    fn translate(&mut self, recorded: &Value, ours: Option<&Value>, key: &str) -> Value {
        match recorded {
            Value::Object(object) => Value::Object(self.object(object, ours, key)),
            Value::Array(list) => Value::Array(
                list.iter()
                    .enumerate()
                    .map(|(at, value)| {
                        self.translate(value, ours.and_then(|ours| ours.get(at)), key)
                    })
                    .collect(),
            ),
            Value::Number(number) => match number.as_u64() {
                Some(recorded) => self.number(recorded, ours, key).into(),
                None => recorded.clone(),
            },
            Value::String(text) => {
                Value::String(self.text(text, ours.and_then(Value::as_str), key))
            }
            Value::Null | Value::Bool(_) => recorded.clone(),
        }
    }

    fn object(
        &mut self,
        recorded: &Map<String, Value>,
        ours: Option<&Value>,
        key: &str,
    ) -> Map<String, Value> {
        let our_keys: Vec<&String> = ours
            .and_then(Value::as_object)
            .map(|ours| ours.keys().collect())
            .unwrap_or_default();
        recorded
            .iter()
            .enumerate()
            .map(|(at, (name, value))| {
                // Unknown ids as keys pair up in order.
                let our_key = self.text(name, our_keys.get(at).map(|key| key.as_str()), "");
                let our_value = ours.and_then(|ours| ours.get(&our_key));
                // Where the name of an object says nothing, what it is in does.
                let is_index = name.bytes().all(|b| b.is_ascii_digit());
                let field = if is_index || key == "names" {
                    "id"
                } else {
                    name
                };
                (our_key, self.translate(value, our_value, field))
            })
            .collect()
    }

    fn number(&mut self, recorded: u64, ours: Option<&Value>, key: &str) -> u64 {
        let our_number = ours.and_then(Value::as_u64);
        match key {
            _ if IDS.contains(&key) => self.ids.learn(recorded, our_number.unwrap_or(recorded)),
            _ if REGIONS.contains(&key) => match our_number {
                Some(ours) => self.regions.learn(recorded, ours),
                None => recorded,
            },
            _ if FREE_NUMBERS.contains(&key) && recorded != 0 => our_number.unwrap_or(recorded),
            "memory_usage" => figure(self.usage, recorded),
            "ipc_connections" => self.ipc_connections,
            "rpc_connections" => self.rpc_connections,
            _ => recorded,
        }
    }

    fn text(&mut self, recorded: &str, ours: Option<&str>, key: &str) -> String {
        if FREE_TEXTS.contains(&key) {
            return ours.unwrap_or(recorded).to_owned();
        }
        let our_ids: Vec<u64> = ours
            .map(|ours| {
                self.id_text
                    .captures_iter(ours)
                    .map(|found| hex(&found))
                    .collect()
            })
            .unwrap_or_default();
        let mut our_ids = our_ids.into_iter();
        let ids = &mut self.ids;
        let text = self.id_text.replace_all(recorded, |found: &Captures<'_>| {
            let recorded = hex(found);
            let ours = ids.learn(recorded, our_ids.next().unwrap_or(recorded));
            format!("{}{ours:016x}", &found[1])
        });
        self.usage_text
            .replace(&text, |found: &Captures<'_>| {
                let usage = found[1].parse().unwrap();
                format!("and {} are already in use", figure(self.usage_told, usage))
            })
            .into_owned()
    }
}

fn figure(figures: Figures, recorded: u64) -> u64 {
    let known = figures.iter().find(|(known, _)| *known == recorded);
    known.map_or(recorded, |&(_, ours)| ours)
}

fn hex(found: &Captures<'_>) -> u64 {
    u64::from_str_radix(&found[2], 16).unwrap()
}
