//! The dummy filesystem as values: inodes, entries, and what each answers.
//!
//! One flat directory of read-only files. What a file says is the caller's business.
//!
//! Invariant: inode numbers and file handles mean the same to every process that ever serves a
//! mount, because a mount outlives its server: a file keeps its number for good, numbers are
//! never used anew, and the handle of every open file is 0.

use std::time::{Duration, SystemTime};

use fuser::{Errno, FileAttr, FileType, FopenFlags, INodeNo};

/// A file of the dummy filesystem; the number is its inode's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u64)]
pub(super) enum File {
    /// Where the UNIX socket is.
    IpcSocket = 2,
    /// Where the RPC door is.
    RpcEndpoint = 3,
    /// Both, as official clients read it.
    Config = 4,
    /// How the runtime fares, live.
    Status = 5,
    /// Its figures, live.
    Metrics = 6,
}

/// In the order in which a listing shows them.
const FILES: [(File, &str); 5] = [
    (File::IpcSocket, "VINEYARD_IPC_SOCKET"),
    (File::RpcEndpoint, "VINEYARD_RPC_ENDPOINT"),
    (File::Config, "vineyard-config.yaml"),
    (File::Status, "status"),
    (File::Metrics, "metrics"),
];

/// The directory itself.
const ROOT: INodeNo = INodeNo::ROOT;

/// What the files say.
pub(super) trait Source {
    /// The content of a file at this moment.
    fn content(&self, file: File) -> Vec<u8>;
    /// When the contents that do not live were given.
    fn given(&self) -> SystemTime;
}

impl File {
    fn inode(self) -> INodeNo {
        INodeNo(self as u64)
    }

    /// Whether each look may find something else, as in `/proc`.
    fn is_live(self) -> bool {
        matches!(self, Self::Status | Self::Metrics)
    }
}

/// An inode with its attributes and how long the kernel may believe them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) attr: FileAttr,
    pub(super) ttl: Duration,
}

/// An entry of the directory, and the offset at which the next one is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) name: &'static str,
    pub(super) entry: Entry,
    pub(super) next: u64,
}

/// The figures of statfs(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Statfs {
    pub(super) files: u64,
    pub(super) block_size: u32,
    pub(super) name_length: u32,
}

/// What is at an inode.
#[derive(Clone, Copy)]
enum Node {
    Root,
    File(File),
}

fn node(inode: INodeNo) -> Result<Node, Errno> {
    if inode == ROOT {
        return Ok(Node::Root);
    }
    FILES
        .iter()
        .find(|(file, _)| file.inode() == inode)
        .map(|(file, _)| Node::File(*file))
        // The number of a file that a later version has and this one has not.
        .ok_or(Errno::ESTALE)
}

/// What a name in a directory stands for.
pub(super) fn lookup(source: &dyn Source, parent: INodeNo, name: &[u8]) -> Result<Entry, Errno> {
    match node(parent)? {
        Node::File(_) => Err(Errno::ENOTDIR),
        Node::Root => FILES
            .iter()
            .find(|(_, known)| known.as_bytes() == name)
            .map(|(file, _)| entry(source, Node::File(*file)))
            .ok_or(Errno::ENOENT),
    }
}

/// What stat(2) shows of an inode.
pub(super) fn getattr(source: &dyn Source, inode: INodeNo) -> Result<Entry, Errno> {
    node(inode).map(|node| entry(source, node))
}

/// Opens a file for reading.
pub(super) fn open(inode: INodeNo, flags: i32) -> Result<FopenFlags, Errno> {
    match node(inode)? {
        Node::Root => Err(Errno::EISDIR),
        Node::File(_) if flags & libc::O_ACCMODE != libc::O_RDONLY => Err(Errno::EROFS),
        // Without the page cache nothing old is ever read, and the length of a read is not
        // bounded by a size that was believed earlier. Without flush(2), a process that dies
        // with the file open needs no answer from us to be gone.
        Node::File(_) => Ok(FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH),
    }
}

/// Opens the directory.
pub(super) fn opendir(inode: INodeNo) -> Result<FopenFlags, Errno> {
    match node(inode)? {
        Node::Root => Ok(FopenFlags::FOPEN_NOFLUSH),
        Node::File(_) => Err(Errno::ENOTDIR),
    }
}

/// Bytes of a file, fewer than asked for at its end.
///
/// A live file is made anew for each read: who reads it in several pieces may see several
/// moments, as with most files of `/proc`.
pub(super) fn read(
    source: &dyn Source,
    inode: INodeNo,
    offset: u64,
    size: u32,
) -> Result<Vec<u8>, Errno> {
    let Node::File(file) = node(inode)? else {
        return Err(Errno::EISDIR);
    };
    let mut content = source.content(file);
    let start = usize::try_from(offset).map_or(content.len(), |offset| offset.min(content.len()));
    content.drain(..start);
    content.truncate(usize::try_from(size).unwrap_or(usize::MAX));
    Ok(content)
}

