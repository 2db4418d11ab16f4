//! Which connection holds which blob, and which ones it has begun and not sealed.
//!
//! A connection holds a blob once, however often it got it; a blob's reference count is the
//! number of connections that hold it. Holding keeps nothing from being deleted: it only says
//! what is in use.

use std::collections::{BTreeMap, BTreeSet};

use super::Transport;
use super::blob::Blobs;
use crate::shard::ids::ObjectId;

/// One connection, never used again for another.
pub(super) type ConnectionId = u64;

/// Ids a connection may hold before those of deleted blobs are sorted out.
const SPARED: usize = 4096;

/// Whether the blob knows that it is held: it existed by then.
type Counted = bool;

#[derive(Debug)]
struct Connection {
    transport: Transport,
    /// Blobs of others' deletion and ids that never were blobs included: their release is
    /// expected to succeed.
    held: BTreeMap<ObjectId, Counted>,
    /// Blobs it created and nobody sealed.
    unsealed: BTreeSet<ObjectId>,
    /// Length of `held` at which it is sorted out.
    limit: usize,
}

/// Why nothing is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotHeld {
    /// The connection holds other blobs.
    This,
    /// The connection holds no blob at all.
    Any,
}

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Leases {
    last: ConnectionId,
    connections: BTreeMap<ConnectionId, Connection>,
}

impl Leases {
    pub(super) fn connect(&mut self, transport: Transport) -> ConnectionId {
        self.last += 1;
        let (held, unsealed) = (BTreeMap::new(), BTreeSet::new());
        let connection = Connection {
            transport,
            held,
            unsealed,
            limit: SPARED,
        };
        self.connections.insert(self.last, connection);
        self.last
    }

    /// Ends a connection: the blobs it leaves unsealed.
    pub(super) fn disconnect(&mut self, id: ConnectionId, blobs: &mut Blobs) -> BTreeSet<ObjectId> {
        let Some(gone) = self.connections.remove(&id) else {
            return BTreeSet::new();
        };
        for (blob, is_counted) in gone.held {
            if is_counted {
                blobs.released(blob);
            }
        }
        gone.unsealed
    }

    /// Whether a connection holds a blob.
    pub(super) fn is_held_by(&self, id: ConnectionId, blob: ObjectId) -> bool {
        let connection = self.connections.get(&id);
        connection.is_some_and(|connection| connection.held.get(&blob) == Some(&true))
    }

    pub(super) fn count(&self, transport: Transport) -> u64 {
        self.connections
            .values()
            .filter(|c| c.transport == transport)
            .count() as u64
    }

    pub(super) fn created(&mut self, id: ConnectionId, blob: ObjectId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.unsealed.insert(blob);
        }
    }

    /// The blob is sealed or deleted: its writer no longer owes a seal.
    pub(super) fn settled(&mut self, id: ConnectionId, blob: ObjectId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.unsealed.remove(&blob);
        }
    }

    pub(super) fn hold(&mut self, id: ConnectionId, blob: ObjectId, blobs: &mut Blobs) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let is_counted = connection.held.entry(blob).or_default();
        if !*is_counted && blobs.contains(blob) {
            *is_counted = true;
            blobs.held(blob);
        }
        if connection.held.len() > connection.limit {
            connection.held.retain(|&id, _| blobs.contains(id));
            connection.limit = SPARED.max(2 * connection.held.len());
        }
    }

    pub(super) fn release(
        &mut self,
        id: ConnectionId,
        blob: ObjectId,
        blobs: &mut Blobs,
    ) -> Result<(), NotHeld> {
        let connection = self.connections.get_mut(&id).ok_or(NotHeld::Any)?;
        if connection.held.is_empty() {
            return Err(NotHeld::Any);
        }
        let is_counted = connection.held.remove(&blob).ok_or(NotHeld::This)?;
        if is_counted {
            blobs.released(blob);
        }
        Ok(())
    }

    /// How many connections hold a blob.
    #[cfg(test)]
    fn references(&self, blob: ObjectId) -> usize {
        self.connections
            .values()
            .filter(|c| c.held.contains_key(&blob))
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::memory::Pool;

    const BLOB: ObjectId = ObjectId(1 << 63 | 7);

    fn blobs() -> Blobs {
        Blobs::new(Pool::sparse(1 << 20).unwrap())
    }

    #[test]
    fn a_connection_counts_once_however_often_it_gets_a_blob() {
        let mut leases = Leases::default();
        let (one, two) = (
            leases.connect(Transport::Ipc),
            leases.connect(Transport::Rpc),
        );
        leases.hold(one, BLOB, &mut blobs());
        leases.hold(one, BLOB, &mut blobs());
        leases.hold(two, BLOB, &mut blobs());
        assert_eq!(leases.references(BLOB), 2);
        assert_eq!(leases.release(one, BLOB, &mut blobs()), Ok(()));
        assert_eq!(leases.release(one, BLOB, &mut blobs()), Err(NotHeld::Any));
        leases.hold(one, ObjectId(8), &mut blobs());
        assert_eq!(leases.release(one, BLOB, &mut blobs()), Err(NotHeld::This));
        leases.disconnect(two, &mut blobs());
        assert_eq!(leases.references(BLOB), 0);
        assert_eq!(
            (leases.count(Transport::Ipc), leases.count(Transport::Rpc)),
            (1, 0)
        );
    }

    #[test]
    fn what_a_connection_leaves_unsealed_is_known_when_it_ends() {
        let mut leases = Leases::default();
        let one = leases.connect(Transport::Ipc);
        for blob in [1, 2, 3] {
            leases.created(one, ObjectId(blob));
        }
        leases.settled(one, ObjectId(2));
        assert_eq!(
            leases.disconnect(one, &mut blobs()),
            BTreeSet::from([ObjectId(1), ObjectId(3)])
        );
        assert_eq!(leases.disconnect(one, &mut blobs()), BTreeSet::new());
    }

    #[test]
    fn ids_of_blobs_that_are_gone_do_not_pile_up() {
        let mut leases = Leases::default();
        let one = leases.connect(Transport::Ipc);
        let mut blobs = blobs();
        blobs.create(BLOB, 1, one).unwrap();
        leases.hold(one, BLOB, &mut blobs);
        for id in 0..100_000 {
            leases.hold(one, ObjectId(id), &mut blobs);
        }
        assert!(leases.connections[&one].held.len() <= SPARED);
        assert_eq!(leases.release(one, BLOB, &mut blobs), Ok(()));
    }
}
