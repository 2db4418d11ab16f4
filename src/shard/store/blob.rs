//! Blobs: created → sealed → deleted.
//!
//! A blob's range of the arena outlives the blob while somebody copies its bytes (a *pin*) and
//! until its pages are given back, if that was asked for. Only then others may get the range.

use std::collections::BTreeMap;
use std::ops::Range;

use super::lease::ConnectionId;
use crate::shard::ids::ObjectId;
use crate::shard::memory::{Full, Pool};

/// Free ranges that are shorter, in bytes, keep their pages: a system call for each is not worth it.
const RECLAIMED: u64 = 64 << 10;

/// A blob that exists.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blob {
    pub(super) offset: u64,
    pub(super) size: u64,
    /// Bytes its range was made for, no less than `size`.
    room: u64,
    /// Who may still write; none once it is sealed.
    pub(super) writer: Option<ConnectionId>,
    /// Copies under way.
    pins: u32,
}

impl Blob {
    pub(super) fn is_sealed(&self) -> bool {
        self.writer.is_none()
    }
}

/// A deleted blob whose bytes somebody still copies.
#[derive(Debug)]
struct Doomed {
    range: Range<u64>,
    size: u64,
    pins: u32,
    trim: bool,
}

/// All blobs, and the memory they are in.
#[derive(Debug)]
pub(super) struct Blobs {
    pool: Pool,
    blobs: BTreeMap<ObjectId, Blob>,
    /// By offset.
    doomed: BTreeMap<u64, Doomed>,
    /// Ranges whose pages are being given back.
    trimming: usize,
}

impl Blobs {
    pub(super) fn new(pool: Pool) -> Self {
        Self {
            pool,
            blobs: BTreeMap::new(),
            doomed: BTreeMap::new(),
            trimming: 0,
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.pool.used()
    }

    pub(super) fn limit(&self) -> u64 {
        self.pool.limit()
    }

    pub(super) fn get(&self, id: ObjectId) -> Option<&Blob> {
        self.blobs.get(&id)
    }

    pub(super) fn contains(&self, id: ObjectId) -> bool {
        self.blobs.contains_key(&id)
    }

    /// Ascending by id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (ObjectId, &Blob)> {
        self.blobs.iter().map(|(&id, blob)| (id, blob))
    }

    /// Whether ranges come back soon that a failed creation could have used.
    pub(super) fn is_trimming(&self) -> bool {
        self.trimming > 0
    }

    pub(super) fn create(
        &mut self,
        id: ObjectId,
        size: u64,
        writer: ConnectionId,
    ) -> Result<Blob, Full> {
        let offset = self.pool.allocate(size)?;
        let blob = Blob {
            offset,
            size,
            room: size,
            writer: Some(writer),
            pins: 0,
        };
        self.blobs.insert(id, blob);
        Ok(blob)
    }

    /// Lets others see it. Who could write until now, if anybody could.
    pub(super) fn seal(&mut self, id: ObjectId) -> Option<Option<ConnectionId>> {
        self.blobs.get_mut(&id).map(|blob| blob.writer.take())
    }

    /// Cuts an unsealed blob to `kept` bytes, no more than it has. The range to trim.
    pub(super) fn shrink(&mut self, id: ObjectId, kept: u64) -> Option<Range<u64>> {
        let blob = self.blobs.get_mut(&id)?;
        self.pool.uncount(blob.size - kept);
        blob.size = kept;
        if blob.pins > 0 {
            // Somebody copies the bytes: the range stays whole for as long as the blob lives.
            return None;
        }
        let tail = Pool::tail(blob.offset, blob.room, kept);
        blob.room = kept;
        self.vacate(tail, true)
    }

    /// Forgets a blob and stops counting its bytes. The range to trim, if that is due now.
    pub(super) fn delete(&mut self, id: ObjectId, trim: bool) -> Option<Deleted> {
        let blob = self.blobs.remove(&id)?;
        self.pool.uncount(blob.size);
        let range = Pool::range(blob.offset, blob.room);
        let trim = if blob.pins > 0 {
            let doomed = Doomed {
                range,
                size: blob.size,
                pins: blob.pins,
                trim,
            };
            self.doomed.insert(blob.offset, doomed);
            None
        } else {
            self.vacate(range, trim)
        };
        Some(Deleted {
            writer: blob.writer,
            trim,
        })
    }

    /// Keeps others from getting the range of this blob until [`Self::unpin`].
    pub(super) fn pin(&mut self, id: ObjectId) -> Option<Blob> {
        let blob = self.blobs.get_mut(&id)?;
        blob.pins += 1;
        Some(*blob)
    }

    /// Ends what [`Self::pin`] began. The range to trim, if that is due now.
    pub(super) fn unpin(&mut self, id: ObjectId, offset: u64) -> Option<Range<u64>> {
        if let Some(blob) = self.blobs.get_mut(&id)
            && blob.offset == offset
        {
            blob.pins -= 1;
            return None;
        }
        let doomed = self.doomed.get_mut(&offset)?;
        doomed.pins -= 1;
        if doomed.pins > 0 {
            return None;
        }
        let doomed = self.doomed.remove(&offset)?;
        self.vacate(doomed.range, doomed.trim)
    }

    /// Whether `size` bytes at `offset` belong to the blob, or belonged to it and are pinned.
    pub(super) fn is_backed(&self, id: ObjectId, offset: u64, size: u64) -> bool {
        match self.blobs.get(&id) {
            Some(blob) => blob.offset == offset && size <= blob.size,
            None => self
                .doomed
                .get(&offset)
                .is_some_and(|doomed| size <= doomed.size),
        }
    }

    /// All free ranges that are worth trimming.
    pub(super) fn reclaim(&mut self) -> Vec<Range<u64>> {
        let taken = self.pool.take_free(RECLAIMED);
        self.trimming += taken.len();
        taken
    }

    /// A range that was to be trimmed has been.
    pub(super) fn trimmed(&mut self, range: Range<u64>) {
        self.trimming -= 1;
        self.pool.place(range);
    }

    fn vacate(&mut self, range: Range<u64>, trim: bool) -> Option<Range<u64>> {
        if trim && !range.is_empty() {
            self.trimming += 1;
            Some(range)
        } else {
            self.pool.place(range);
            None
        }
    }
}

/// What was deleted.
#[derive(Debug)]
pub(super) struct Deleted {
    /// Who could write, if it was not sealed.
    pub(super) writer: Option<ConnectionId>,
    /// The range to trim now.
    pub(super) trim: Option<Range<u64>>,
}
