//! What is wanted + what is present → what to do.
//!
//! Invariants: a bad file never disturbs a runtime that runs; of two claims to one name or one
//! port, the one that is fulfilled already wins, then the first by file name; every claim that is
//! not fulfilled is complained about.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::{RuntimeId, RuntimeSpec, SpecError};

/// What the runtimes directory says: by file name, its runtimes or why it has none.
pub type Wanted = BTreeMap<String, Result<Vec<RuntimeSpec>, SpecError>>;

/// What was made of the directory before, and what [`reconcile`] says it shall become.
///
/// It can be serialized, so that a node role that is started anew still knows what a file asked
/// for before it turned bad.
pub type Present = BTreeMap<RuntimeId, Running>;

/// A runtime that was started, and the file that asked for it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Running {
    /// Name of the file.
    pub file: String,
    /// What it runs with.
    pub spec: RuntimeSpec,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing asks for this runtime any more.
    Stop(RuntimeId),
    /// It shall run with something else.
    Change {
        /// What it runs with.
        from: RuntimeSpec,
        /// What it shall run with.
        to: RuntimeSpec,
        /// What of it differs.
        what: Difference,
    },
    /// It shall run.
    Start(RuntimeSpec),
    /// Somebody has to correct a file.
    Complain(Complaint),
}

/// What differs between two specs of one runtime; at least one is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// The arena's size.
    pub memory: bool,
    /// The port of the RPC door.
    pub rpc_port: bool,
    /// Whether figures are exported.
    pub metrics: bool,
}

/// A file, or one runtime of it, that is not obeyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// The files it is about.
    pub files: Vec<String>,
    /// The runtime it is about, where that is known.
    pub runtime: Option<RuntimeId>,
    /// Why, as a sentence for the log. Names files and runtimes where needed.
    pub why: String,
}

/// What to do, and what is present once it is done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// In this order: complaints, what stops, what changes, what starts; so a port is free before
    /// somebody else takes it.
    pub steps: Vec<Step>,
    /// To be handed to the next call, whether or not a step failed: steps are wishes, the node
    /// role is who retries them.
    pub present: Present,
}

/// Compares what is wanted with what is present.
pub fn reconcile(wanted: &Wanted, present: &Present) -> Decision {
    let mut complaints = Vec::new();
    let kept = kept_by_bad_files(wanted, present, &mut complaints);
    let claims = settle_names(wanted, present, &kept, &mut complaints);
    let future = settle_ports(claims, present, kept, &mut complaints);

    let mut steps: Vec<_> = complaints.into_iter().map(Step::Complain).collect();
    let gone = present.keys().filter(|id| !future.contains_key(*id));
    steps.extend(gone.cloned().map(Step::Stop));
    let mut starts = Vec::new();
    for (id, running) in &future {
        match present.get(id) {
            None => starts.push(Step::Start(running.spec.clone())),
            Some(before) if before.spec == running.spec => {}
            Some(before) => steps.push(Step::Change {
                from: before.spec.clone(),
                to: running.spec.clone(),
                what: difference(&before.spec, &running.spec),
            }),
        }
    }
    steps.append(&mut starts);
    Decision {
        steps,
        present: future,
    }
}

/// The runtimes whose file cannot be understood now: they stay as they are.
fn kept_by_bad_files(
    wanted: &Wanted,
    present: &Present,
    complaints: &mut Vec<Complaint>,
) -> Present {
    let mut kept = Present::new();
    for (file, content) in wanted {
        let Err(error) = content else { continue };
        let mine: Vec<_> = present
            .iter()
            .filter(|(_, running)| running.file == *file)
            .collect();
        complaints.push(Complaint {
            files: vec![file.clone()],
            // The complaint is about several runtimes or about none that is known.
            runtime: match mine.as_slice() {
                [(id, _)] => Some((*id).clone()),
                _ => None,
            },
            why: match mine.is_empty() {
                true => format!("{file}: {error}"),
                false => format!(
                    "{file}: {error} (what it asked for before keeps running: {})",
                    listed(mine.iter().map(|(id, _)| id.to_string()))
                ),
            },
        });
        kept.extend(
            mine.into_iter()
                .map(|(id, running)| (id.clone(), running.clone())),
        );
    }
    kept
}

