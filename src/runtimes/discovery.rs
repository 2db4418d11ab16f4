//! The files by which clients find a runtime: written whole or not at all.
//!
//! Each is made under a temporary name in its own directory and renamed over the old one, so a
//! reader sees the one or the other. Nothing is synced to disk: after a reboot the runtime is
//! started anew and so are its files.
//!
//! The content of `vineyard-config.yaml` is what vineyard's clients read (v6d,
//! `python/vineyard/core/client.py`): a relative `IPCSocket` is looked for beside the file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::layout::{self, Layout};

/// What clients have to know of a runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovery {
    /// `host:port` of the RPC door; several are joined by commas; empty where there is none.
    pub rpc_endpoint: String,
}

/// Why clients cannot be told of a runtime.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    /// A file or link could not be made.
    #[error("writing {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file or link could not be removed.
    #[error("removing {}", path.display())]
    Remove {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Discovery {
    /// The text of `vineyard-config.yaml`.
    pub fn config(&self) -> String {
        format!(
            "Vineyard:\n  IPCSocket: {}\n  RPCEndpoint: {}\n",
            layout::SOCKET,
            scalar(&self.rpc_endpoint)
        )
    }

    /// Writes what is not there yet as it shall be; `true` if anything was written.
    ///
    /// The config, by which clients begin, comes last: what it names is there before it.
    /// Temporary files of a killed predecessor go on the way.
    pub fn publish(&self, layout: &Layout) -> Result<bool, DiscoveryError> {
        let rpc_conf = layout.rpc_conf_dir();
        fs::create_dir_all(&rpc_conf).map_err(|source| DiscoveryError::Write {
            path: rpc_conf,
            source,
        })?;
        let mut is_changed = false;
        is_changed |= link(Path::new(layout::WORKER_SOCKET), &layout.socket())?;
        is_changed |= write(&self.rpc_endpoint, &layout.rpc_conf())?;
        is_changed |= write(&self.config(), &layout.config())?;
        Ok(is_changed)
    }

    /// Removes what [`Discovery::publish`] wrote, and what it may have left half done.
    ///
    /// Directories stay: somebody may be looking at them through a bind.
    pub fn withdraw(layout: &Layout) -> Result<(), DiscoveryError> {
        for path in [layout.config(), layout.rpc_conf(), layout.socket()] {
            remove(&temporary(&path))?;
            remove(&path)?;
        }
        Ok(())
    }
}

/// A YAML scalar; quoted where YAML would see more than text, as in `[::1]:9600`, or in `10:20`,
/// which is 620 to YAML 1.1, as PyYAML reads it.
fn scalar(text: &str) -> String {
    let host = text.split_once(':').map_or("", |(host, _)| host);
    let is_plain = host.starts_with(|c: char| c.is_ascii_alphanumeric())
        && host.bytes().any(|b| b.is_ascii_alphabetic() || b == b'.')
        && text.ends_with(|c: char| c.is_ascii_digit())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".:,-".contains(&b));
    match is_plain {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "''")),
    }
}

/// The name under which a file grows. It begins with a dot, so that nobody takes it for
/// something; it is the same at every attempt, so that none can pile up.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

fn write(content: &str, path: &Path) -> Result<bool, DiscoveryError> {
    let temporary = temporary(path);
    remove(&temporary)?;
    let is_file = fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
    if is_file && fs::read(path).is_ok_and(|old| old == content.as_bytes()) {
        return Ok(false);
    }
    let written = || {
        // Somebody who can write here could put a link there: O_EXCL follows none (open(2)).
        let mut file: File = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&temporary)?;
        // Whatever the umask says: every pod may read it.
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.write_all(content.as_bytes())?;
        fs::rename(&temporary, path)
    };
    match written() {
        Ok(()) => Ok(true),
        Err(source) => {
            let _ = fs::remove_file(&temporary);
            Err(DiscoveryError::Write {
                path: path.to_path_buf(),
                source,
            })
        }
    }
}

fn link(to: &Path, path: &Path) -> Result<bool, DiscoveryError> {
    let temporary = temporary(path);
    remove(&temporary)?;
    if fs::read_link(path).is_ok_and(|old| old == to) {
        return Ok(false);
    }
    symlink(to, &temporary)
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(|source| DiscoveryError::Write {
            path: path.to_path_buf(),
            source,
        })?;
    Ok(true)
}

