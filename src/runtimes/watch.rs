//! The runtimes directory: what is in it, and when to look again.
//!
//! inotify(7) says that something changed, never what to believe: after each change the whole
//! directory is read anew. The parent directory is watched, too, so that the directory itself may
//! come, go and be replaced. Kubernetes' ConfigMap volumes work: their files are links through
//! `..data`, and an update swaps that link.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use super::reconcile::Wanted;
use super::spec::{self, FILE_LIMIT, SpecError};

/// A watched directory of VineyardRuntime files.
#[derive(Debug)]
pub struct RuntimesDir {
    path: PathBuf,
    watcher: RecommendedWatcher,
    /// Holds at most one "look again", given by the watcher's thread.
    look: Arc<Notify>,
}

/// Why the runtimes directory cannot be watched or read.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// inotify refuses.
    #[error("watching {} for changes (inotify; see fs.inotify.max_user_instances and max_user_watches in sysctl)", path.display())]
    Watch {
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        source: notify::Error,
    },
    /// The directory is there and cannot be listed.
    #[error("reading the directory {}", path.display())]
    Read {
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl RuntimesDir {
    /// Begins to watch `path`, which need not exist yet.
    pub fn open(path: &Path) -> Result<Self, WatchError> {
        let look = Arc::new(Notify::new());
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        let (watched, told) = (path.clone(), Arc::clone(&look));
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.map_or(true, |event| is_change(&event, &watched)) {
                told.notify_one();
            }
        })
        .map_err(|source| WatchError::Watch {
            path: path.clone(),
            source,
        })?;
        let mut dir = Self {
            path,
            watcher,
            look,
        };
        dir.arm()?;
        Ok(dir)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns when there was a change since the last return, or since `open`.
    ///
    /// Read after it, not before. Cancelling it loses nothing.
    pub async fn changed(&mut self) -> Result<(), WatchError> {
        self.look.notified().await;
        // The directory may be another one now. Watching before reading: a change in between is
        // read, told once more, and then found to be no change.
        self.arm()
    }

    /// What the files say now; none where there is no directory. It blocks on the disk.
    pub fn read(&self) -> Result<Wanted, WatchError> {
        read(&self.path).map_err(|source| WatchError::Read {
            path: self.path.clone(),
            source,
        })
    }

    /// Watches the directory and its parent, or the nearest ancestor there is.
    fn arm(&mut self) -> Result<(), WatchError> {
        let mut is_there = self.watch(&self.path.clone())?;
        let ancestors: Vec<_> = self
            .path
            .ancestors()
            .skip(1)
            .map(Path::to_path_buf)
            .collect();
        for ancestor in ancestors {
            if self.watch(&ancestor)? {
                break;
            }
            is_there = false;
        }
        // It may have come between the two looks.
        match !is_there && self.path.exists() {
            true => self.arm(),
            false => Ok(()),
        }
    }

    /// Whether there is such a directory; then it is watched, however often this is asked.
    fn watch(&mut self, path: &Path) -> Result<bool, WatchError> {
        match self.watcher.watch(path, RecursiveMode::NonRecursive) {
            Ok(()) => Ok(true),
            Err(_) if !path.exists() => Ok(false),
            Err(source) => Err(WatchError::Watch {
                path: path.to_path_buf(),
                source,
            }),
        }
    }
}

/// Whether an event may mean that the files say something else now.
fn is_change(event: &notify::Event, dir: &Path) -> bool {
    let is_write = match event.kind {
        // Our own reading is an access, too; taking it for a change would never end.
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => true,
    };
    // Of an ancestor, only what leads to the directory counts: /etc is busy.
    let concerns = |path: &PathBuf| dir.starts_with(path) || path.starts_with(dir);
    is_write && (event.paths.is_empty() || event.paths.iter().any(concerns))
}

/// Whether a file of this name is meant to be read: not a hidden one, not an editor's leftover.
fn is_ours(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str());
    !name.starts_with('.') && matches!(extension, Some("yaml" | "yml" | "json"))
}

fn read(dir: &Path) -> io::Result<Wanted> {
    let mut wanted = Wanted::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(wanted),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_ours(&name) {
            continue;
        }
        let content = match file(&entry.path()) {
            // Gone since the directory was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => Err(SpecError::Unreadable(error.to_string())),
            Ok(content) => spec::parse(&content),
        };
        wanted.insert(name, content);
    }
    Ok(wanted)
}

