//! What supervisor and child say to each other: JSON, one message per datagram. Pure.
//!
//! The supervisor believes no child: [`ToSupervisor::decode`] lets through only what keeps the
//! limits below, and a child that breaks them pays with its life.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::readiness::Readiness;

/// The name of the child that says which others there shall be.
pub(super) const NODE: &str = "node";

/// The largest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most descriptors in one deposit.
pub const MAX_DESCRIPTORS: usize = 4;
/// The most bytes of context in one deposit.
pub const MAX_CONTEXT: usize = 4096;
/// The most deposits of one child.
pub const MAX_DEPOSITS: usize = 256;
/// The most children besides the node.
pub const MAX_CHILDREN: usize = 64;
/// The longest name of a child or a deposit in bytes: a runtime's namespace and name (63 each)
/// and what it is.
const MAX_NAME: usize = 160;
/// The longest reason in a state in bytes, so that a report on all children fits into a message.
const MAX_REASON: usize = 256;

/// How to start a child: our own program with these arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildPlan {
    /// `node`, `shard default/vineyard`: the owner of deposits, and what logs call it.
    pub name: String,
    /// Arguments without the program's name, the subcommand first.
    pub args: Vec<String>,
    /// Variables added to the supervisor's own environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// How a child fares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildReport {
    /// As in its plan.
    pub name: String,
    /// Its process, while there is one.
    pub pid: Option<u32>,
    /// What it says of itself; between two processes what became of the last one. A child that
    /// keeps dying before it is ready is failing.
    #[serde(with = "ReadinessOnWire")]
    pub state: Readiness,
    /// Processes started after the first.
    pub restarts: u64,
}

/// From a child.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ToSupervisor {
    /// Keep the descriptors that come with this message.
    Deposit { name: String, context: Vec<u8> },
    /// Drop a deposit.
    Withdraw { name: String },
    /// How the child fares.
    State(#[serde(with = "ReadinessOnWire")] Readiness),
    /// From the node only: these children shall run, and no others.
    Want { children: Vec<ChildPlan> },
}

/// To a child.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ToChild {
    /// What an earlier process of this name deposited.
    Deposit { name: String, context: Vec<u8> },
    /// The end of the deposits.
    Begin,
    /// Drain and exit.
    Stop,
    /// To the node only: how all other children fare.
    Report { children: Vec<ChildReport> },
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Readiness")]
enum ReadinessOnWire {
    Starting(String),
    Ready,
    Failing(String),
    Draining,
}

/// Why a message is not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsendable {
    /// It does not fit into a datagram.
    #[error("a message of {0} bytes is larger than {MAX_MESSAGE}")]
    TooLarge(usize),
    /// It is not JSON.
    #[error("the message cannot be written as JSON: {0}")]
    Json(String),
    /// The other end would not accept it.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Why a message is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Larger than any message.
    #[error("a message is larger than {MAX_MESSAGE} bytes")]
    TooLarge,
    /// More descriptors than any message carries, or more than this process may have open.
    #[error("a message's descriptors did not arrive")]
    Descriptors,
    /// Not one of the messages.
    #[error("not a message: {0}")]
    Json(String),
    /// A name is empty, too long or unprintable.
    #[error("{0:?} is no name: 1 to {MAX_NAME} printable characters are expected")]
    Name(String),
    /// The wrong number of descriptors.
    #[error("{what} came with {count} descriptors")]
    Count {
        /// The kind of message.
        what: &'static str,
        /// How many came.
        count: usize,
    },
    /// Too much context.
    #[error("deposit {name:?} has {length} bytes of context, more than {MAX_CONTEXT}")]
    Context {
        /// The deposit.
        name: String,
        /// Its context's length.
        length: usize,
    },
    /// One deposit more than allowed.
    #[error("deposit {0:?} is one more than {MAX_DEPOSITS}")]
    Deposits(String),
    /// A wanted set from a child that is not the node.
    #[error("only the node says which children shall run")]
    NotTheNode,
    /// More children than allowed.
    #[error("{0} children are wanted, more than {MAX_CHILDREN}")]
    Children(usize),
    /// Two wanted children of one name, or one named as the node.
    #[error("child {0:?} is wanted twice")]
    Twice(String),
    /// An argument or a variable that cannot be passed to a program.
    #[error("child {0:?} has an argument or a variable that no program can be given")]
    Argument(String),
}