fn remove(path: &Path) -> Result<(), DiscoveryError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(DiscoveryError::Remove {
            path: path.to_path_buf(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::RuntimeId;
    use super::*;

    fn layout(root: &Path) -> Layout {
        Layout::new(root, &RuntimeId::new("default", "vineyard").unwrap()).unwrap()
    }

    fn discovery(rpc_endpoint: &str) -> Discovery {
        Discovery {
            rpc_endpoint: rpc_endpoint.to_owned(),
        }
    }

    #[test]
    fn the_config_is_what_official_clients_read() {
        assert_eq!(
            discovery("10.0.0.7:9600").config(),
            "Vineyard:\n  IPCSocket: vineyard.sock\n  RPCEndpoint: 10.0.0.7:9600\n"
        );
        for endpoint in ["a.b:1,c-d:2", "[::1]:9600", "", "it's:1", "10:20"] {
            let config = discovery(endpoint).config();
            let read: serde_norway::Value = serde_norway::from_str(&config).unwrap();
            assert_eq!(
                read["Vineyard"]["RPCEndpoint"].as_str(),
                Some(endpoint),
                "{config}"
            );
        }
    }

    #[test]
    fn only_endpoints_that_every_yaml_takes_for_text_are_plain() {
        for plain in ["10.0.0.7:9600", "localhost:59", "a.b:1,c-d:2", "7a:20"] {
            assert_eq!(scalar(plain), plain);
        }
        for quoted in [
            "",
            "10:20",
            "[::1]:9600",
            "true",
            "12",
            "a: b:1",
            "-a:1",
            "a:",
        ] {
            assert_eq!(scalar(quoted), format!("'{quoted}'"));
        }
    }

    #[test]
    fn publishing_twice_changes_nothing_and_withdrawing_leaves_the_directories() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        assert!(discovery("h:1").publish(&layout).unwrap());
        let inode = fs::metadata(layout.config()).unwrap().ino();
        assert!(!discovery("h:1").publish(&layout).unwrap());
        assert_eq!(fs::metadata(layout.config()).unwrap().ino(), inode);
        assert!(discovery("h:2").publish(&layout).unwrap());
        assert_eq!(fs::read_to_string(layout.rpc_conf()).unwrap(), "h:2");
        assert_eq!(
            fs::read_link(layout.socket()).unwrap(),
            Path::new("vineyard-worker.sock")
        );
        assert_eq!(fs::metadata(layout.config()).unwrap().mode() & 0o777, 0o644);

        Discovery::withdraw(&layout).unwrap();
        Discovery::withdraw(&layout).unwrap();
        let left: Vec<_> = fs::read_dir(layout.dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["rpc-conf"]);
        assert_eq!(fs::read_dir(layout.rpc_conf_dir()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_predecessor_left_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        discovery("h:1").publish(&layout).unwrap();
        for path in [layout.config(), layout.rpc_conf(), layout.socket()] {
            fs::write(temporary(&path), "half").unwrap();
        }
        discovery("h:1").publish(&layout).unwrap();
        for path in [layout.config(), layout.rpc_conf(), layout.socket()] {
            assert!(!temporary(&path).exists());
        }
    }

    #[test]
    fn a_link_in_the_place_of_a_file_is_replaced_and_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let victim = root.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        let layout = layout(root.path());
        fs::create_dir_all(layout.dir()).unwrap();
        symlink(&victim, layout.config()).unwrap();
        symlink(&victim, temporary(&layout.config())).unwrap();
        discovery("h:1").publish(&layout).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert!(fs::symlink_metadata(layout.config()).unwrap().is_file());
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        fs::create_dir_all(layout.config()).unwrap();
        let error = discovery("h:1").publish(&layout).unwrap_err().to_string();
        assert_eq!(error, format!("writing {}", layout.config().display()));
        assert!(!temporary(&layout.config()).exists());
    }

    #[test]
    fn a_reader_never_sees_a_part_of_a_file() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        let long = "host-with-a-name:9600,".repeat(2000) + "last:1";
        let [one, other] = [discovery("h:1"), discovery(&long)];
        one.publish(&layout).unwrap();
        let whole = [one.config(), other.config()];
        let is_over = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = [0; 2];
                while !is_over.load(Ordering::Relaxed) {
                    let text = fs::read_to_string(layout.config()).unwrap();
                    let which = whole.iter().position(|whole| *whole == text);
                    seen[which.expect("a part of a file")] += 1;
                    assert!(fs::read_link(layout.socket()).is_ok());
                }
                seen
            });
            for _ in 0..500 {
                other.publish(&layout).unwrap();
                one.publish(&layout).unwrap();
            }
            is_over.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert!(seen[0] + seen[1] > 0, "{seen:?}");
    }
}
