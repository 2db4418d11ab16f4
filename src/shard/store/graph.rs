//! Who uses whom, and what a deletion takes with it.
//!
//! An edge leads from an object to its member, by id as it was resolved when the object was
//! made. Blobs of other instances are not part of the graph: their ids may be ours as well.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::shard::ids::ObjectId;

/// The edges between objects, and from objects to blobs.
#[derive(Debug, Default)]
pub(super) struct Graph {
    /// (child, parent)
    up: BTreeSet<(ObjectId, ObjectId)>,
    /// (parent, child)
    down: BTreeSet<(ObjectId, ObjectId)>,
}

const FIRST: ObjectId = ObjectId(0);
const LAST: ObjectId = ObjectId(u64::MAX);

impl Graph {
    pub(super) fn insert(&mut self, parent: ObjectId, child: ObjectId) {
        self.up.insert((child, parent));
        self.down.insert((parent, child));
    }

    /// Forgets an object and what it uses. Whoever uses it still does.
    pub(super) fn remove(&mut self, id: ObjectId) {
        let children: Vec<ObjectId> = self.children(id).collect();
        for child in children {
            self.up.remove(&(child, id));
            self.down.remove(&(id, child));
        }
    }

    pub(super) fn children(&self, id: ObjectId) -> impl Iterator<Item = ObjectId> {
        self.down
            .range((id, FIRST)..=(id, LAST))
            .map(|&(_, child)| child)
    }

    fn parents(&self, id: ObjectId) -> impl Iterator<Item = ObjectId> {
        self.up
            .range((id, FIRST)..=(id, LAST))
            .map(|&(_, parent)| parent)
    }

    /// What deleting `ids` deletes, ordered as upstream does: by height above what was asked for.
    ///
    /// An object goes if nothing that stays uses it, or by `force`, which also takes everything
    /// above it. Its blobs are tried next, its other members only if `deep`. Ids that nobody
    /// knows are in the answer: their owners may be elsewhere.
    pub(super) fn delete_set(&self, ids: &[ObjectId], force: bool, deep: bool) -> Vec<ObjectId> {
        let requested: HashSet<ObjectId> = ids.iter().copied().collect();
        let mut walk = Walk {
            graph: self,
            requested,
            asked: HashSet::new(),
            chosen: BTreeMap::new(),
            users: HashMap::new(),
            steps: Vec::new(),
        };
        for &id in ids {
            walk.run(Visit {
                id,
                depth: 0,
                force,
                deep,
            });
        }
        let mut chosen: Vec<_> = walk.chosen.into_iter().collect();
        chosen.sort_by_key(|&(id, depth)| (Reverse(depth), id));
        chosen.into_iter().map(|(id, _)| id).collect()
    }
}

#[derive(Clone, Copy)]
struct Visit {
    id: ObjectId,
    /// Higher for parents, lower for children of what was asked for.
    depth: i64,
    force: bool,
    deep: bool,
}

enum Step {
    Enter(Visit),
    /// The parents that were asked for have been visited.
    Decide(Visit),
}

/// A depth-first walk with a stack of its own: chains of objects that share members are longer
/// than a thread's stack is.
struct Walk<'a> {
    graph: &'a Graph,
    requested: HashSet<ObjectId>,
    /// Whose requested parents have been visited, or are about to be, and with which `force` and
    /// `deep`: what is reached as a member of another takes its own members along.
    asked: HashSet<(ObjectId, bool, bool)>,
    chosen: BTreeMap<ObjectId, i64>,
    /// How many parents that are not chosen a child has, for children of the chosen.
    users: HashMap<ObjectId, usize>,
    steps: Vec<Step>,
}

