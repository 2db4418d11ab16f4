//! Blobs: created → sealed → deleted.
//!
//! A blob's range of the arena outlives the blob while somebody copies its bytes (a *pin*) and
//! until its pages are given back, if that was asked for. Only then others may get the range.
//!
//! A blob may also be in a file of its own. It moves between arena and file only while it is
//! sealed and nobody copies its bytes, and out of the arena only while nobody holds it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::eviction::Cold;
use super::lease::ConnectionId;
use crate::shard::ids::ObjectId;
use crate::shard::memory::{Full, Pool};
use crate::shard::spill::DATA;

/// What a blob's offset counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// The arena.
    Arena,
    /// A file on disk that has nothing but this blob.
    File {
        /// Never stands for another file; 2 and more.
        number: i32,
        /// Bytes the file has.
        length: u64,
    },
}

/// Number of the first file; what is lower stands for the arena.
const FIRST_FILE: i32 = 2;

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
    pub(super) region: Region,
    /// Connections that hold it.
    holders: u32,
    /// How often it was asked to stay in memory.
    kept: u32,
}

impl Blob {
    fn new(region: Region, offset: u64, size: u64, writer: ConnectionId) -> Self {
        Self {
            offset,
            size,
            room: size,
            writer: Some(writer),
            pins: 0,
            region,
            holders: 0,
            kept: 0,
        }
    }

    pub(super) fn is_resident(&self) -> bool {
        self.region == Region::Arena
    }

    pub(super) fn is_held(&self) -> bool {
        self.holders > 0
    }

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
    /// Deleted blobs on disk that somebody still copies, and how many do.
    doomed_files: BTreeMap<ObjectId, u32>,
    /// Sealed blobs in memory that nobody holds.
    cold: Cold,
    /// Blobs that are in files.
    on_disk: usize,
    /// Number of the latest file.
    last_file: i32,
}

impl Blobs {
    pub(super) fn new(pool: Pool) -> Self {
        Self {
            pool,
            blobs: BTreeMap::new(),
            doomed: BTreeMap::new(),
            trimming: 0,
            doomed_files: BTreeMap::new(),
            cold: Cold::default(),
            on_disk: 0,
            last_file: FIRST_FILE - 1,
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
        let blob = Blob::new(Region::Arena, offset, size, writer);
        self.blobs.insert(id, blob);
        Ok(blob)
    }

    /// A new blob in a file; none where files have used up all numbers.
    pub(super) fn create_on_disk(
        &mut self,
        id: ObjectId,
        size: u64,
        writer: ConnectionId,
    ) -> Option<Blob> {
        let region = self.new_file(size)?;
        let blob = Blob::new(region, DATA, size, writer);
        self.blobs.insert(id, blob);
        self.on_disk += 1;
        Some(blob)
    }

    fn new_file(&mut self, size: u64) -> Option<Region> {
        let number = self.last_file.checked_add(1)?;
        self.last_file = number;
        let length = size.saturating_add(DATA);
        Some(Region::File { number, length })
    }

    /// Lets others see it. Who could write until now, if anybody could.
    pub(super) fn seal(&mut self, id: ObjectId) -> Option<Option<ConnectionId>> {
        let blob = self.blobs.get_mut(&id)?;
        let writer = blob.writer.take();
        if writer.is_some() && blob.holders == 0 && blob.is_resident() {
            self.cold.insert(id);
        }
        Some(writer)
    }

    /// Cuts an unsealed blob to `kept` bytes, no more than it has. The range to trim.
    pub(super) fn shrink(&mut self, id: ObjectId, kept: u64) -> Option<Range<u64>> {
        let blob = self.blobs.get_mut(&id)?;
        if !blob.is_resident() {
            blob.size = kept;
            return None;
        }
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

    /// Forgets a blob and stops counting its bytes.
    pub(super) fn delete(&mut self, id: ObjectId, trim: bool) -> Option<Deleted> {
        let blob = self.blobs.remove(&id)?;
        self.cold.remove(id);
        if !blob.is_resident() {
            self.on_disk -= 1;
            if blob.pins > 0 {
                self.doomed_files.insert(id, blob.pins);
            }
            let vacated = Vacated {
                trim: None,
                discard: (blob.pins == 0).then_some(id),
            };
            let writer = blob.writer;
            return Some(Deleted { writer, vacated });
        }
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
            vacated: Vacated {
                trim,
                discard: None,
            },
        })
    }

    /// Keeps others from getting the range of this blob until [`Self::unpin`].
    pub(super) fn pin(&mut self, id: ObjectId) -> Option<Blob> {
        let blob = self.blobs.get_mut(&id)?;
        blob.pins += 1;
        Some(*blob)
    }

    /// Ends what [`Self::pin`] began.
    pub(super) fn unpin(&mut self, id: ObjectId, offset: u64) -> Vacated {
        let mut vacated = Vacated::default();
        if let Some(pins) = self.doomed_files.get_mut(&id) {
            *pins -= 1;
            if *pins == 0 {
                self.doomed_files.remove(&id);
                vacated.discard = Some(id);
            }
            return vacated;
        }
        vacated.trim = self.unpin_range(id, offset);
        vacated
    }

