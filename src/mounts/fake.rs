//! [`Mounter`] in memory, with faults on demand. Clones show the same table.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    BindOptions, DetachedFuse, Device, Error, Found, FuseOptions, Mounted, Mounter, Place, Shown,
    TmpfsOptions,
};

/// A filesystem tree and a mount table that exist in memory only.
///
/// Everything lies on one filesystem, device 8:1, whose root is `/`; a tmpfs has its own.
#[derive(Clone, Debug, Default)]
pub struct Fake(Arc<Mutex<State>>);

/// Which call shall fail next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// [`Mounter::inspect`].
    Inspect,
    /// [`Mounter::create_dir`].
    CreateDir,
    /// [`Mounter::bind`].
    Bind,
    /// [`Mounter::unmount`].
    Unmount,
    /// [`Mounter::remove`].
    Remove,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<PathBuf, Entry>,
    mounts: BTreeMap<PathBuf, Vec<Mounted>>,
    faults: Vec<(Fault, i32)>,
    /// How many changes were made to the mount table.
    changes: usize,
    filesystems: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Directory,
    Symlink(PathBuf),
    Other,
}

impl Fake {
    /// A tree with these directories and those above them.
    pub fn with_directories<P: AsRef<Path>>(directories: impl IntoIterator<Item = P>) -> Self {
        let fake = Self::default();
        for directory in directories {
            fake.add_directory(directory.as_ref());
        }
        fake
    }

    /// Adds a directory and those above it.
    pub fn add_directory(&self, path: &Path) {
        let mut state = self.state();
        for path in path.ancestors() {
            state
                .entries
                .entry(path.to_path_buf())
                .or_insert(Entry::Directory);
        }
    }

    /// Adds a symbolic link.
    pub fn add_symlink(&self, path: &Path, text: &Path) {
        let link = Entry::Symlink(text.to_path_buf());
        self.state().entries.insert(path.to_path_buf(), link);
    }

    /// Adds a file that is neither directory nor link.
    pub fn add_file(&self, path: &Path) {
        self.state()
            .entries
            .insert(path.to_path_buf(), Entry::Other);
    }

    /// Mounts something on top of what is at `path`.
    pub fn add_mount(&self, path: &Path, mounted: Mounted) {
        let mut state = self.state();
        state
            .mounts
            .entry(path.to_path_buf())
            .or_default()
            .push(mounted);
    }

    /// Lets the next call of that kind fail with `errno`.
    pub fn fail(&self, fault: Fault, errno: i32) {
        self.state().faults.push((fault, errno));
    }

    /// How many mounts there are at `path`.
    pub fn depth(&self, path: &Path) -> usize {
        self.state().mounts.get(path).map_or(0, Vec::len)
    }

    /// Whether there is an entry at `path`.
    pub fn exists(&self, path: &Path) -> bool {
        self.state().entries.contains_key(path)
    }

