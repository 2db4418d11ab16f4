//! The kernel's mount table, as text in and values out: `/proc/<pid>/mountinfo`, proc(5).
//!
//! Reading the file is the caller's business; this file only understands it. It serves kernels
//! without `statmount(2)`, tests, and whoever wants to see the whole table.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::{Device, Mounted, Shown};

/// All mounts of a namespace, in the order in which the kernel lists them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable {
    entries: Vec<MountEntry>,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Mount id; reused after an unmount.
    pub id: u64,
    /// The id of the mount it is mounted on.
    pub parent: u64,
    /// What it shows.
    pub shown: Shown,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Options of this mount, joined by commas: `ro,nosuid`.
    pub options: String,
    /// Its peer group, if it is shared.
    pub shared: Option<u64>,
    /// The peer group it receives from, if it is a slave.
    pub master: Option<u64>,
    /// Filesystem type with subtype.
    pub fstype: String,
    /// Source, as the filesystem prints it. Never tells two binds apart.
    pub source: OsString,
    /// Options of the filesystem.
    pub super_options: OsString,
}

/// Why a text is no mount table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("mountinfo line {line} has no valid {field}")]
pub struct TableError {
    /// Counted from 1.
    pub line: usize,
    /// The column, as proc(5) names it.
    pub field: &'static str,
}

