//! fuser → tree: one method per request, each a translation.
//!
//! The mount is read-only, so the kernel itself answers EROFS to everything that writes; what is
//! not here is answered ENOSYS by fuser, which the kernel takes for "never ask again" (flush,
//! access, extended attributes) or "do as usual" (lseek).

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

use fuser::{
    FileHandle, Filesystem, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry, ReplyOpen, ReplyStatfs,
    Request,
};

use super::content::Files;
use super::tree;

/// The dummy filesystem for fuser.
#[derive(Debug)]
pub(super) struct Adapter {
    files: Files,
}

/// Inodes are never used for something else.
const GENERATION: Generation = Generation(0);
/// All state of an open file is in its inode number.
const HANDLE: FileHandle = FileHandle(0);

impl Adapter {
    pub(super) fn new(files: Files) -> Self {
        Self { files }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Listings with attributes save a lookup for each entry of an `ls -l`. The last one only
        // tells the kernel what it knows anyway: it obeys FUSE_NOTIFY_RESEND in any case.
        for wanted in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_HAS_RESEND,
        ] {
            // What this kernel lacks is not needed.
            let _ = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match tree::lookup(&self.files, parent, name.as_bytes()) {
            Ok(entry) => reply.entry(&entry.ttl, &entry.attr, GENERATION),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match tree::getattr(&self.files, ino) {
            Ok(entry) => reply.attr(&entry.ttl, &entry.attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match tree::open(ino, flags.0) {
            Ok(flags) => reply.opened(HANDLE, flags),
            Err(errno) => reply.error(errno),
        }
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match tree::opendir(ino) {
            Ok(flags) => reply.opened(HANDLE, flags),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match tree::read(&self.files, ino, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match tree::readdir(&self.files, ino, offset) {
            Ok(entries) => {
                for listed in entries {
                    let attr = &listed.entry.attr;
                    if reply.add(attr.ino, listed.next, attr.kind, listed.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        match tree::readdir(&self.files, ino, offset) {
            Ok(entries) => {
                for listed in entries {
                    let (attr, ttl) = (&listed.entry.attr, &listed.entry.ttl);
                    if reply.add(attr.ino, listed.next, listed.name, ttl, attr, GENERATION) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let found = tree::statfs();
        let block_size = found.block_size;
        reply.statfs(
            0,
            0,
            0,
            found.files,
            0,
            block_size,
            found.name_length,
            block_size,
        );
    }
}
