//! The processes beside the supervisor: those who serve a mount and those who look at it.

use std::error::Error;
use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use vinelet::fuse::{Files, Fixed, Live, Mark};
use vinelet::mounts::{Linux, Place};

use super::Outcome;
use super::channel::{receive, send};

struct Ready;

impl Live for Ready {
    fn status(&self) -> String {
        "ready\n".to_owned()
    }

    fn metrics(&self) -> String {
        "up 1\n".to_owned()
    }
}

fn files() -> Files {
    Files::new(fixed("host:1"), SystemTime::now(), Ready)
}

fn fixed(rpc_endpoint: &str) -> Fixed {
    Fixed {
        ipc_socket: "/var/run/vineyard/x.sock".to_owned(),
        rpc_endpoint: rpc_endpoint.to_owned(),
        config: "Vineyard:".to_owned(),
    }
}

fn place(target: &Path) -> Result<Place, Box<dyn Error>> {
    let base = target.parent().ok_or("no parent")?;
    Ok(Place::beneath(base, target)?)
}

pub(super) fn server(context: Option<&str>, target: &Path) -> Outcome {
    let channel = io::stdin().as_fd().try_clone_to_owned()?;
    let place = place(target)?;
    let (files, mounter) = (files(), Linux::new());
    let mark = match context {
        None => match Mark::establish(&mounter, &place, files.clone()) {
            Ok((mark, custody)) => {
                assert!(custody.can_be_resumed(), "this kernel is older than 6.9");
                send(
                    channel.as_fd(),
                    &custody.context,
                    Some(custody.device.as_fd()),
                )?;
                mark
            }
            Err(error) => return Ok(send(channel.as_fd(), chain(&error).as_bytes(), None)?),
        },
        Some(context) => {
            let digits = (0..context.len()).step_by(2);
            let bytes: Result<Vec<u8>, _> = digits
                .map(|at| u8::from_str_radix(&context[at..at + 2], 16))
                .collect();
            let (_, device) = receive(channel.as_fd())?;
            let device = device.ok_or("no device")?;
            match Mark::resume(device, &bytes?, files.clone()) {
                Ok(mark) => {
                    send(channel.as_fd(), b"serving", None)?;
                    mark
                }
                Err(error) => return Ok(send(channel.as_fd(), chain(&error).as_bytes(), None)?),
            }
        }
    };
    loop {
        let (command, _) = receive(channel.as_fd())?;
        match command.as_slice() {
            b"update" => {
                files.update(fixed("a.longer.name.of.a.host:9600"), SystemTime::now());
                send(channel.as_fd(), b"updated", None)?;
            }
            b"withdraw" => {
                let runtime = tokio::runtime::Builder::new_current_thread().build()?;
                let count = mark.clone().withdraw(&mounter, &place)?;
                let why = runtime.block_on(mark.ended());
                let answer = format!("unmounted {count}, ended: {why}");
                return Ok(send(channel.as_fd(), answer.as_bytes(), None)?);
            }
            _ => return Ok(()),
        }
    }
}

/// Tries to establish a mark where there is no device.
pub(super) fn blind_server(target: &Path) -> Outcome {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        Some("none"),
        "/dev",
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    match Mark::establish(&Linux::new(), &place(target)?, files()) {
        Ok(_) => Ok(()),
        Err(error) => Err(chain(&error).into()),
    }
}