/// The directory from an offset on.
pub(super) fn readdir(
    source: &dyn Source,
    inode: INodeNo,
    offset: u64,
) -> Result<Vec<Listed>, Errno> {
    let Node::Root = node(inode)? else {
        return Err(Errno::ENOTDIR);
    };
    let listed = [(".", Node::Root), ("..", Node::Root)]
        .into_iter()
        .chain(FILES.iter().map(|(file, name)| (*name, Node::File(*file))))
        .zip(1..)
        .skip(usize::try_from(offset).unwrap_or(usize::MAX))
        .map(|((name, node), next)| Listed {
            name,
            entry: entry(source, node),
            next,
        });
    Ok(listed.collect())
}

/// What df(1) shows.
pub(super) fn statfs() -> Statfs {
    Statfs {
        files: FILES.len() as u64 + 1,
        block_size: 4096,
        name_length: 255,
    }
}

fn entry(source: &dyn Source, node: Node) -> Entry {
    let (inode, kind, perm, size, is_live) = match node {
        Node::Root => (ROOT, FileType::Directory, 0o555, 0, false),
        // As in /proc: the size of what does not exist before it is read is 0.
        Node::File(file) if file.is_live() => (file.inode(), FileType::RegularFile, 0o444, 0, true),
        Node::File(file) => {
            let size = source.content(file).len() as u64;
            (file.inode(), FileType::RegularFile, 0o444, size, false)
        }
    };
    let time = source.given();
    Entry {
        attr: FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        },
        // A second is how long a changed size may go unnoticed by stat(2); reads notice at once.
        ttl: if is_live {
            Duration::ZERO
        } else {
            Duration::from_secs(1)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;

    impl Source for Fixed {
        fn content(&self, file: File) -> Vec<u8> {
            format!("{file:?}\n").into_bytes()
        }

        fn given(&self) -> SystemTime {
            SystemTime::UNIX_EPOCH
        }
    }

    #[test]
    fn numbers_and_names_of_files_never_change() {
        let listed = readdir(&Fixed, ROOT, 0).unwrap();
        let shown: Vec<_> = listed
            .iter()
            .map(|l| (l.name, l.entry.attr.ino.0))
            .collect();
        assert_eq!(
            shown,
            [
                (".", 1),
                ("..", 1),
                ("VINEYARD_IPC_SOCKET", 2),
                ("VINEYARD_RPC_ENDPOINT", 3),
                ("vineyard-config.yaml", 4),
                ("status", 5),
                ("metrics", 6),
            ]
        );
    }

    #[test]
    fn a_listing_goes_on_where_it_stopped() {
        let all = readdir(&Fixed, ROOT, 0).unwrap();
        for (index, listed) in all.iter().enumerate() {
            assert_eq!(
                readdir(&Fixed, ROOT, listed.next).unwrap(),
                all[index + 1..]
            );
        }
        assert_eq!(readdir(&Fixed, ROOT, u64::MAX), Ok(vec![]));
    }

    #[test]
    fn every_listed_name_is_found_with_what_the_listing_says() {
        for listed in readdir(&Fixed, ROOT, 2).unwrap() {
            assert_eq!(
                lookup(&Fixed, ROOT, listed.name.as_bytes()),
                Ok(listed.entry)
            );
            assert_eq!(getattr(&Fixed, listed.entry.attr.ino), Ok(listed.entry));
        }
    }

    #[test]
    fn files_are_read_at_any_offset() {
        let config = File::Config.inode();
        for (offset, size, want) in [
            (0, 4096, "Config\n"),
            (0, 3, "Con"),
            (3, 2, "fi"),
            (6, 100, "\n"),
            (7, 1, ""),
            (u64::MAX, u32::MAX, ""),
            (0, 0, ""),
        ] {
            assert_eq!(read(&Fixed, config, offset, size).unwrap(), want.as_bytes());
        }
    }

    #[test]
    fn fixed_files_have_their_size_and_live_ones_none() {
        let size = |file: File| getattr(&Fixed, file.inode()).unwrap();
        assert_eq!(size(File::Config).attr.size, 7);
        assert_eq!(size(File::Status).attr.size, 0);
        assert_eq!(size(File::Status).ttl, Duration::ZERO);
    }

    #[test]
    fn what_cannot_be_is_answered_by_its_errno() {
        let (file, none) = (File::Status.inode(), INodeNo(99));
        assert_eq!(lookup(&Fixed, ROOT, b"nothing"), Err(Errno::ENOENT));
        assert_eq!(lookup(&Fixed, file, b"status"), Err(Errno::ENOTDIR));
        assert_eq!(lookup(&Fixed, none, b"status"), Err(Errno::ESTALE));
        assert_eq!(getattr(&Fixed, none), Err(Errno::ESTALE));
        assert_eq!(open(ROOT, libc::O_RDONLY), Err(Errno::EISDIR));
        assert_eq!(open(file, libc::O_WRONLY), Err(Errno::EROFS));
        assert_eq!(open(file, libc::O_RDWR), Err(Errno::EROFS));
        assert_eq!(opendir(file), Err(Errno::ENOTDIR));
        assert_eq!(read(&Fixed, ROOT, 0, 1), Err(Errno::EISDIR));
        assert_eq!(readdir(&Fixed, file, 0), Err(Errno::ENOTDIR));
    }

    #[test]
    fn closing_a_file_asks_nothing_of_a_server() {
        for flags in [open(File::Config.inode(), libc::O_RDONLY), opendir(ROOT)] {
            assert!(flags.unwrap().contains(FopenFlags::FOPEN_NOFLUSH));
        }
    }
}
