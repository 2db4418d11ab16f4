//! The kernel's mount table for real: every promise of `Mounter`, each test in a mount namespace
//! of its own (without root: in a user namespace of its own, too), which takes its mounts along
//! when it ends.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use vinelet::mounts::{
    BindOptions, Error, Found, FuseOptions, Linux, MountTable, Mounter, Place, TmpfsOptions,
};
use vinelet::readiness::Readiness;
use vinelet::runtimes::{Board, RuntimeId};
use vinelet::volumes::{
    FiguresFuture, Publish, Published, Roots, ShardFigures, Source, VolumeId, Volumes,
};

const INSIDE: &str = "VINELET_TEST_IN_USER_NAMESPACE";
const READ_ONLY: BindOptions = BindOptions { read_only: true };

/// Runs `test` where it may mount. Mount namespaces belong to threads, so that a thread of the
/// test harness can have its own.
fn in_namespace(name: &str, test: impl FnOnce(&Path)) {
    if unshare(CloneFlags::CLONE_NEWNS).is_ok() {
        return run(test);
    }
    assert!(
        std::env::var_os(INSIDE).is_none(),
        "no mount namespace even in a user namespace"
    );
    again_in_user_namespace(name);
}

fn run(test: impl FnOnce(&Path)) {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    // A tmpfs of our own, shared, as a node's disk is under systemd.
    mount(Some("t"), path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, path, none, MsFlags::MS_SHARED, none).unwrap();
    test(path);
    nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).unwrap();
}

/// This test once more, as an unprivileged user would run it.
fn again_in_user_namespace(name: &str) {
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            name,
            "--include-ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{name} fails in a user namespace");
}

fn at(base: &Path, relative: &str) -> Place {
    Place::beneath(base, &base.join(relative)).unwrap()
}

fn table() -> MountTable {
    MountTable::parse(&fs::read("/proc/thread-self/mountinfo").unwrap()).unwrap()
}

/// Both ways of asking the kernel.
fn both() -> [Linux; 2] {
    [Linux::new(), Linux::without_statmount()]
}

fn fuse_options() -> FuseOptions {
    FuseOptions {
        source: "vineyard".to_owned(),
        subtype: "vineyard-fuse".to_owned(),
    }
}

/// A runtime's directory and a target, as publish finds them.
fn source_and_target(base: &Path) -> (Place, Place) {
    let mounter = Linux::new();
    let source = at(base, "runtime/ns/name");
    let target = at(base, "pods/uid/mount");
    mounter.create_dir(&source, 0o755).unwrap();
    mounter.create_dir(&target, 0o750).unwrap();
    (source, target)
}

#[test]
fn a_bind_is_read_only_from_the_first_moment_and_lets_clients_connect() {
    in_namespace(
        "a_bind_is_read_only_from_the_first_moment_and_lets_clients_connect",
        bind_is_read_only,
    );
}

fn bind_is_read_only(base: &Path) {
    for mounter in both() {
        let (source, target) = source_and_target(base);
        let _listener = UnixListener::bind(source.path().join("s")).unwrap();
        mounter.bind(&source, &target, READ_ONLY).unwrap();

        let Found::Mount(found) = mounter.inspect(&target).unwrap() else {
            panic!("no mount");
        };
        assert_eq!(found.shown, mounter.shown(&source).unwrap());
        assert_eq!((found.read_only, found.alive), (true, true));
        assert_eq!(found.fstype, "tmpfs");

        UnixStream::connect(target.path().join("s")).unwrap();
        let refused = fs::write(target.path().join("forged"), "x").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);

        let table = table();
        let [entry] = table.at(&target.path())[..] else {
            panic!("not exactly one mount");
        };
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            assert!(
                entry.options.split(',').any(|o| o == option),
                "{}",
                entry.options
            );
        }
        let source_group = table.at(base).last().unwrap().shared;
        assert!(entry.shared.is_some() && entry.shared != source_group);
        assert_eq!(entry.master, None);

        assert_eq!(mounter.unmount(&target).unwrap(), 1);
        assert_eq!(mounter.inspect(&target).unwrap(), Found::Directory);
        mounter.remove(&target).unwrap();
        mounter.remove(&target).unwrap();
        assert_eq!(mounter.inspect(&target).unwrap(), Found::Nothing);
        fs::remove_dir_all(base.join("runtime")).unwrap();
    }
}

