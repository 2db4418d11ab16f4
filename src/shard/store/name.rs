//! Names of objects, and who waits for one.
//!
//! A name is any text but the empty one. It may outlive the object it leads to: upstream's
//! clients rely on finding the id.

use std::collections::BTreeMap;

use super::pattern::Pattern;
use super::wait::WaiterId;
use crate::shard::ids::ObjectId;

/// All names.
#[derive(Debug, Default)]
pub(super) struct Names {
    names: BTreeMap<String, ObjectId>,
    waiting: BTreeMap<String, Vec<WaiterId>>,
}

impl Names {
    pub(super) fn get(&self, name: &str) -> Option<ObjectId> {
        self.names.get(name).copied()
    }

    /// Gives the name to an object, whoever had it. Those who waited for it.
    pub(super) fn put(&mut self, name: &str, id: ObjectId) -> Vec<WaiterId> {
        self.names.insert(name.to_owned(), id);
        self.waiting.remove(name).unwrap_or_default()
    }

    /// Whom the name led to.
    pub(super) fn remove(&mut self, name: &str) -> Option<ObjectId> {
        self.names.remove(name)
    }

    /// The first `limit` that match, in ascending order.
    pub(super) fn list(&self, pattern: &Pattern, limit: u64) -> BTreeMap<String, ObjectId> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let matching = self.names.iter().filter(|(name, _)| pattern.matches(name));
        matching
            .take(limit)
            .map(|(name, &id)| (name.clone(), id))
            .collect()
    }

    pub(super) fn wait(&mut self, name: &str, waiter: WaiterId) {
        self.waiting
            .entry(name.to_owned())
            .or_default()
            .push(waiter);
    }

    pub(super) fn cancel(&mut self, name: &str, waiter: WaiterId) {
        if let Some(waiting) = self.waiting.get_mut(name) {
            waiting.retain(|&other| other != waiter);
            if waiting.is_empty() {
                self.waiting.remove(name);
            }
        }
    }
}

/// A name as the metadata of its object shows it: escaped as in a JSON pointer (RFC 6901).
pub(super) fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_are_ordinary() {
        let mut names = Names::default();
        for (id, name) in ["0", "/", "~", "~1", "a/b", " ", "\u{0}", "*"]
            .iter()
            .enumerate()
        {
            names.put(name, ObjectId(id as u64));
        }
        assert_eq!(names.get("0"), Some(ObjectId(0)));
        assert_eq!(names.get("~1"), Some(ObjectId(3)));
        assert_eq!(names.list(&Pattern::new("*", false), 100).len(), 8);
        assert_eq!(names.remove("/"), Some(ObjectId(1)));
        assert_eq!(names.get("a/b"), Some(ObjectId(4)));
    }

    #[test]
    fn escapes_are_those_of_a_json_pointer() {
        assert_eq!(escaped("a/b~c~1"), "a~1b~0c~01");
    }

    #[test]
    fn listing_is_sorted_and_limited() {
        let mut names = Names::default();
        for name in ["n3", "n1", "m", "n2"] {
            names.put(name, ObjectId(1));
        }
        let listed = |pattern, regex, limit| {
            let listed = names.list(&Pattern::new(pattern, regex), limit);
            listed.into_keys().collect::<Vec<_>>()
        };
        assert_eq!(listed("n*", false, 2), ["n1", "n2"]);
        assert_eq!(listed("n[23]", true, u64::MAX), ["n2", "n3"]);
        assert!(listed("*", false, 0).is_empty());
        assert!(listed("((", true, 9).is_empty());
    }
}