fn chain(error: &dyn Error) -> String {
    let mut text = format!("error: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// Prints everything there is to see, once.
pub(super) fn look(dir: &Path) -> Outcome {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let mut names: Vec<_> = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    names.sort();
    for name in &names {
        let path = dir.join(name);
        let found = fs::metadata(&path)?;
        println!(
            "{} {:o} size {}: {}",
            name.to_string_lossy(),
            found.mode() & 0o7777,
            found.len(),
            fs::read_to_string(&path)?.trim()
        );
    }
    let config = dir.join("vineyard-config.yaml");
    let mut part = [0; 4];
    fs::File::open(&config)?.read_exact_at(&mut part, 4)?;
    println!("part of the config: {}", String::from_utf8_lossy(&part));
    let said = |what: &str, outcome: io::Result<()>| match outcome {
        Ok(()) => println!("{what}: done"),
        Err(error) => println!("{what}: {error}"),
    };
    said(
        "writing",
        fs::OpenOptions::new().write(true).open(&config).map(drop),
    );
    said("creating", fs::File::create(dir.join("new")).map(drop));
    said("removing", fs::remove_file(&config));
    said("no such file", fs::metadata(dir.join("nothing")).map(drop));
    let space = rustix::fs::statvfs(dir)?;
    println!(
        "directory {:o}, {} inodes, {} space",
        fs::metadata(dir)?.mode() & 0o7777,
        space.f_files,
        if space.f_blocks == 0 { "no" } else { "some" }
    );
    Ok(())
}

/// One look at a mount, or what was wrong.
type Look = fn(&Path) -> Result<(), String>;

/// Looks without a pause on several threads; what it takes for an error, and how long the
/// longest look took.
pub(super) fn traffic(dir: &Path) -> Outcome {
    let is_over = AtomicBool::new(false);
    let looks: [Look; 4] = [
        |dir| {
            fs::metadata(dir.join("status"))
                .map(drop)
                .map_err(|e| e.to_string())
        },
        |dir| expect(dir, "status", "ready\n"),
        |dir| expect(dir, "vineyard-config.yaml", "Vineyard:"),
        |dir| match fs::read_dir(dir).map(|entries| entries.filter(|e| e.is_ok()).count()) {
            Ok(5) => Ok(()),
            other => Err(format!("listing: {other:?}")),
        },
    ];
    let reports = std::thread::scope(|scope| {
        let threads: Vec<_> = looks
            .into_iter()
            .map(|look| {
                let is_over = &is_over;
                scope.spawn(move || {
                    let (mut count, mut longest, mut errors) = (0_u64, Duration::ZERO, Vec::new());
                    while !is_over.load(Ordering::Relaxed) && errors.is_empty() {
                        let began = Instant::now();
                        errors.extend(look(dir).err());
                        longest = longest.max(began.elapsed());
                        count += 1;
                    }
                    (count, longest, errors)
                })
            })
            .collect();
        until_told();
        is_over.store(true, Ordering::Relaxed);
        threads
            .into_iter()
            .map(|thread| thread.join())
            .collect::<Vec<_>>()
    });
    let (mut count, mut longest, mut errors) = (0, Duration::ZERO, Vec::new());
    for report in reports {
        let (looks, took, wrong) = report.map_err(|_| "a thread panicked")?;
        count += looks;
        longest = longest.max(took);
        errors.extend(wrong);
    }
    println!(
        "errors {}, looks {count}, longest {longest:?} {errors:?}",
        errors.len()
    );
    Ok(())
}

fn expect(dir: &Path, name: &str, want: &str) -> Result<(), String> {
    match fs::read_to_string(dir.join(name)) {
        Ok(text) if text == want => Ok(()),
        other => Err(format!("{name}: {other:?}")),
    }
}

/// Looks whether there is a mount at every moment, dead or alive.
pub(super) fn watch(dir: &Path) -> Outcome {
    let is_over = AtomicBool::new(false);
    let (mut alive, mut dead, mut bare, mut other) = (0, 0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                match fs::metadata(dir.join("status")) {
                    Ok(_) => alive += 1,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => bare += 1,
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => dead += 1,
                    // So ends a request that is on its way while the last device closes.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => dead += 1,
                    Err(_) => other += 1,
                }
            }
        });
        until_told();
        is_over.store(true, Ordering::Relaxed);
    });
    println!("alive {alive}, dead {dead}, bare {bare}, other {other}");
    Ok(())
}

/// Keeps a file open until it is killed.
pub(super) fn hold(dir: &Path) -> Outcome {
    let mut file = fs::File::open(dir.join("vineyard-config.yaml"))?;
    file.read_to_end(&mut Vec::new())?;
    println!("held");
    until_told();
    Ok(())
}

/// Returns when the supervisor closes our standard input.
fn until_told() {
    let _ = io::stdin().read_to_end(&mut Vec::new());
}