/// One claim for each runtime that is not kept, in the order of their files.
fn settle_names(
    wanted: &Wanted,
    present: &Present,
    kept: &Present,
    complaints: &mut Vec<Complaint>,
) -> Vec<Running> {
    let mut claims: BTreeMap<&RuntimeId, Vec<Running>> = BTreeMap::new();
    for (file, content) in wanted {
        for spec in content.iter().flatten() {
            claims.entry(&spec.id).or_default().push(Running {
                file: file.clone(),
                spec: spec.clone(),
            });
        }
    }
    let mut settled = Vec::new();
    for (id, mut claims) in claims {
        if let Some(running) = kept.get(id) {
            let files: Vec<_> = claims.into_iter().map(|claim| claim.file).collect();
            complaints.push(Complaint {
                why: format!(
                    "runtime {id} is defined in {} too; what {} asked for before keeps running",
                    listed(files.iter()),
                    running.file
                ),
                files: std::iter::once(running.file.clone()).chain(files).collect(),
                runtime: Some(id.clone()),
            });
            continue;
        }
        let now = present.get(id).map(|running| &running.file);
        let chosen = claims
            .iter()
            .position(|claim| Some(&claim.file) == now)
            .unwrap_or(0);
        if claims.len() > 1 {
            complaints.push(Complaint {
                why: format!(
                    "runtime {id} is defined in {}; the one in {} counts",
                    listed(claims.iter().map(|claim| &claim.file)),
                    claims[chosen].file
                ),
                files: claims.iter().map(|claim| claim.file.clone()).collect(),
                runtime: Some(id.clone()),
            });
        }
        settled.push(claims.swap_remove(chosen));
    }
    settled.sort_by(|a, b| (&a.file, &a.spec.id).cmp(&(&b.file, &b.spec.id)));
    settled
}

/// One owner for each port. Whoever has it and wants it keeps it; who cannot have the port it
/// wants stays as it is, or is not started.
fn settle_ports(
    mut claims: Vec<Running>,
    present: &Present,
    mut kept: Present,
    complaints: &mut Vec<Complaint>,
) -> Present {
    let has_it = |claim: &Running| {
        present
            .get(&claim.spec.id)
            .is_some_and(|running| running.spec.rpc_port == claim.spec.rpc_port)
    };
    claims.sort_by_key(|claim| !has_it(claim));
    // Refusing one claim makes its runtime keep a port that another claim may have been given:
    // begin again with that one kept. Each round keeps one more, so this ends.
    let mut refused = BTreeSet::new();
    'again: loop {
        let mut owners: BTreeMap<u16, Running> = BTreeMap::new();
        for running in kept.values() {
            owners
                .entry(running.spec.rpc_port)
                .or_insert_with(|| running.clone());
        }
        let mut future = kept.clone();
        let mut not_now = Vec::new();
        for claim in &claims {
            let id = &claim.spec.id;
            if refused.contains(id) {
                continue;
            }
            match owners.entry(claim.spec.rpc_port) {
                Entry::Vacant(free) => {
                    free.insert(claim.clone());
                    future.insert(id.clone(), claim.clone());
                }
                Entry::Occupied(owner) => {
                    let owner = owner.get();
                    let why = format!(
                        "{}: runtime {id} wants rpc port {}, which runtime {} of {} has",
                        claim.file, claim.spec.rpc_port, owner.spec.id, owner.file
                    );
                    let complaint = |why| Complaint {
                        files: vec![claim.file.clone(), owner.file.clone()],
                        runtime: Some(id.clone()),
                        why,
                    };
                    if let Some(before) = present.get(id) {
                        let port = before.spec.rpc_port;
                        complaints
                            .push(complaint(format!("{why}; it keeps running on port {port}")));
                        refused.insert(id.clone());
                        let running = Running {
                            file: claim.file.clone(),
                            spec: before.spec.clone(),
                        };
                        kept.insert(id.clone(), running);
                        continue 'again;
                    }
                    not_now.push(complaint(why));
                }
            }
        }
        complaints.append(&mut not_now);
        return future;
    }
}

fn difference(from: &RuntimeSpec, to: &RuntimeSpec) -> Difference {
    Difference {
        memory: from.memory != to.memory,
        rpc_port: from.rpc_port != to.rpc_port,
        metrics: from.metrics != to.metrics,
    }
}