#[test]
fn a_bind_onto_a_directory_inside_its_source_does_not_echo() {
    in_namespace(
        "a_bind_onto_a_directory_inside_its_source_does_not_echo",
        |base| {
            let mounter = Linux::new();
            let source = at(base, "runtime/ns/name");
            let target = at(base, "runtime/ns/name/vineyard-fuse");
            mounter.create_dir(&target, 0o755).unwrap();
            mounter.bind(&source, &target, READ_ONLY).unwrap();
            assert_eq!(table().beneath(&source.path()).len(), 1);
            assert!(matches!(
                mounter.bind(&source, &target, READ_ONLY),
                Err(Error::Taken { .. })
            ));
            assert_eq!(table().beneath(&source.path()).len(), 1);
        },
    );
}

#[test]
fn a_bind_reaches_the_namespaces_that_receive_from_this_one() {
    in_namespace(
        "a_bind_reaches_the_namespaces_that_receive_from_this_one",
        |base| {
            let (source, target) = source_and_target(base);
            let (asked, asks) = std::sync::mpsc::channel::<PathBuf>();
            let (answers, answered) = std::sync::mpsc::channel();
            std::thread::scope(|scope| {
                let (unshared, go) = std::sync::mpsc::channel();
                scope.spawn(move || {
                    unshare(CloneFlags::CLONE_NEWNS).unwrap();
                    unshared.send(()).unwrap();
                    for path in asks {
                        answers.send(table().at(&path).len()).unwrap();
                    }
                });
                go.recv().unwrap();
                let seen_there = || {
                    asked.send(target.path()).unwrap();
                    answered.recv().unwrap()
                };
                let mounter = Linux::new();
                mounter.bind(&source, &target, READ_ONLY).unwrap();
                assert_eq!(seen_there(), 1);
                mounter.unmount(&target).unwrap();
                assert_eq!(seen_there(), 0);
                drop(asked);
            });
        },
    );
}

#[test]
fn links_on_the_way_are_refused_and_one_at_the_end_is_seen() {
    in_namespace(
        "links_on_the_way_are_refused_and_one_at_the_end_is_seen",
        |base| {
            for mounter in both() {
                let (source, _) = source_and_target(base);
                fs::create_dir_all(base.join("elsewhere/deep")).unwrap();
                let _ = std::os::unix::fs::symlink(base.join("elsewhere"), base.join("link"));
                let through = at(base, "link/deep");
                let is_link = |outcome: Result<(), Error>| {
                    assert!(
                        matches!(outcome, Err(Error::SymbolicLink { .. })),
                        "{outcome:?}"
                    );
                };
                is_link(mounter.inspect(&through).map(drop));
                is_link(mounter.create_dir(&at(base, "link/new"), 0o755).map(drop));
                is_link(mounter.create_dir(&at(base, "link"), 0o755).map(drop));
                is_link(mounter.remove(&through));
                is_link(mounter.unmount(&through).map(drop));
                is_link(mounter.bind(&through, &source, READ_ONLY));
                is_link(mounter.bind(&source, &through, READ_ONLY));
                let link = at(base, "link");
                assert_eq!(
                    mounter.inspect(&link).unwrap(),
                    Found::Symlink(base.join("elsewhere"))
                );
                assert_eq!(mounter.unmount(&link).unwrap(), 0);
                mounter.remove(&link).unwrap();
                assert_eq!(mounter.inspect(&link).unwrap(), Found::Nothing);
                assert!(base.join("elsewhere/deep").is_dir());
            }
        },
    );
}

