//! What is at the target, and what shall be there → what to do.

use std::path::PathBuf;

use crate::mounts::{Found, Mounted, Shown};

/// What publishing takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// It is done already.
    AlreadyPublished,
    /// Make the target directory, bind, and take the directory away again if that fails.
    MakeAndBind,
    /// Bind onto the empty directory that is there.
    Bind,
    /// Touch nothing.
    Refuse(Occupied),
}

/// What stands where a volume was to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occupied {
    /// A mount of something else.
    Mount(Mounted),
    /// A mount of the right thing, but not (or unexpectedly) read-only.
    OtherMode(Mounted),
    /// A symbolic link, as fluid's plugin leaves.
    Symlink(PathBuf),
    /// A directory with entries.
    NotEmpty,
    /// A file.
    Other,
}

impl Occupied {
    /// Whether a volume is published there, as opposed to something lying about.
    pub fn is_mount(&self) -> bool {
        matches!(self, Self::Mount(_) | Self::OtherMode(_))
    }
}

impl std::fmt::Display for Occupied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mode = |mounted: &Mounted| {
            if mounted.read_only {
                "read-only"
            } else {
                "writable"
            }
        };
        match self {
            Self::Mount(mounted) if !mounted.alive => {
                write!(f, "a mount of type {} whose server is gone", mounted.fstype)
            }
            Self::Mount(mounted) => write!(
                f,
                "a mount of {} of the {} filesystem on device {}",
                mounted.shown.root.display(),
                mounted.fstype,
                mounted.shown.device,
            ),
            Self::OtherMode(mounted) => write!(f, "this volume, but {}", mode(mounted)),
            Self::Symlink(text) => write!(f, "a symbolic link to {}", text.display()),
            Self::NotEmpty => f.write_str("a directory with something in it"),
            Self::Other => f.write_str("a file that is no directory"),
        }
    }
}

/// Decides. `is_empty` says whether a plain directory at the target has no entries.
pub fn plan(found: &Found, is_empty: bool, wanted: &Shown, read_only: bool) -> Plan {
    match found {
        Found::Nothing => Plan::MakeAndBind,
        Found::Directory if is_empty => Plan::Bind,
        Found::Directory => Plan::Refuse(Occupied::NotEmpty),
        Found::Symlink(text) => Plan::Refuse(Occupied::Symlink(text.clone())),
        Found::Other => Plan::Refuse(Occupied::Other),
        Found::Mount(mounted) if mounted.shown != *wanted || !mounted.alive => {
            Plan::Refuse(Occupied::Mount(mounted.clone()))
        }
        Found::Mount(mounted) if mounted.read_only != read_only => {
            Plan::Refuse(Occupied::OtherMode(mounted.clone()))
        }
        Found::Mount(_) => Plan::AlreadyPublished,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::{Device, MountTable};
    use std::path::Path;

    fn shown(root: &str) -> Shown {
        Shown {
            device: Device {
                major: 0,
                minor: 25,
            },
            root: PathBuf::from(root),
        }
    }

    /// What is at `/pod/mount` by this line of mountinfo, when `/shard` of 0:25 is wanted
    /// read-only.
    fn check(line: &str, expected: Result<Plan, &str>) {
        let table = MountTable::parse(line.as_bytes()).unwrap();
        let found = match table.at(Path::new("/pod/mount")).last() {
            Some(entry) => Found::Mount(entry.mounted(true)),
            None => Found::Nothing,
        };
        let refused = |plan: Plan| match &plan {
            Plan::Refuse(occupied) => Err(occupied.to_string()),
            Plan::AlreadyPublished | Plan::MakeAndBind | Plan::Bind => Ok(plan),
        };
        let outcome = refused(plan(&found, true, &shown("/shard"), true));
        assert_eq!(outcome, expected.map_err(str::to_owned), "{line}");
    }

    #[test]
    fn publishing_twice_is_ok() {
        let line = "36 35 0:25 /shard /pod/mount ro shared:1 - tmpfs tmpfs rw";
        check(line, Ok(Plan::AlreadyPublished));
    }

    #[test]
    fn another_directory_of_the_same_filesystem_is_another_volume() {
        check(
            "36 35 0:25 /other /pod/mount ro - tmpfs tmpfs rw",
            Err("a mount of /other of the tmpfs filesystem on device 0:25"),
        );
    }

    #[test]
    fn the_same_directory_of_another_filesystem_is_another_volume() {
        check(
            "36 35 0:26 /shard /pod/mount ro - tmpfs tmpfs rw",
            Err("a mount of /shard of the tmpfs filesystem on device 0:26"),
        );
    }

    #[test]
    fn a_writable_bind_of_the_right_directory_is_not_taken_for_a_read_only_one() {
        check(
            "36 35 0:25 /shard /pod/mount rw - tmpfs tmpfs rw",
            Err("this volume, but writable"),
        );
    }

    #[test]
    fn the_topmost_of_stacked_mounts_counts() {
        let lower = "36 35 0:25 /shard /pod/mount ro - tmpfs tmpfs rw";
        let upper = "37 36 0:30 / /pod/mount rw - nfs4 srv:/x rw";
        check(
            &format!("{lower}\n{upper}\n"),
            Err("a mount of / of the nfs4 filesystem on device 0:30"),
        );
    }

    #[test]
    fn nothing_there_means_make_and_bind() {
        check("", Ok(Plan::MakeAndBind));
    }

    #[test]
    fn what_lies_about_is_named_and_left_alone() {
        let wanted = shown("/shard");
        let decide = |found: Found, is_empty| plan(&found, is_empty, &wanted, true);
        assert_eq!(decide(Found::Directory, true), Plan::Bind);
        assert_eq!(
            decide(Found::Directory, false),
            Plan::Refuse(Occupied::NotEmpty)
        );
        assert_eq!(decide(Found::Other, true), Plan::Refuse(Occupied::Other));
        let text = PathBuf::from("/runtime-mnt/vineyard/default/vineyard/vineyard-fuse");
        let refused = decide(Found::Symlink(text.clone()), true);
        assert_eq!(refused, Plan::Refuse(Occupied::Symlink(text)));
    }

    #[test]
    fn a_mount_whose_server_is_gone_is_never_taken_for_ours() {
        let mut mounted = MountTable::parse(b"1 2 0:25 /shard /t ro - fuse.x x ro")
            .unwrap()
            .entries()[0]
            .mounted(false);
        mounted.read_only = true;
        let decided = plan(&Found::Mount(mounted), true, &shown("/shard"), true);
        assert!(matches!(decided, Plan::Refuse(Occupied::Mount(_))));
    }
}