impl Walk<'_> {
    fn run(&mut self, first: Visit) {
        self.steps.push(Step::Enter(first));
        while let Some(step) = self.steps.pop() {
            match step {
                Step::Enter(visit) => self.enter(visit),
                Step::Decide(visit) => self.decide(visit),
            }
        }
    }

    fn enter(&mut self, visit: Visit) {
        if self.chosen.contains_key(&visit.id) {
            return;
        }
        self.steps.push(Step::Decide(visit));
        // Parents first, so that an object asked for together with its users goes with them.
        if self.asked.insert((visit.id, visit.force, visit.deep)) {
            let parents: Vec<ObjectId> = self
                .graph
                .parents(visit.id)
                .filter(|parent| self.requested.contains(parent))
                .collect();
            self.push(parents, |id| Visit {
                id,
                depth: visit.depth + 1,
                ..visit
            });
        }
    }

    fn decide(&mut self, visit: Visit) {
        let Visit {
            id,
            depth,
            force,
            deep,
        } = visit;
        if self.chosen.contains_key(&id) || !(force || self.is_unused(id)) {
            return;
        }
        self.chosen.insert(id, depth);
        if force {
            // The last to run: what is above.
            let parents: Vec<ObjectId> = self.graph.parents(id).collect();
            self.push(parents, |id| Visit {
                id,
                depth: depth + 1,
                force: true,
                deep: false,
            });
        }
        let children: Vec<ObjectId> = self.graph.children(id).collect();
        for &child in &children {
            let graph = self.graph;
            *self
                .users
                .entry(child)
                .or_insert_with(|| graph.parents(child).count()) -= 1;
        }
        let tried = children
            .into_iter()
            .filter(|child| deep || child.is_blob())
            .collect();
        self.push(tried, |id| Visit {
            id,
            depth: depth - 1,
            force: false,
            deep: true,
        });
    }

    fn is_unused(&self, id: ObjectId) -> bool {
        match self.users.get(&id) {
            Some(&users) => users == 0,
            None => self.graph.parents(id).next().is_none(),
        }
    }

    fn push(&mut self, ids: Vec<ObjectId>, visit: impl Fn(ObjectId) -> Visit) {
        self.steps
            .extend(ids.into_iter().rev().map(|id| Step::Enter(visit(id))));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: u64 = 1;
    const B: u64 = 2;
    const C: u64 = 3;
    const BLOB_A: u64 = 1 << 63 | 1;
    const BLOB_B: u64 = 1 << 63 | 2;

    fn graph(edges: &[(u64, u64)]) -> Graph {
        let mut graph = Graph::default();
        for &(parent, child) in edges {
            graph.insert(ObjectId(parent), ObjectId(child));
        }
        graph
    }

    fn check(edges: &[(u64, u64)], ids: &[u64], force: bool, deep: bool, gone: &[u64]) {
        let ids: Vec<ObjectId> = ids.iter().copied().map(ObjectId).collect();
        let set = graph(edges).delete_set(&ids, force, deep);
        let set: Vec<u64> = set.into_iter().map(|id| id.0).collect();
        assert_eq!(
            set, gone,
            "deleting {ids:?} of {edges:?}, force {force}, deep {deep}"
        );
    }

    /// B uses A; both have a blob.
    const PAIR: &[(u64, u64)] = &[(A, BLOB_A), (B, BLOB_B), (B, A)];

    #[test]
    fn a_blob_in_use_stays() {
        check(PAIR, &[BLOB_A], false, true, &[]);
    }

    #[test]
    fn a_forced_blob_takes_all_objects_above_and_their_blobs() {
        check(PAIR, &[BLOB_A], true, true, &[B, A, BLOB_B, BLOB_A]);
        // Another member of an object above stays.
        check(&[(B, BLOB_A), (B, C)], &[BLOB_A], true, true, &[B, BLOB_A]);
        // Its blob, used elsewhere as well, stays too.
        check(
            &[(B, BLOB_A), (B, BLOB_B), (C, BLOB_B)],
            &[BLOB_A],
            true,
            true,
            &[B, BLOB_A],
        );
    }

    #[test]
    fn a_member_in_use_stays() {
        check(PAIR, &[A], false, true, &[]);
    }

    #[test]
    fn a_shallow_deletion_takes_blobs_and_leaves_members() {
        check(PAIR, &[B], false, false, &[B, BLOB_B]);
    }

    #[test]
    fn a_shared_member_goes_with_its_last_user() {
        let edges = [(B, A), (C, A), (A, BLOB_A)];
        check(&edges, &[B], false, true, &[B]);
        check(&[(C, A), (A, BLOB_A)], &[C], false, true, &[C, A, BLOB_A]);
    }

    #[test]
    fn an_object_and_its_user_asked_for_together_both_go() {
        check(PAIR, &[A, B], false, false, &[B, A, BLOB_B, BLOB_A]);
        check(PAIR, &[B, A], false, false, &[A, B, BLOB_A, BLOB_B]);
    }

    #[test]
    fn a_forced_member_takes_its_users() {
        check(PAIR, &[A], true, false, &[B, A, BLOB_B, BLOB_A]);
    }

    #[test]
    fn unknown_ids_are_part_of_the_answer() {
        check(PAIR, &[77, BLOB_B + 5], false, false, &[77, BLOB_B + 5]);
    }

    #[test]
    fn long_chains_and_crowds_are_no_problem() {
        // Sequences that share an element with the next: a recursion would be 60,000 deep.
        let chain: Vec<(u64, u64)> = (1..20_000)
            .flat_map(|n| [(n << 32, n), (n << 32, n + 1)])
            .collect();
        let ids: Vec<ObjectId> = (1..20_000).map(|n| ObjectId(n << 32)).collect();
        assert_eq!(graph(&chain).delete_set(&ids, false, true).len(), 39_999);
        // One member of 20,000 objects.
        let crowd: Vec<(u64, u64)> = (1..20_000).map(|n| (n << 32, 1)).collect();
        assert_eq!(graph(&crowd).delete_set(&ids, false, true).len(), 20_000);
        assert_eq!(
            graph(&crowd).delete_set(&[ObjectId(1)], true, false).len(),
            20_000
        );
    }

    /// The rule as it is written down, by recursion and by removing edges.
    struct Naive {
        edges: BTreeSet<(ObjectId, ObjectId)>,
        requested: BTreeSet<ObjectId>,
        chosen: BTreeSet<ObjectId>,
    }

    impl Naive {
        fn visit(&mut self, x: ObjectId, force: bool, deep: bool) {
            if self.chosen.contains(&x) {
                return;
            }
            let edges = self.edges.clone();
            let parents = || edges.iter().filter(|(_, c)| *c == x).map(|(p, _)| *p);
            for parent in parents() {
                if self.requested.contains(&parent) && !self.chosen.contains(&parent) {
                    self.visit(parent, force, deep);
                }
            }
            if force || !self.edges.iter().any(|&(_, child)| child == x) {
                self.chosen.insert(x);
                let edges = self.edges.clone();
                self.edges.retain(|&(p, c)| p != x && c != x);
                for &(_, child) in edges.iter().filter(|(p, _)| *p == x) {
                    if deep || child.is_blob() {
                        self.visit(child, false, true);
                    }
                }
                if force {
                    for &(parent, _) in edges.iter().filter(|(_, c)| *c == x) {
                        self.visit(parent, true, false);
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn a_deep_walk_agrees_with_the_rule(
            edges in prop::collection::vec((0..10_u64, 1..10_u64, any::<bool>()), 0..20),
            ids in prop::collection::vec((0..12_u64, any::<bool>()), 1..5),
        ) {
            let (graph, ids) = built(edges, ids);
            let edges = graph.down.clone();
            let requested = ids.iter().copied().collect();
            let mut naive = Naive { edges, requested, chosen: BTreeSet::new() };
            for &id in &ids {
                naive.visit(id, false, true);
            }
            let set: BTreeSet<_> = graph.delete_set(&ids, false, true).into_iter().collect();
            prop_assert_eq!(set, naive.chosen);
        }

        /// How far a shallow or forced deletion reaches depends on the order of visits where
        /// requests share members; what must hold in any order is this.
        #[test]
        fn what_goes_was_asked_for_or_hung_on_what_goes(
            edges in prop::collection::vec((0..10_u64, 1..10_u64, any::<bool>()), 0..20),
            ids in prop::collection::vec((0..12_u64, any::<bool>()), 1..5),
            force: bool,
            deep: bool,
        ) {
            let (graph, ids) = built(edges, ids);
            let set: BTreeSet<_> = graph.delete_set(&ids, force, deep).into_iter().collect();
            for &gone in &set {
                let hangs_on_it = |other: ObjectId| {
                    graph.down.contains(&(other, gone)) || (force && graph.down.contains(&(gone, other)))
                };
                prop_assert!(ids.contains(&gone) || set.iter().any(|&other| hangs_on_it(other)));
            }
            if force {
                prop_assert!(ids.iter().all(|id| set.contains(id)));
            } else {
                let in_use = |id: &ObjectId| graph.parents(*id).any(|parent| !set.contains(&parent));
                prop_assert!(!set.iter().any(in_use), "something that stays uses what goes");
                prop_assert!(ids.iter().all(|id| set.contains(id) || in_use(id)));
            }
        }
    }

    fn built(edges: Vec<(u64, u64, bool)>, ids: Vec<(u64, bool)>) -> (Graph, Vec<ObjectId>) {
        let id = |n: u64, blob: bool| ObjectId(n | u64::from(blob) << 63);
        let mut graph = Graph::default();
        for (parent, step, blob) in edges {
            graph.insert(id(parent, false), id((parent + step).min(11), blob));
        }
        let ids = ids.into_iter().map(|(n, blob)| id(n, blob)).collect();
        (graph, ids)
    }
}