#[test]
fn what_is_not_ours_is_not_removed() {
    in_namespace("what_is_not_ours_is_not_removed", |base| {
        let mounter = Linux::new();
        fs::create_dir(base.join("full")).unwrap();
        fs::write(base.join("full/file"), "x").unwrap();
        assert!(!mounter.is_empty(&at(base, "full")).unwrap());
        assert!(mounter.remove(&at(base, "full")).is_err());
        assert!(mounter.remove(&at(base, "full/file")).is_err());
        assert_eq!(
            mounter.inspect(&at(base, "full/file")).unwrap(),
            Found::Other
        );
        mounter.remove(&at(base, "absent/absent")).unwrap();
        assert_eq!(mounter.unmount(&at(base, "absent/absent")).unwrap(), 0);
        assert_eq!(
            mounter.inspect(&at(base, "absent/absent")).unwrap(),
            Found::Nothing
        );
        let missing = mounter.inspect(&at(&base.join("no-base"), "x"));
        assert_eq!(missing.unwrap(), Found::Nothing);
    });
}

#[test]
fn stacked_mounts_are_all_detached() {
    in_namespace("stacked_mounts_are_all_detached", |base| {
        let (_, target) = source_and_target(base);
        for _ in 0..40 {
            mount(
                Some("s"),
                &target.path(),
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .unwrap();
        }
        assert_eq!(Linux::new().unmount(&target).unwrap(), 40);
        assert_eq!(table().at(&target.path()).len(), 0);
    });
}

#[test]
fn a_tmpfs_has_its_size_and_mode_and_takes_on_another_size() {
    in_namespace(
        "a_tmpfs_has_its_size_and_mode_and_takes_on_another_size",
        |base| {
            for mounter in both() {
                let (_, target) = source_and_target(base);
                let options = TmpfsOptions {
                    size: 8 << 20,
                    mode: 0o711,
                };
                mounter.tmpfs(&target, options).unwrap();
                let stat = nix::sys::statvfs::statvfs(&target.path()).unwrap();
                assert_eq!(stat.blocks() * stat.fragment_size(), 8 << 20);
                let mode = fs::metadata(target.path()).unwrap().permissions();
                assert_eq!(
                    std::os::unix::fs::PermissionsExt::mode(&mode) & 0o7777,
                    0o711
                );
                // A second one changes the first, which keeps what it holds.
                fs::write(target.path().join("kept"), "kept").unwrap();
                let larger = TmpfsOptions {
                    size: 16 << 20,
                    ..options
                };
                mounter.tmpfs(&target, larger).unwrap();
                let stat = nix::sys::statvfs::statvfs(&target.path()).unwrap();
                assert_eq!(stat.blocks() * stat.fragment_size(), 16 << 20);
                assert_eq!(fs::read(target.path().join("kept")).unwrap(), b"kept");
                assert_eq!(mounter.unmount(&target).unwrap(), 1);
                fs::remove_dir_all(base.join("runtime")).unwrap();
                fs::remove_dir_all(base.join("pods")).unwrap();
            }
        },
    );
}

#[test]
fn a_fuse_server_that_hangs_is_not_waited_for_and_one_that_is_gone_is_recognised() {
    in_namespace(
        "a_fuse_server_that_hangs_is_not_waited_for_and_one_that_is_gone_is_recognised",
        fuse_life_and_death,
    );
}

fn fuse_life_and_death(base: &Path) {
    for mounter in both() {
        let target = at(base, "fuse");
        mounter.create_dir(&target, 0o755).unwrap();
        // Nobody ever answers INIT: every request waits.
        let fuse = mounter.fuse(&fuse_options()).unwrap();
        mounter.attach(fuse.mount, &target).unwrap();
        let look = || {
            let found = mounter.inspect(&target).unwrap();
            let Found::Mount(mounted) = found else {
                panic!("{found:?}");
            };
            mounted
        };
        let begin = Instant::now();
        let found = look();
        assert!(begin.elapsed() < Duration::from_secs(2));
        assert_eq!(found.fstype, "fuse.vineyard-fuse");
        assert!(found.alive && found.read_only);
        // The second time is free, and leaves no second process behind.
        let begin = Instant::now();
        assert!(look().alive);
        assert!(begin.elapsed() < Duration::from_millis(100));

        drop(fuse.device);
        let deadline = Instant::now() + Duration::from_secs(2);
        while look().alive {
            assert!(Instant::now() < deadline, "a dead server is not recognised");
        }
        // A fresh question finds it dead at once, too.
        assert!(!Linux::new().inspect(&target).map(is_alive).unwrap());

        // The dead one is replaced from beneath; stacked ones go with it.
        let dead = mounter.fuse(&fuse_options()).unwrap();
        let stacked = mounter.fuse(&fuse_options()).unwrap();
        rustix::mount::move_mount(
            &stacked.mount,
            "",
            rustix::fs::CWD,
            target.path(),
            rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .unwrap();
        drop((dead, stacked));
        assert_eq!(table().at(&target.path()).len(), 2);
        let fresh = mounter.fuse(&fuse_options()).unwrap();
        mounter.attach(fresh.mount, &target).unwrap();
        assert_eq!(table().at(&target.path()).len(), 1);
        assert!(look().alive);
        assert_eq!(mounter.unmount(&target).unwrap(), 1);
        mounter.remove(&target).unwrap();
    }
}

fn is_alive(found: Found) -> bool {
    matches!(found, Found::Mount(mounted) if mounted.alive)
}

#[test]
fn a_mount_is_replaced_without_a_moment_without_one() {
    in_namespace("a_mount_is_replaced_without_a_moment_without_one", |base| {
        let target = at(base, "replaced");
        let mounter = Linux::new();
        mounter.create_dir(&target, 0o755).unwrap();
        let first = mounter.fuse(&fuse_options()).unwrap();
        mounter.attach(first.mount, &target).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let path = target.path();
                let mut bare = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    bare += usize::from(table().at(&path).is_empty());
                }
                bare
            });
            let mut devices = Vec::new();
            for _ in 0..50 {
                let next = mounter.fuse(&fuse_options()).unwrap();
                mounter.attach(next.mount, &target).unwrap();
                devices.push(next.device);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(watcher.join().unwrap(), 0);
        });
        assert_eq!(mounter.unmount(&target).unwrap(), 1);
    });
}