/// The content of a file, and no more of it than is ever looked at.
fn file(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    // A FIFO with this name would keep us waiting for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut content = Vec::new();
    let limit = u64::try_from(FILE_LIMIT + 1).unwrap_or(u64::MAX);
    fs::File::open(path)?
        .take(limit)
        .read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;

    fn runtime(name: &str, quota: &str) -> String {
        format!(
            "{{apiVersion: data.fluid.io/v1alpha1, kind: VineyardRuntime, metadata: {{name: {name}}}, \
             spec: {{tieredstore: {{levels: [{{mediumtype: MEM, quota: {quota}}}]}}}}}}"
        )
    }

    /// `file=name:memory` for each runtime, `file=!` for a bad file.
    fn shown(dir: &RuntimesDir) -> String {
        let files = dir.read().unwrap();
        let shown = files.iter().map(|(file, content)| match content {
            Err(_) => format!("{file}=!"),
            Ok(specs) => {
                let specs: Vec<_> = specs
                    .iter()
                    .map(|spec| format!("{}:{}", spec.id.name(), spec.memory))
                    .collect();
                format!("{file}={}", specs.join(","))
            }
        });
        shown.collect::<Vec<_>>().join(" ")
    }

    /// Waits for changes until the directory says this.
    async fn becomes(dir: &mut RuntimesDir, want: &str) {
        let wait = async {
            while shown(dir) != want {
                dir.changed().await.unwrap();
            }
        };
        let outcome = tokio::time::timeout(Duration::from_secs(10), wait).await;
        assert!(outcome.is_ok(), "{:?} is not {want:?}", shown(dir));
    }

    #[tokio::test]
    async fn files_that_come_change_and_go_are_noticed() {
        let root = tempfile::tempdir().unwrap();
        let mut dir = RuntimesDir::open(root.path()).unwrap();
        assert_eq!(shown(&dir), "");
        fs::write(root.path().join("a.yaml"), runtime("a", "1k")).unwrap();
        becomes(&mut dir, "a.yaml=a:1000").await;
        fs::write(root.path().join("a.yaml"), runtime("a", "2k")).unwrap();
        becomes(&mut dir, "a.yaml=a:2000").await;
        fs::write(root.path().join("b.json"), "{").unwrap();
        becomes(&mut dir, "a.yaml=a:2000 b.json=!").await;
        fs::rename(root.path().join("a.yaml"), root.path().join("c.yml")).unwrap();
        becomes(&mut dir, "b.json=! c.yml=a:2000").await;
        fs::remove_file(root.path().join("c.yml")).unwrap();
        becomes(&mut dir, "b.json=!").await;
    }

    #[tokio::test]
    async fn leftovers_and_hidden_files_are_not_read() {
        let root = tempfile::tempdir().unwrap();
        for name in [
            ".a.yaml",
            "a.yaml~",
            ".a.yaml.swp",
            "a.swp",
            "a",
            "README.md",
            "4913",
        ] {
            fs::write(root.path().join(name), "!").unwrap();
        }
        fs::create_dir(root.path().join("d.yaml")).unwrap();
        symlink("nowhere", root.path().join("gone.yaml")).unwrap();
        assert_eq!(shown(&RuntimesDir::open(root.path()).unwrap()), "d.yaml=!");
    }

    #[tokio::test]
    async fn a_configmap_volume_is_followed_through_its_swaps() {
        let root = tempfile::tempdir().unwrap();
        let version = |name: &str, files: &[(&str, String)]| {
            fs::create_dir(root.path().join(name)).unwrap();
            for (file, text) in files {
                fs::write(root.path().join(name).join(file), text).unwrap();
            }
            // kubelet's AtomicWriter: make the link aside, then rename it over `..data`.
            symlink(name, root.path().join("..data_tmp")).unwrap();
            fs::rename(root.path().join("..data_tmp"), root.path().join("..data")).unwrap();
        };
        version("..2026_1", &[("a.yaml", runtime("a", "1k"))]);
        symlink("..data/a.yaml", root.path().join("a.yaml")).unwrap();
        let mut dir = RuntimesDir::open(root.path()).unwrap();
        assert_eq!(shown(&dir), "a.yaml=a:1000");
        version("..2026_2", &[("a.yaml", runtime("a", "2k"))]);
        becomes(&mut dir, "a.yaml=a:2000").await;
        version("..2026_3", &[]);
        becomes(&mut dir, "").await;
    }

    #[tokio::test]
    async fn the_directory_may_come_later_go_and_come_again() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("etc").join("runtimes");
        let mut dir = RuntimesDir::open(&path).unwrap();
        for quota in ["1k", "2k", "3k"] {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("a.yaml"), runtime("a", quota)).unwrap();
            becomes(&mut dir, &format!("a.yaml=a:{}", quota.replace('k', "000"))).await;
            fs::remove_dir_all(root.path().join("etc")).unwrap();
            becomes(&mut dir, "").await;
        }
        fs::create_dir_all(&path).unwrap();
        dir.changed().await.unwrap();
        fs::rename(&path, root.path().join("aside")).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("b.yaml"), runtime("b", "1k")).unwrap();
        becomes(&mut dir, "b.yaml=b:1000").await;
        fs::write(path.join("b.yaml"), runtime("b", "2k")).unwrap();
        becomes(&mut dir, "b.yaml=b:2000").await;
    }

    #[tokio::test]
    async fn reading_is_no_change_and_neither_are_the_neighbours() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("runtimes");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("a.yaml"), runtime("a", "1k")).unwrap();
        let mut dir = RuntimesDir::open(&path).unwrap();
        for _ in 0..3 {
            shown(&dir);
            fs::write(root.path().join("neighbour"), "x").unwrap();
        }
        let quiet = tokio::time::timeout(Duration::from_millis(200), dir.changed()).await;
        assert!(quiet.is_err(), "a change was told where there was none");
    }
}