impl ToSupervisor {
    /// The bytes to send with `descriptors` descriptors, if the supervisor would accept them.
    pub(super) fn encode(&self, descriptors: usize) -> Result<Vec<u8>, Unsendable> {
        self.check(descriptors)?;
        encode(self)
    }

    /// Understands a message that came with `descriptors` descriptors.
    pub(super) fn decode(bytes: &[u8], descriptors: usize) -> Result<Self, Malformed> {
        let mut message: Self =
            serde_json::from_slice(bytes).map_err(|err| Malformed::Json(err.to_string()))?;
        message.check(descriptors)?;
        if let Self::State(Readiness::Starting(why) | Readiness::Failing(why)) = &mut message {
            *why = reason(why);
        }
        Ok(message)
    }

    fn check(&self, descriptors: usize) -> Result<(), Malformed> {
        let allowed = match self {
            Self::Deposit { .. } => 1..=MAX_DESCRIPTORS,
            Self::Withdraw { .. } | Self::State(_) | Self::Want { .. } => 0..=0,
        };
        if !allowed.contains(&descriptors) {
            return Err(Malformed::Count {
                what: self.kind(),
                count: descriptors,
            });
        }
        match self {
            Self::Deposit { name, context } => {
                check_name(name)?;
                if context.len() > MAX_CONTEXT {
                    return Err(Malformed::Context {
                        name: name.clone(),
                        length: context.len(),
                    });
                }
                Ok(())
            }
            Self::Withdraw { name } => check_name(name),
            Self::State(_) => Ok(()),
            Self::Want { children } => check_children(children),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Deposit { .. } => "a deposit",
            Self::Withdraw { .. } => "a withdrawal",
            Self::State(_) => "a state",
            Self::Want { .. } => "a wanted set",
        }
    }
}

impl ToChild {
    /// The bytes to send.
    pub(super) fn encode(&self) -> Result<Vec<u8>, Unsendable> {
        encode(self)
    }

    /// Understands a message.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        serde_json::from_slice(bytes).map_err(|err| Malformed::Json(err.to_string()))
    }
}

fn encode(message: &impl Serialize) -> Result<Vec<u8>, Unsendable> {
    let bytes = serde_json::to_vec(message).map_err(|err| Unsendable::Json(err.to_string()))?;
    match bytes.len() {
        0..=MAX_MESSAGE => Ok(bytes),
        length => Err(Unsendable::TooLarge(length)),
    }
}

fn check_name(name: &str) -> Result<(), Malformed> {
    let is_fine = (1..=MAX_NAME).contains(&name.len()) && !name.contains(char::is_control);
    match is_fine {
        true => Ok(()),
        false => Err(Malformed::Name(reason(name))),
    }
}

/// A plan that `launch` can carry out.
pub(super) fn check_plan(plan: &ChildPlan) -> Result<(), Malformed> {
    check_name(&plan.name)?;
    let is_text = |text: &str| !text.contains('\0');
    let is_variable = |name: &str| is_text(name) && !name.is_empty() && !name.contains('=');
    let fits = plan.args.iter().all(|arg| is_text(arg))
        && plan
            .env
            .iter()
            .all(|(name, value)| is_variable(name) && is_text(value));
    match fits {
        true => Ok(()),
        false => Err(Malformed::Argument(plan.name.clone())),
    }
}

fn check_children(children: &[ChildPlan]) -> Result<(), Malformed> {
    if children.len() > MAX_CHILDREN {
        return Err(Malformed::Children(children.len()));
    }
    let mut names = BTreeSet::from([NODE]);
    for plan in children {
        check_plan(plan)?;
        if !names.insert(&plan.name) {
            return Err(Malformed::Twice(plan.name.clone()));
        }
    }
    Ok(())
}