#[test]
fn looking_binding_and_unmounting_cost_the_same_with_a_thousand_mounts() {
    in_namespace(
        "looking_binding_and_unmounting_cost_the_same_with_a_thousand_mounts",
        |base| {
            let mounter = Linux::new();
            let (source, target) = source_and_target(base);
            let round = || {
                mounter.bind(&source, &target, READ_ONLY).unwrap();
                let Found::Mount(found) = mounter.inspect(&target).unwrap() else {
                    panic!("no mount");
                };
                assert_eq!(found.shown, mounter.shown(&source).unwrap());
                assert_eq!(mounter.unmount(&target).unwrap(), 1);
                assert_eq!(mounter.inspect(&target).unwrap(), Found::Directory);
            };
            let fastest = |what: &dyn Fn()| {
                (0..30)
                    .map(|_| {
                        let begin = Instant::now();
                        what();
                        begin.elapsed()
                    })
                    .min()
                    .unwrap()
            };
            let look = || {
                let _ = mounter.inspect(&target).unwrap();
            };
            let (few, few_look) = (fastest(&round), fastest(&look));
            for i in 0..1000 {
                let other = at(base, &format!("others/{i}"));
                mounter.create_dir(&other, 0o755).unwrap();
                mounter.bind(&source, &other, READ_ONLY).unwrap();
            }
            let (many, many_look) = (fastest(&round), fastest(&look));
            println!("round {few:?} → {many:?}, look {few_look:?} → {many_look:?}");
            // Reading the table would cost a millisecond more; the bind itself grows by a few
            // microseconds inside the kernel.
            assert!(
                many < few + Duration::from_micros(700),
                "{few:?} → {many:?}"
            );
            assert!(many_look < few_look * 4 + Duration::from_micros(50));
        },
    );
}

#[test]
fn an_inexact_base_still_names_the_same_directory() {
    in_namespace("an_inexact_base_still_names_the_same_directory", |base| {
        for mounter in both() {
            let (source, _) = source_and_target(base);
            let _ = std::os::unix::fs::symlink(base.join("runtime"), base.join("via"));
            let via = at(&base.join("via"), "ns/name");
            assert_eq!(
                mounter.shown(&via).unwrap(),
                mounter.shown(&source).unwrap()
            );
            let other = at(base, "pods/uid");
            assert_ne!(
                mounter.shown(&other).unwrap(),
                mounter.shown(&source).unwrap()
            );
        }
    });
}