    fn unpin_range(&mut self, id: ObjectId, offset: u64) -> Option<Range<u64>> {
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
            None if self.doomed_files.contains_key(&id) => true,
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

    // Between arena and files.

    /// Whether any blob is in a file.
    pub(super) fn are_on_disk(&self) -> bool {
        self.on_disk > 0
    }

    /// One more connection holds it.
    pub(super) fn held(&mut self, id: ObjectId) {
        if let Some(blob) = self.blobs.get_mut(&id) {
            blob.holders += 1;
            self.cold.remove(id);
        }
    }

    /// A connection that held it no longer does.
    pub(super) fn released(&mut self, id: ObjectId) {
        if let Some(blob) = self.blobs.get_mut(&id) {
            blob.holders -= 1;
            if blob.holders == 0 && blob.is_sealed() && blob.is_resident() {
                self.cold.insert(id);
            }
        }
    }

    /// It is to stay in memory, once more.
    pub(super) fn keep(&mut self, id: ObjectId) {
        if let Some(blob) = self.blobs.get_mut(&id) {
            blob.kept = blob.kept.saturating_add(1);
        }
    }

    /// Ends what one [`Self::keep`] began.
    pub(super) fn unkeep(&mut self, id: ObjectId) {
        if let Some(blob) = self.blobs.get_mut(&id) {
            blob.kept = blob.kept.saturating_sub(1);
        }
    }

    /// The coldest blobs that have `bytes` together, or all there are; pinned.
    pub(super) fn victims(&mut self, bytes: u64) -> Vec<(ObjectId, Blob)> {
        let mut victims = Vec::new();
        let mut sum = 0;
        for id in self.cold.iter() {
            if sum >= bytes {
                break;
            }
            if let Some(blob) = self.blobs.get_mut(&id)
                && blob.pins == 0
                && blob.kept == 0
            {
                blob.pins += 1;
                sum += blob.size;
                victims.push((id, *blob));
            }
        }
        victims
    }

    /// Pins a blob that may go to disk although `holders` hold it.
    pub(super) fn victim(&mut self, id: ObjectId, holders: u32) -> Option<Blob> {
        let blob = self.blobs.get_mut(&id)?;
        let is_free = blob.is_sealed() && blob.is_resident() && blob.pins == 0;
        if !is_free || blob.kept > 0 || blob.holders > holders {
            return None;
        }
        blob.pins += 1;
        Some(*blob)
    }

    /// A victim's bytes are on disk: it is there from now on, unless somebody has come to need
    /// it in memory. Ends the pin.
    pub(super) fn move_out(
        &mut self,
        id: ObjectId,
        offset: u64,
        holders: u32,
        trim: bool,
    ) -> (bool, Vacated) {
        let is_movable = self
            .blobs
            .get(&id)
            .is_some_and(|blob| blob.pins == 1 && blob.kept == 0 && blob.holders <= holders);
        let region = self.blobs.get(&id).map(|blob| blob.size);
        let region = region.and_then(|size| self.new_file(size));
        let (Some(blob), Some(region), true) = (self.blobs.get_mut(&id), region, is_movable) else {
            return (false, self.unpin(id, offset));
        };
        let range = Pool::range(blob.offset, blob.room);
        blob.pins = 0;
        blob.region = region;
        blob.offset = DATA;
        self.pool.uncount(blob.size);
        self.on_disk += 1;
        self.cold.remove(id);
        let vacated = Vacated {
            trim: self.vacate(range, trim),
            discard: None,
        };
        (true, vacated)
    }

    /// Takes room in the arena for a sealed blob that is on disk, and pins it: its new offset and
    /// its size. None if it is not there, or somebody copies it.
    pub(super) fn begin_return(&mut self, id: ObjectId) -> Option<Result<(u64, u64), Full>> {
        let blob = self.blobs.get_mut(&id)?;
        if blob.is_resident() || !blob.is_sealed() || blob.pins > 0 {
            return None;
        }
        let offset = match self.pool.allocate(blob.size) {
            Ok(offset) => offset,
            Err(full) => return Some(Err(full)),
        };
        blob.pins += 1;
        Some(Ok((offset, blob.size)))
    }

    /// Ends what [`Self::begin_return`] began. If `is_read`, the blob's bytes are in the arena,
    /// and that is where it is from now on, unless it has been deleted or somebody copies it.
    pub(super) fn end_return(
        &mut self,
        id: ObjectId,
        (offset, size): (u64, u64),
        is_read: bool,
    ) -> (bool, Vacated) {
        if is_read
            && let Some(blob) = self.blobs.get_mut(&id)
            && blob.pins == 1
        {
            blob.pins = 0;
            blob.region = Region::Arena;
            blob.offset = offset;
            blob.room = size;
            self.on_disk -= 1;
            if blob.holders == 0 {
                self.cold.insert(id);
            }
            return (true, Vacated::default());
        }
        self.pool.uncount(size);
        self.pool.place(Pool::range(offset, size));
        (false, self.unpin(id, DATA))
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
    pub(super) vacated: Vacated,
}

/// What is due now that nobody needs it any more.
#[derive(Debug, Default)]
pub(super) struct Vacated {
    /// The range to trim.
    pub(super) trim: Option<Range<u64>>,
    /// The blob whose file is to be removed.
    pub(super) discard: Option<ObjectId>,
}