fn listed<T: AsRef<str>>(names: impl Iterator<Item = T>) -> String {
    let names: Vec<_> = names.map(|name| name.as_ref().to_owned()).collect();
    match names.as_slice() {
        [most @ .., last] if !most.is_empty() => format!("{} and {last}", most.join(", ")),
        other => other.concat(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(name: &str, port: u16, memory: u64) -> RuntimeSpec {
        RuntimeSpec {
            id: RuntimeId::new("ns", name).unwrap(),
            memory,
            rpc_port: port,
            metrics: true,
        }
    }

    /// `name:port:memory`, joined by blanks; `!` is a bad file.
    fn content(text: &str) -> Result<Vec<RuntimeSpec>, SpecError> {
        if text == "!" {
            return Err(SpecError::Empty);
        }
        let specs = text.split_whitespace().map(|word| {
            let parts: Vec<_> = word.split(':').collect();
            spec(
                parts[0],
                parts[1].parse().unwrap(),
                parts[2].parse().unwrap(),
            )
        });
        Ok(specs.collect())
    }

    fn present(files: &[(&str, &str)]) -> Present {
        let running = files.iter().flat_map(|(file, text)| {
            content(text).unwrap().into_iter().map(|spec| {
                let file = (*file).to_owned();
                (spec.id.clone(), Running { file, spec })
            })
        });
        running.collect()
    }

    fn shown(step: &Step) -> String {
        match step {
            Step::Stop(id) => format!("stop {}", id.name()),
            Step::Start(spec) => {
                format!("start {}:{}:{}", spec.id.name(), spec.rpc_port, spec.memory)
            }
            Step::Change { to, what, .. } => {
                let kinds = [
                    (what.memory, "memory"),
                    (what.rpc_port, "rpc_port"),
                    (what.metrics, "metrics"),
                ];
                let kinds: Vec<_> = kinds.iter().filter(|k| k.0).map(|k| k.1).collect();
                format!(
                    "change {} {}:{} ({})",
                    to.id.name(),
                    to.rpc_port,
                    to.memory,
                    kinds.join(",")
                )
            }
            Step::Complain(complaint) => complaint.why.clone(),
        }
    }

    fn check(before: &[(&str, &str)], files: &[(&str, &str)], want: &[&str]) -> Decision {
        let wanted: Wanted = files
            .iter()
            .map(|(file, text)| ((*file).to_owned(), content(text)))
            .collect();
        let decision = reconcile(&wanted, &present(before));
        let steps: Vec<_> = decision.steps.iter().map(shown).collect();
        assert_eq!(steps, want);
        decision
    }

    #[test]
    fn files_that_come_change_and_go_start_change_and_stop_their_runtimes() {
        check(
            &[],
            &[("a", "x:1:10 y:2:10")],
            &["start x:1:10", "start y:2:10"],
        );
        check(&[("a", "x:1:10")], &[("a", "x:1:10")], &[]);
        check(
            &[("a", "x:1:10")],
            &[("a", "x:1:20")],
            &["change x 1:20 (memory)"],
        );
        check(
            &[("a", "x:1:10")],
            &[("a", "x:3:20")],
            &["change x 3:20 (memory,rpc_port)"],
        );
        check(&[("a", "x:1:10 y:2:10")], &[("a", "y:2:10")], &["stop x"]);
        check(
            &[("a", "x:1:10"), ("b", "y:2:10")],
            &[("b", "y:2:10")],
            &["stop x"],
        );
        check(
            &[("a", "x:1:10")],
            &[("a", "z:1:10")],
            &["stop x", "start z:1:10"],
        );
    }

    #[test]
    fn a_renamed_file_disturbs_nothing_and_its_new_name_is_remembered() {
        let decision = check(&[("a", "x:1:10")], &[("b", "x:1:10")], &[]);
        assert_eq!(decision.present, present(&[("b", "x:1:10")]));
    }

    #[test]
    fn a_file_that_turns_bad_leaves_its_runtimes_alone() {
        let decision = check(
            &[("a", "x:1:10"), ("b", "y:2:10")],
            &[("a", "!"), ("b", "y:2:20"), ("c", "!")],
            &[
                "a: the file holds no VineyardRuntime (what it asked for before keeps running: ns/x)",
                "c: the file holds no VineyardRuntime",
                "change y 2:20 (memory)",
            ],
        );
        assert_eq!(
            decision.present,
            present(&[("a", "x:1:10"), ("b", "y:2:20")])
        );
    }

    #[test]
    fn of_two_files_with_one_name_the_running_one_stays_else_the_first() {
        check(
            &[],
            &[("a", "x:1:10"), ("b", "x:2:20")],
            &[
                "runtime ns/x is defined in a and b; the one in a counts",
                "start x:1:10",
            ],
        );
        check(
            &[("b", "x:2:20")],
            &[("a", "x:1:10"), ("b", "x:2:20"), ("c", "x:3:30")],
            &["runtime ns/x is defined in a, b and c; the one in b counts"],
        );
        check(
            &[("b", "x:2:20")],
            &[("a", "x:1:10"), ("b", "!")],
            &[
                "b: the file holds no VineyardRuntime (what it asked for before keeps running: ns/x)",
                "runtime ns/x is defined in a too; what b asked for before keeps running",
            ],
        );
        check(
            &[("b", "x:2:20")],
            &[("a", "x:2:10")],
            &["change x 2:10 (memory)"],
        );
    }

    #[test]
    fn of_two_runtimes_with_one_port_the_running_one_keeps_it_else_the_first() {
        check(
            &[],
            &[("a", "x:1:10"), ("b", "y:1:10")],
            &[
                "b: runtime ns/y wants rpc port 1, which runtime ns/x of a has",
                "start x:1:10",
            ],
        );
        check(
            &[("b", "y:1:10")],
            &[("a", "x:1:10"), ("b", "y:1:10")],
            &["a: runtime ns/x wants rpc port 1, which runtime ns/y of b has"],
        );
        check(
            &[("a", "x:1:10"), ("b", "y:2:10")],
            &[("a", "x:2:10"), ("b", "y:2:10")],
            &[
                "a: runtime ns/x wants rpc port 2, which runtime ns/y of b has; it keeps running on port 1",
            ],
        );
        // The owner is gone for good, or its file is bad and it stays.
        check(
            &[("b", "y:1:10")],
            &[("a", "x:1:10")],
            &["stop y", "start x:1:10"],
        );
        check(
            &[("b", "y:1:10")],
            &[("a", "x:1:10"), ("b", "!")],
            &[
                "b: the file holds no VineyardRuntime (what it asked for before keeps running: ns/y)",
                "a: runtime ns/x wants rpc port 1, which runtime ns/y of b has",
            ],
        );
    }

    #[test]
    fn what_is_present_survives_a_restart_as_json() {
        let before = present(&[("a", "x:1:10"), ("b", "y:2:10")]);
        let text = serde_json::to_string(&before).unwrap();
        assert!(text.contains("\"ns/x\":{"), "{text}");
        assert_eq!(serde_json::from_str::<Present>(&text).unwrap(), before);
    }

    #[test]
    fn ports_can_be_swapped() {
        check(
            &[("a", "x:1:10"), ("b", "y:2:10")],
            &[("a", "x:2:10"), ("b", "y:1:10")],
            &["change x 2:10 (rpc_port)", "change y 1:10 (rpc_port)"],
        );
    }

    #[test]
    fn a_refused_runtime_defends_the_port_it_keeps() {
        // z takes over x's port only if x really leaves it.
        check(
            &[("b", "x:1:10"), ("c", "y:2:10")],
            &[("a", "z:1:10"), ("b", "x:2:10"), ("c", "y:2:10")],
            &[
                "b: runtime ns/x wants rpc port 2, which runtime ns/y of c has; it keeps running on port 1",
                "a: runtime ns/z wants rpc port 1, which runtime ns/x of b has",
            ],
        );
    }

    prop_compose! {
        fn any_content()(
            bad in prop::bool::weighted(0.2),
            specs in prop::collection::btree_map(0..4_u8, (1..4_u16, 1..3_u64), 0..3),
        ) -> Result<Vec<RuntimeSpec>, SpecError> {
            if bad {
                return Err(SpecError::Empty);
            }
            let specs = specs.into_iter();
            Ok(specs.map(|(name, (port, memory))| spec(&format!("r{name}"), port, memory)).collect())
        }
    }

    proptest! {
        #[test]
        fn whatever_the_files_say_ports_are_unique_and_a_second_look_changes_nothing(
            rounds in prop::collection::vec(
                prop::collection::btree_map("[a-d]", any_content(), 0..4), 1..5),
        ) {
            let mut present = Present::new();
            for wanted in rounds {
                let decision = reconcile(&wanted, &present);
                for (id, running) in &present {
                    let is_bad = matches!(wanted.get(&running.file), Some(Err(_)));
                    if is_bad {
                        prop_assert_eq!(decision.present.get(id), Some(running));
                    }
                }
                let ports: BTreeSet<_> =
                    decision.present.values().map(|running| running.spec.rpc_port).collect();
                prop_assert_eq!(ports.len(), decision.present.len());
                let again = reconcile(&wanted, &decision.present);
                prop_assert_eq!(&again.present, &decision.present);
                prop_assert!(again.steps.iter().all(|step| matches!(step, Step::Complain(_))));
                present = decision.present;
            }
        }
    }
}