#[test]
fn without_the_rights_the_answer_names_them() {
    // A thread of its own, because what it gives up cannot be taken back.
    let outcome = std::thread::spawn(|| {
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = source_and_target(directory.path());
        let empty = rustix::thread::CapabilitySets {
            effective: rustix::thread::CapabilitySet::empty(),
            permitted: rustix::thread::CapabilitySet::empty(),
            inheritable: rustix::thread::CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, empty).unwrap();
        Linux::new().bind(&source, &target, READ_ONLY)
    });
    let error = outcome.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
}

struct NoFigures;

impl ShardFigures for NoFigures {
    fn figures<'a>(&'a self, _: &'a RuntimeId) -> FiguresFuture<'a> {
        Box::pin(async { Err("not asked here".into()) })
    }
}

#[test]
fn a_pod_connects_through_a_published_volume_and_nothing_is_left_of_it() {
    in_namespace(
        "a_pod_connects_through_a_published_volume_and_nothing_is_left_of_it",
        |base| {
            // The runtime's threads are children of this one, so they are in its namespace.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(publish_and_unpublish(base));
        },
    );
}

async fn publish_and_unpublish(base: &Path) {
    let (source, target) = source_and_target(base);
    fs::remove_dir(target.path()).unwrap();
    let id = RuntimeId::new("ns", "name").unwrap();
    let board = Board::default();
    board.set(&id, Readiness::Ready);
    board.complete();
    let roots = Roots {
        kubelet_dir: base.join("pods"),
        runtime_root: base.join("runtime"),
    };
    let mounter = Arc::new(Linux::new());
    let volumes = Volumes::new(roots.clone(), false, mounter, board, Arc::new(NoFigures));
    let request = Publish {
        volume_id: VolumeId::new("v"),
        target: roots.target(&target.path()).unwrap(),
        source: Source {
            runtime: id,
            sub_path: None,
        },
    };
    let patience = Duration::from_secs(1);
    let publish = async || volumes.publish(&request, patience).await;
    let mut fastest = Duration::MAX;
    for _ in 0..100 {
        let begin = Instant::now();
        assert_eq!(publish().await.unwrap(), Published::Now);
        fastest = fastest.min(begin.elapsed());
        assert_eq!(publish().await.unwrap(), Published::Before);
        assert_eq!(table().at(&target.path()).len(), 1);
        assert_eq!(volumes.unpublish(&request.target).await.unwrap(), 1);
        assert!(!target.path().exists());
    }
    println!("publish without its socket {fastest:?}");

    publish().await.unwrap();
    let mode = fs::metadata(target.path()).unwrap().permissions();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode) & 0o7777,
        0o755
    );
    // A socket that is made anew is there at once, also for who came before.
    for _ in 0..3 {
        let _ = fs::remove_file(source.path().join("s"));
        let _listener = UnixListener::bind(source.path().join("s")).unwrap();
        UnixStream::connect(target.path().join("s")).unwrap();
    }
    assert_eq!(volumes.unpublish(&request.target).await.unwrap(), 1);
    assert_eq!(volumes.unpublish(&request.target).await.unwrap(), 0);
    assert_eq!(table().beneath(base).len(), 1);
}

#[test]
fn everything_works_in_a_user_namespace() {
    if std::env::var_os(INSIDE).is_some() {
        return;
    }
    for name in [
        "a_bind_is_read_only_from_the_first_moment_and_lets_clients_connect",
        "a_fuse_server_that_hangs_is_not_waited_for_and_one_that_is_gone_is_recognised",
        "a_tmpfs_has_its_size_and_mode_and_takes_on_another_size",
        "a_mount_is_replaced_without_a_moment_without_one",
        "a_pod_connects_through_a_published_volume_and_nothing_is_left_of_it",
    ] {
        again_in_user_namespace(name);
    }
}