/// A reason short and plain enough for reports and log lines.
pub(super) fn reason(text: &str) -> String {
    let mut plain: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if plain.len() > MAX_REASON {
        let cut = (0..=MAX_REASON - 3)
            .rev()
            .find(|&at| plain.is_char_boundary(at));
        plain.truncate(cut.unwrap_or(0));
        plain.push_str("...");
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(name: &str) -> ChildPlan {
        ChildPlan {
            name: name.to_owned(),
            args: vec!["shard".to_owned()],
            env: BTreeMap::new(),
        }
    }

    fn deposit(context: usize) -> ToSupervisor {
        ToSupervisor::Deposit {
            name: "ipc".to_owned(),
            context: vec![255; context],
        }
    }

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let messages = [
            (deposit(MAX_CONTEXT), MAX_DESCRIPTORS),
            (
                ToSupervisor::Withdraw {
                    name: "ipc".to_owned(),
                },
                0,
            ),
            (
                ToSupervisor::State(Readiness::Failing("port 9600 is taken".to_owned())),
                0,
            ),
            (
                ToSupervisor::Want {
                    children: vec![plan("shard a/b"), plan("shard a/c")],
                },
                0,
            ),
        ];
        for (message, descriptors) in messages {
            let bytes = message.encode(descriptors).unwrap();
            assert_eq!(ToSupervisor::decode(&bytes, descriptors), Ok(message));
        }
        let report = ToChild::Report {
            children: vec![ChildReport {
                name: "shard a/b".to_owned(),
                pid: Some(7),
                state: Readiness::Ready,
                restarts: 3,
            }],
        };
        assert_eq!(ToChild::decode(&report.encode().unwrap()), Ok(report));
    }

    #[test]
    fn what_breaks_a_limit_is_neither_sent_nor_accepted() {
        let twice = vec![plan("shard a/b"), plan("shard a/b")];
        let many = (0..=MAX_CHILDREN).map(|n| plan(&n.to_string())).collect();
        let mut nul = plan("shard a/b");
        nul.args.push("a\0b".to_owned());
        let mut variable = plan("shard a/b");
        variable.env.insert("A=B".to_owned(), String::new());
        let bad = [
            (deposit(0), 0),
            (deposit(0), MAX_DESCRIPTORS + 1),
            (deposit(MAX_CONTEXT + 1), 1),
            (
                ToSupervisor::Withdraw {
                    name: "ipc".to_owned(),
                },
                1,
            ),
            (
                ToSupervisor::Withdraw {
                    name: String::new(),
                },
                0,
            ),
            (
                ToSupervisor::Withdraw {
                    name: "a\nb".to_owned(),
                },
                0,
            ),
            (
                ToSupervisor::Withdraw {
                    name: "x".repeat(MAX_NAME + 1),
                },
                0,
            ),
            (ToSupervisor::Want { children: twice }, 0),
            (ToSupervisor::Want { children: many }, 0),
            (
                ToSupervisor::Want {
                    children: vec![plan(NODE)],
                },
                0,
            ),
            (
                ToSupervisor::Want {
                    children: vec![nul],
                },
                0,
            ),
            (
                ToSupervisor::Want {
                    children: vec![variable],
                },
                0,
            ),
        ];
        for (message, descriptors) in bad {
            let refused = message.encode(descriptors).unwrap_err();
            assert!(matches!(refused, Unsendable::Malformed(_)), "{message:?}");
            let bytes = encode(&message).unwrap();
            assert!(
                ToSupervisor::decode(&bytes, descriptors).is_err(),
                "{message:?}"
            );
        }
        let mut large = plan("shard a/b");
        large.args.push("x".repeat(MAX_MESSAGE));
        let message = ToSupervisor::Want {
            children: vec![large],
        };
        assert!(matches!(message.encode(0), Err(Unsendable::TooLarge(_))));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [
            &b""[..],
            b"{",
            b"\xff\xfe",
            b"{\"Begin\":{}}",
            b"[1,2]",
            b"\"Stop\"",
        ] {
            assert!(matches!(
                ToSupervisor::decode(bytes, 0),
                Err(Malformed::Json(_))
            ));
        }
    }

    #[test]
    fn a_report_on_all_children_fits_into_a_message() {
        let report = ChildReport {
            name: "\"".repeat(MAX_NAME),
            pid: Some(u32::MAX),
            state: Readiness::Failing(reason(&"\"\n".repeat(MAX_REASON))),
            restarts: u64::MAX,
        };
        let children = vec![report; MAX_CHILDREN];
        assert!(ToChild::Report { children }.encode().is_ok());
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let cut = reason(&"ä".repeat(MAX_REASON));
        assert!(cut.len() <= MAX_REASON && cut.ends_with("ä..."), "{cut}");
        assert_eq!(reason("a\nb"), "a b");
    }
}