impl MountTable {
    /// Understands the text of a mountinfo file.
    ///
    /// Optional fields that are not known are skipped, as proc(5) asks of parsers.
    pub fn parse(text: &[u8]) -> Result<Self, TableError> {
        let lines = text
            .split(|&b| b == b'\n')
            .enumerate()
            .filter(|(_, line)| !line.is_empty());
        let entries = lines
            .map(|(number, line)| {
                entry(line).map_err(|field| TableError {
                    line: number + 1,
                    field,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { entries })
    }

    /// All mounts.
    pub fn entries(&self) -> &[MountEntry] {
        &self.entries
    }

    /// The mount with this id.
    pub fn by_id(&self, id: u64) -> Option<&MountEntry> {
        self.entries.iter().find(|entry| entry.id == id)
    }

    /// Everything mounted exactly at `target`, the topmost last.
    pub fn at(&self, target: &Path) -> Vec<&MountEntry> {
        self.entries
            .iter()
            .filter(|entry| entry.target == target)
            .collect()
    }

    /// Everything mounted at `target` or below it.
    pub fn beneath(&self, target: &Path) -> Vec<&MountEntry> {
        self.entries
            .iter()
            .filter(|entry| entry.target.starts_with(target))
            .collect()
    }
}

impl MountEntry {
    /// Whether this mount refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }

    /// Whether the directory it shows has been removed.
    pub fn is_deleted(&self) -> bool {
        self.shown
            .root
            .as_os_str()
            .as_bytes()
            .ends_with(b"//deleted")
    }

    /// The entry as the other files of this room speak of a mount. A table cannot say whether a
    /// server answers.
    pub fn mounted(&self, alive: bool) -> Mounted {
        Mounted {
            shown: self.shown.clone(),
            fstype: self.fstype.clone(),
            read_only: self.is_read_only(),
            alive,
        }
    }
}

/// One line; or the name of the column that is missing or wrong.
fn entry(line: &[u8]) -> Result<MountEntry, &'static str> {
    // A super option may be empty and a source too, so the words are cut at single blanks.
    let mut words = line.split(|&b| b == b' ');
    let mut word = |field| words.next().ok_or(field);
    let id = number(word("mount ID")?).ok_or("mount ID")?;
    let parent = number(word("parent ID")?).ok_or("parent ID")?;
    let device = device(word("major:minor")?).ok_or("major:minor")?;
    let root = path(word("root")?).ok_or("root")?;
    let target = path(word("mount point")?).ok_or("mount point")?;
    let options = String::from_utf8_lossy(word("mount options")?).into_owned();
    let (mut shared, mut master) = (None, None);
    loop {
        let field = word("separator")?;
        if field == b"-" {
            break;
        }
        if let Some(group) = field.strip_prefix(b"shared:") {
            shared = number(group);
        } else if let Some(group) = field.strip_prefix(b"master:") {
            master = number(group);
        }
    }
    let fstype = String::from_utf8_lossy(&unescape(word("filesystem type")?)).into_owned();
    let source = OsString::from_vec(unescape(word("mount source")?));
    let super_options = OsStr::from_bytes(word("super options")?).to_owned();
    Ok(MountEntry {
        id,
        parent,
        shown: Shown { device, root },
        target,
        options,
        shared,
        master,
        fstype,
        source,
        super_options,
    })
}

fn number(word: &[u8]) -> Option<u64> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

fn device(word: &[u8]) -> Option<Device> {
    let (major, minor) = std::str::from_utf8(word).ok()?.split_once(':')?;
    Some(Device {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

/// An absolute path; or what a filesystem without directories prints as root, `net:[4026531840]`.
fn path(word: &[u8]) -> Option<PathBuf> {
    (!word.is_empty()).then(|| PathBuf::from(OsString::from_vec(unescape(word))))
}

/// The kernel writes blank, tab, newline and backslash as three octal digits (`mangle_path`).
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        rest = tail;
        let escaped = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        if let Some(byte) = escaped {
            plain.push(byte);
            rest = &tail[3..];
        } else {
            plain.push(*first);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The recorded tables, with what fluid's own code says of each.
    fn recorded() -> Vec<(String, Vec<u8>, serde_json::Value)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/mountinfo");
        let expected = std::fs::read(folder.join("expected.json")).unwrap();
        let expected: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&expected).unwrap();
        assert_eq!(expected.len(), 49);
        expected
            .into_iter()
            .map(|(name, said)| {
                let text = std::fs::read(folder.join(&name)).unwrap();
                (name, text, said)
            })
            .collect()
    }

    /// An entry as the kernel would print it: what fluid's scripts grep in.
    fn line(entry: &MountEntry) -> String {
        let escape = |text: &OsStr| {
            let mut out = String::new();
            for &b in text.as_bytes() {
                match b {
                    b' ' | b'\t' | b'\n' | b'\\' => out.push_str(&format!("\\{b:03o}")),
                    _ => out.push(char::from(b)),
                }
            }
            out
        };
        let group = |name: &str, group: Option<u64>| {
            group.map_or(String::new(), |g| format!(" {name}:{g}"))
        };
        format!(
            "{} {} {} {} {} {}{}{} - {} {} {}",
            entry.id,
            entry.parent,
            entry.shown.device,
            escape(entry.shown.root.as_os_str()),
            escape(entry.target.as_os_str()),
            entry.options,
            group("shared", entry.shared),
            group("master", entry.master),
            entry.fstype,
            escape(&entry.source),
            entry.super_options.to_string_lossy(),
        )
    }

    /// fluid's `check_mount.sh`: lines that hold the path and the mount type, anywhere.
    fn check_mount(table: &MountTable, fluid_path: &str, mount_type: &str) -> usize {
        let lines = table.entries().iter().map(line);
        lines
            .filter(|line| line.contains(fluid_path) && line.contains(mount_type))
            .count()
    }

    /// fluid's `check_bind_mounts.sh`: whether a pod uses the volume.
    fn check_bind_mounts(table: &MountTable, volume: &str) -> bool {
        let end = format!("/volumes/kubernetes.io~csi/{volume}/mount");
        table.entries().iter().map(line).any(|line| {
            line.find("pods/")
                .is_some_and(|at| line[at..].contains(&end))
        })
    }

    #[test]
    fn fluid_sees_in_every_recorded_table_what_its_own_scripts_saw() {
        for (name, text, said) in recorded() {
            let table = MountTable::parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
            let args = said["check_mount"]["args"].as_array().unwrap();
            let [path, kind] = [0, 1].map(|i| args[i].as_str().unwrap());
            let lines = check_mount(&table, path, kind) as u64;
            assert_eq!(
                lines,
                said["check_mount"]["matching_lines"].as_u64().unwrap(),
                "{name}"
            );
            for (key, said) in said.as_object().unwrap() {
                let volume = key
                    .strip_prefix("in_use(")
                    .and_then(|k| k.strip_suffix(')'));
                if let Some(volume) = volume {
                    assert_eq!(
                        check_bind_mounts(&table, volume),
                        said.as_bool().unwrap(),
                        "{name}: {key}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_recorded_line_is_understood_whole() {
        // Two kinds of optional field are not kept; all else comes back as it was.
        let dropped: BTreeSet<_> =
            ["syn-propagate-from.mountinfo", "syn-unbindable.mountinfo"].into();
        for (name, text, _) in recorded() {
            let table = MountTable::parse(&text).unwrap();
            if dropped.contains(name.as_str()) {
                continue;
            }
            let printed: Vec<_> = table.entries().iter().map(line).collect();
            assert_eq!(
                printed.join("\n"),
                String::from_utf8(text).unwrap().trim_end(),
                "{name}"
            );
        }
    }

    #[test]
    fn unknown_optional_fields_do_not_hide_a_mount() {
        let text =
            b"90 22 0:50 / /a rw,relatime master:50 propagate_from:2 unbindable new:7 - tmpfs t rw";
        let table = MountTable::parse(text).unwrap();
        let entry = table.by_id(90).unwrap();
        assert_eq!((entry.shared, entry.master), (None, Some(50)));
        assert_eq!(entry.fstype, "tmpfs");
    }

    #[test]
    fn octal_escapes_are_undone() {
        let text = b"91 22 0:50 /x\\134y /my\\040ns/a\\011b\\012c\\09 rw - tmpfs my\\040source rw";
        let table = MountTable::parse(text).unwrap();
        let entry = &table.entries()[0];
        assert_eq!(entry.target, Path::new("/my ns/a\tb\nc\\09"));
        assert_eq!(entry.shown.root, Path::new("/x\\y"));
        assert_eq!(entry.source, "my source");
    }

    #[test]
    fn stacked_mounts_are_all_seen_the_topmost_last() {
        let text = std::fs::read(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/data/mountinfo/syn-count-51.mountinfo"),
        )
        .unwrap();
        let table = MountTable::parse(&text).unwrap();
        let target = "/var/lib/kubelet/pods/bbbbbbbb-0000-4000-8000-000000000002/volumes/kubernetes.io~csi/default-vineyard/mount";
        let stack = table.at(Path::new(target));
        assert_eq!(stack.len(), 51);
        assert_eq!(stack[50].id, 150);
    }

    #[test]
    fn a_mount_of_a_removed_directory_is_recognised() {
        let text = std::fs::read(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/data/mountinfo/today-deleted-source.host.mountinfo"),
        )
        .unwrap();
        let table = MountTable::parse(&text).unwrap();
        assert!(table.entries().iter().any(MountEntry::is_deleted));
    }

    #[test]
    fn a_line_that_ends_early_is_named_with_what_it_lacks() {
        for (text, field) in [
            ("", None),
            ("x", Some("mount ID")),
            ("1 2 3", Some("major:minor")),
            ("1 2 0:3 / /a rw shared:1", Some("separator")),
            ("1 2 0:3 / /a rw - tmpfs", Some("mount source")),
        ] {
            let outcome = MountTable::parse(text.as_bytes()).err();
            assert_eq!(outcome.map(|e| e.field), field, "{text:?}");
        }
    }
}