    /// How many changes the mount table has seen.
    pub fn changes(&self) -> usize {
        self.state().changes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn errno(what: String, errno: i32) -> Error {
    Error::answered(what, io::Error::from_raw_os_error(errno))
}

impl State {
    fn fault(&mut self, fault: Fault, what: String) -> Result<(), Error> {
        match self.faults.iter().position(|(f, _)| *f == fault) {
            Some(at) => Err(errno(what, self.faults.remove(at).1)),
            None => Ok(()),
        }
    }

    /// The way to `place`, without the place itself.
    fn walk(&self, place: &Place) -> Result<(), Error> {
        let above = place.relative().ancestors().skip(1).collect::<Vec<_>>();
        for relative in above.into_iter().rev() {
            match self.entries.get(&place.base().join(relative)) {
                Some(Entry::Directory) => {}
                Some(Entry::Symlink(_)) => {
                    return Err(Error::SymbolicLink {
                        place: place.clone(),
                    });
                }
                Some(Entry::Other) => return Err(errno(format!("opening {place}"), libc::ENOTDIR)),
                None => {
                    return Err(Error::NotFound {
                        place: place.clone(),
                    });
                }
            }
        }
        Ok(())
    }

    fn found(&self, place: &Place) -> Result<Found, Error> {
        match self.walk(place) {
            Err(Error::NotFound { .. }) => return Ok(Found::Nothing),
            other => other?,
        }
        let path = place.path();
        if let Some(top) = self.mounts.get(&path).and_then(|stack| stack.last()) {
            return Ok(Found::Mount(top.clone()));
        }
        Ok(match self.entries.get(&path) {
            None => Found::Nothing,
            Some(Entry::Directory) => Found::Directory,
            Some(Entry::Symlink(text)) => Found::Symlink(text.clone()),
            Some(Entry::Other) => Found::Other,
        })
    }

    /// The directory at `place`, as it would be bound.
    fn directory(&self, place: &Place) -> Result<Shown, Error> {
        match self.found(place)? {
            Found::Directory => Ok(Shown {
                device: Device { major: 8, minor: 1 },
                root: place.path(),
            }),
            Found::Mount(mounted) => Ok(mounted.shown),
            Found::Nothing => Err(Error::NotFound {
                place: place.clone(),
            }),
            Found::Symlink(_) => Err(Error::SymbolicLink {
                place: place.clone(),
            }),
            Found::Other => Err(errno(format!("opening {place}"), libc::ENOTDIR)),
        }
    }

    fn require_free(&self, place: &Place) -> Result<(), Error> {
        self.directory(place)?;
        match self.found(place)? {
            Found::Mount(found) => Err(Error::Taken {
                place: place.clone(),
                found: Box::new(found),
            }),
            Found::Nothing | Found::Directory | Found::Symlink(_) | Found::Other => Ok(()),
        }
    }

    fn mount(&mut self, path: PathBuf, mounted: Mounted) {
        self.changes += 1;
        self.mounts.entry(path).or_default().push(mounted);
    }

    fn new_filesystem(&mut self, fstype: &str, read_only: bool) -> Mounted {
        self.filesystems += 1;
        Mounted {
            shown: Shown {
                device: Device {
                    major: 0,
                    minor: self.filesystems,
                },
                root: PathBuf::from("/"),
            },
            fstype: fstype.to_owned(),
            read_only,
            alive: true,
        }
    }
}

impl Mounter for Fake {
    fn inspect(&self, place: &Place) -> Result<Found, Error> {
        let mut state = self.state();
        state.fault(Fault::Inspect, format!("looking at {place}"))?;
        state.found(place)
    }

    fn shown(&self, source: &Place) -> Result<Shown, Error> {
        self.state().directory(source)
    }

    fn is_empty(&self, place: &Place) -> Result<bool, Error> {
        let path = place.path();
        let state = self.state();
        Ok(!state.entries.keys().any(|p| p.parent() == Some(&path)))
    }

    fn create_dir(&self, place: &Place, _mode: u32) -> Result<bool, Error> {
        let mut state = self.state();
        state.fault(Fault::CreateDir, format!("making the directory {place}"))?;
        match state.found(place)? {
            Found::Nothing => {}
            Found::Directory | Found::Mount(_) => return Ok(false),
            Found::Symlink(_) => {
                return Err(Error::SymbolicLink {
                    place: place.clone(),
                });
            }
            Found::Other => {
                return Err(errno(
                    format!("making the directory {place}"),
                    libc::ENOTDIR,
                ));
            }
        }
        for path in place.path().ancestors() {
            state
                .entries
                .entry(path.to_path_buf())
                .or_insert(Entry::Directory);
        }
        Ok(true)
    }

    fn remove(&self, place: &Place) -> Result<(), Error> {
        let mut state = self.state();
        state.fault(Fault::Remove, format!("removing {place}"))?;
        let path = place.path();
        let removing = |number| Err(errno(format!("removing {place}"), number));
        match state.found(place)? {
            Found::Nothing => return Ok(()),
            Found::Mount(_) => return removing(libc::EBUSY),
            Found::Other => return removing(libc::ENOTDIR),
            Found::Directory if state.entries.keys().any(|p| p.parent() == Some(&path)) => {
                return removing(libc::ENOTEMPTY);
            }
            Found::Directory | Found::Symlink(_) => {}
        }
        state.entries.remove(&path);
        Ok(())
    }

    fn bind(&self, source: &Place, target: &Place, options: BindOptions) -> Result<(), Error> {
        let mut state = self.state();
        state.fault(Fault::Bind, format!("binding {source} onto {target}"))?;
        let shown = state.directory(source)?;
        state.require_free(target)?;
        let mounted = Mounted {
            shown,
            fstype: "ext4".to_owned(),
            read_only: options.read_only,
            alive: true,
        };
        state.mount(target.path(), mounted);
        Ok(())
    }

    /// `device` and `mount` of the answer are ends of `/dev/null`: nothing serves them, and
    /// [`Mounter::attach`] takes any descriptor for a filesystem of type `fuse.fake`.
    fn fuse(&self, _options: &FuseOptions) -> Result<DetachedFuse, Error> {
        let null = || {
            std::fs::File::open("/dev/null")
                .map(OwnedFd::from)
                .map_err(|source| Error::Kernel {
                    what: "opening /dev/null".to_owned(),
                    source,
                })
        };
        Ok(DetachedFuse {
            device: null()?,
            mount: null()?,
        })
    }

    fn attach(&self, _mount: OwnedFd, target: &Place) -> Result<(), Error> {
        let mut state = self.state();
        state.directory(target)?;
        let mounted = state.new_filesystem("fuse.fake", true);
        state.mounts.remove(&target.path());
        state.mount(target.path(), mounted);
        Ok(())
    }

    fn tmpfs(&self, target: &Place, _options: TmpfsOptions) -> Result<(), Error> {
        let mut state = self.state();
        state.require_free(target)?;
        let mounted = state.new_filesystem("tmpfs", false);
        state.mount(target.path(), mounted);
        Ok(())
    }

    fn unmount(&self, target: &Place) -> Result<usize, Error> {
        let mut state = self.state();
        state.fault(Fault::Unmount, format!("unmounting {target}"))?;
        match state.walk(target) {
            Err(Error::NotFound { .. }) => return Ok(0),
            other => other?,
        }
        let detached = state.mounts.remove(&target.path()).map_or(0, |s| s.len());
        state.changes += detached;
        Ok(detached)
    }
}
