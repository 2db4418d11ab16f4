//! Deposits: named descriptors, with a few bytes of context, that outlive their users.
//!
//! A deposit belongs to a child's name, not to a process: the next process of that name gets it
//! back. It goes when it is withdrawn, or when the child is no longer wanted.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::message::{MAX_DEPOSITS, Malformed};

/// What is kept under one name. Clones are the same descriptors.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) context: Vec<u8>,
    pub(super) descriptors: Rc<[OwnedFd]>,
}

/// All deposits, by owner and name.
#[derive(Debug, Default)]
pub(super) struct Custody(BTreeMap<String, BTreeMap<String, Kept>>);

impl Custody {
    /// Keeps a deposit; an earlier one of the same owner and name is dropped.
    pub(super) fn keep(
        &mut self,
        owner: &str,
        name: String,
        context: Vec<u8>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), Malformed> {
        let kept = self.0.entry(owner.to_owned()).or_default();
        if kept.len() >= MAX_DEPOSITS && !kept.contains_key(&name) {
            return Err(Malformed::Deposits(name));
        }
        let descriptors = descriptors.into();
        kept.insert(
            name,
            Kept {
                context,
                descriptors,
            },
        );
        Ok(())
    }

    /// Drops one deposit; whether there was one.
    pub(super) fn withdraw(&mut self, owner: &str, name: &str) -> bool {
        let kept = self.0.get_mut(owner);
        kept.is_some_and(|kept| kept.remove(name).is_some())
    }

    /// Drops all that an owner deposited; how many.
    pub(super) fn drop_all(&mut self, owner: &str) -> usize {
        self.0.remove(owner).map_or(0, |kept| kept.len())
    }

    /// What an owner deposited, by name.
    pub(super) fn of(&self, owner: &str) -> impl Iterator<Item = (&String, &Kept)> {
        self.0.get(owner).into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn null() -> Vec<OwnedFd> {
        vec![File::open("/dev/null").unwrap().into()]
    }

    fn names(custody: &Custody, owner: &str) -> Vec<String> {
        custody.of(owner).map(|(name, _)| name.clone()).collect()
    }

    #[test]
    fn deposits_are_kept_by_owner_and_name_and_the_last_one_counts() {
        let mut custody = Custody::default();
        for (owner, name, context) in [("a", "x", 1), ("a", "y", 2), ("b", "x", 3), ("a", "x", 4)] {
            custody
                .keep(owner, name.to_owned(), vec![context], null())
                .unwrap();
        }
        assert_eq!(names(&custody, "a"), ["x", "y"]);
        assert_eq!(custody.of("a").next().unwrap().1.context, [4]);
        assert!(custody.withdraw("a", "x"));
        assert!(!custody.withdraw("a", "x"));
        assert!(!custody.withdraw("c", "x"));
        assert_eq!(custody.drop_all("a"), 1);
        assert_eq!(names(&custody, "b"), ["x"]);
    }

    #[test]
    fn a_dropped_deposit_is_closed() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut custody = Custody::default();
        custody
            .keep("a", "x".to_owned(), Vec::new(), vec![theirs.into()])
            .unwrap();
        custody.drop_all("a");
        assert_eq!(std::io::Read::read(&mut &ours, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn one_deposit_too_many_is_refused_and_the_others_stay() {
        let mut custody = Custody::default();
        for n in 0..MAX_DEPOSITS {
            custody
                .keep("a", n.to_string(), Vec::new(), null())
                .unwrap();
        }
        let refused = custody.keep("a", "more".to_owned(), Vec::new(), null());
        assert_eq!(refused, Err(Malformed::Deposits("more".to_owned())));
        assert_eq!(
            custody.keep("a", "0".to_owned(), Vec::new(), null()),
            Ok(())
        );
        assert_eq!(names(&custody, "a").len(), MAX_DEPOSITS);
    }
}
