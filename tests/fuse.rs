//! The dummy filesystem for real: a kernel's mount, servers that are killed, clients that notice
//! nothing.
//!
//! The program is its own cast. Without a role it is the supervisor: it holds what is in custody
//! and so never opens anything on a mount, as the supervisor of an agent never does. Whoever looks
//! is another process, and one that can be killed when it hangs.

use std::error::Error;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

#[path = "fuse/channel.rs"]
mod channel;
#[path = "fuse/roles.rs"]
mod roles;

use channel::{receive, send};
use roles::{blind_server, hold, look, server, traffic, watch};

type Outcome = Result<(), Box<dyn Error>>;

/// No step of any case takes this long, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A promise, and what shows whether it is kept.
type Case = (&'static str, fn(&Path) -> Outcome);

const CASES: &[Case] = &[
    (
        "a_mount_has_the_type_fluid_looks_for_and_answers",
        a_mount_has_the_type_fluid_looks_for_and_answers,
    ),
    (
        "fifty_kills_of_the_server_are_noticed_by_nobody",
        fifty_kills_of_the_server_are_noticed_by_nobody,
    ),
    (
        "a_dead_mount_is_replaced_from_beneath_and_never_stacked",
        a_dead_mount_is_replaced_from_beneath_and_never_stacked,
    ),
    (
        "a_client_of_a_dead_server_can_be_killed",
        a_client_of_a_dead_server_can_be_killed,
    ),
    ("an_update_is_read_at_once", an_update_is_read_at_once),
    ("withdrawing_leaves_no_mount", withdrawing_leaves_no_mount),
    (
        "what_somebody_unmounted_cannot_be_resumed",
        what_somebody_unmounted_cannot_be_resumed,
    ),
    (
        "without_a_device_the_error_names_it",
        without_a_device_the_error_names_it,
    ),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["role:server", "establish", target] => server(None, Path::new(target)),
        ["role:server", "resume", target, context] => server(Some(context), Path::new(target)),
        ["role:blind-server", target] => blind_server(Path::new(target)),
        ["role:look", dir] => look(Path::new(dir)),
        ["role:traffic", dir] => traffic(Path::new(dir)),
        ["role:watch", dir] => watch(Path::new(dir)),
        ["role:hold", dir] => hold(Path::new(dir)),
        _ => return supervise(&words),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

// ---------------------------------------------------------------- the supervisor and its cases

fn supervise(words: &[&str]) -> ExitCode {
    let filter = words.iter().find(|word| !word.starts_with('-'));
    if let Err(error) = enter_namespace() {
        println!("cannot make a mount namespace: {error}");
        return ExitCode::FAILURE;
    }
    let mut failed = 0;
    for (name, case) in CASES {
        if filter.is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        let began = Instant::now();
        let outcome = tempfile::tempdir().map_err(Into::into).and_then(|dir| {
            // The test's own mounts are not to be found in its directory when that is removed.
            let outcome = case(dir.path());
            while umount2(&dir.path().join("mark"), MntFlags::MNT_DETACH).is_ok() {}
            outcome
        });
        match outcome {
            Ok(()) => println!("test {name} ... ok ({:?})", began.elapsed()),
            Err(error) => {
                failed += 1;
                println!("test {name} ... FAILED\n    {error}");
            }
        }
    }
    ExitCode::from(failed)
}

/// A mount namespace of our own; without root, in a user namespace where we are root.
fn enter_namespace() -> Result<(), Box<dyn Error>> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if unshare(CloneFlags::CLONE_NEWNS).is_err() {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    Ok(())
}

fn a_mount_has_the_type_fluid_looks_for_and_answers(dir: &Path) -> Outcome {
    let target = target(dir)?;
    let _server = Server::establish(&target)?;
    let lines = mounts_at(&target)?;
    let [line] = lines.as_slice() else {
        return Err(format!("not one mount, but {lines:?}").into());
    };
    let (ahead, behind) = line.split_once(" - ").unwrap_or_default();
    let behind: Vec<_> = behind.split(' ').collect();
    same(&behind[..2], &["fuse.vineyard-fuse", "vineyard"][..])?;
    same(
        ahead.split(' ').nth(5),
        Some("ro,nosuid,nodev,noexec,relatime"),
    )?;
    same(
        seen(&target)?.as_str(),
        "VINEYARD_IPC_SOCKET 444 size 24: /var/run/vineyard/x.sock\n\
         VINEYARD_RPC_ENDPOINT 444 size 6: host:1\n\
         metrics 444 size 0: up 1\n\
         status 444 size 0: ready\n\
         vineyard-config.yaml 444 size 9: Vineyard:\n\
         part of the config: yard\n\
         writing: Read-only file system (os error 30)\n\
         creating: Read-only file system (os error 30)\n\
         removing: Read-only file system (os error 30)\n\
         no such file: No such file or directory (os error 2)\n\
         directory 555, 6 inodes, no space\n",
    )
}

fn fifty_kills_of_the_server_are_noticed_by_nobody(dir: &Path) -> Outcome {
    const KILLS: usize = 50;
    let target = target(dir)?;
    let mut server = Server::establish(&target)?;
    let traffic = Player::cast("traffic", &target)?;
    let mut outage = Duration::ZERO;
    for kill in 0..KILLS {
        // Now and then in the middle of something else.
        std::thread::sleep(Duration::from_millis(5 + (kill as u64 * 7) % 20));
        let custody = server.kill()?;
        let began = Instant::now();
        server = Server::resume(&target, custody)?;
        outage = outage.max(began.elapsed());
    }
    let report = traffic.finish()?;
    println!(
        "    {KILLS} kills, longest outage {outage:?}; {}",
        report.trim()
    );
    same(mounts_at(&target)?.len(), 1)?;
    match report.starts_with("errors 0,") {
        true => Ok(()),
        false => Err(report.into()),
    }
}

fn a_dead_mount_is_replaced_from_beneath_and_never_stacked(dir: &Path) -> Outcome {
    let target = target(dir)?;
    let server = Server::establish(&target)?;
    let watch = Player::cast("watch", &target)?;
    let wait = || std::thread::sleep(Duration::from_millis(30));
    wait();
    // The server and custody die together: nobody is left who could serve.
    drop(server.kill()?);
    let dead = seen(&target).err().map(|error| error.to_string());
    same(
        dead.as_deref(),
        Some("error: Transport endpoint is not connected (os error 107)"),
    )?;
    wait();
    let server = Server::establish(&target)?;
    same(mounts_at(&target)?.len(), 1)?;
    seen(&target)?;
    // A living one is replaced in the same way.
    let _second = Server::establish(&target)?;
    same(mounts_at(&target)?.len(), 1)?;
    seen(&target)?;
    drop(server);
    wait();
    let report = watch.finish()?;
    println!("    {}", report.trim());
    match report.contains("bare 0,") && report.contains("other 0") {
        true => Ok(()),
        false => Err(report.into()),
    }
}

fn a_client_of_a_dead_server_can_be_killed(dir: &Path) -> Outcome {
    let target = target(dir)?;
    let server = Server::establish(&target)?;
    let mut client = Player::cast("hold", &target)?;
    let mut line = [0; 5];
    client.output()?.read_exact(&mut line)?;
    same(&line, b"held\n")?;
    let custody = server.kill()?;
    // Custody holds the device, nobody answers: a flush would wait for ever.
    client.child.kill()?;
    reap(&mut client.child, Duration::from_secs(2))?;
    let _server = Server::resume(&target, custody)?;
    seen(&target).map(drop)
}

fn an_update_is_read_at_once(dir: &Path) -> Outcome {
    let target = target(dir)?;
    let server = Server::establish(&target)?;
    seen(&target)?;
    same(server.ask("update")?.as_str(), "updated")?;
    let after = seen(&target)?;
    match after.contains(": a.longer.name.of.a.host:9600\n") {
        true => Ok(()),
        false => Err(after.into()),
    }
}

fn withdrawing_leaves_no_mount(dir: &Path) -> Outcome {
    let target = target(dir)?;
    let server = Server::establish(&target)?;
    same(
        server.ask("withdraw")?.as_str(),
        "unmounted 1, ended: its mount is gone",
    )?;
    same(mounts_at(&target)?.len(), 0)
}

fn what_somebody_unmounted_cannot_be_resumed(dir: &Path) -> Outcome {
    let target = target(dir)?;
    let custody = Server::establish(&target)?.kill()?;
    umount2(&target, MntFlags::MNT_DETACH)?;
    let refused = Server::resume(&target, custody)
        .err()
        .map(|error| error.to_string());
    same(
        refused.as_deref(),
        Some("error: the dummy filesystem of this device is not mounted any more"),
    )
}

fn without_a_device_the_error_names_it(dir: &Path) -> Outcome {
    let target = target(dir)?;
    let output = Player::cast("blind-server", &target)?.finish();
    let error = output
        .err()
        .map(|error| error.to_string())
        .unwrap_or_default();
    match error.contains("/dev/fuse") && error.contains("No such file or directory") {
        true => Ok(()),
        false => Err(format!("the error is {error:?}").into()),
    }
}

/// A directory to mount at.
fn target(dir: &Path) -> io::Result<PathBuf> {
    let target = dir.join("mark");
    fs::create_dir(&target)?;
    Ok(target)
}

/// The lines of mountinfo for `target`.
fn mounts_at(target: &Path) -> io::Result<Vec<String>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let target = target.to_string_lossy();
    let lines = table
        .lines()
        .filter(|line| line.split(' ').nth(4) == Some(&target));
    Ok(lines.map(str::to_owned).collect())
}

/// What another process sees.
fn seen(target: &Path) -> Result<String, Box<dyn Error>> {
    Player::cast("look", target)?.finish()
}

fn same<T: PartialEq + std::fmt::Debug>(left: T, right: T) -> Outcome {
    match left == right {
        true => Ok(()),
        false => Err(format!("{left:?}\n    is not\n    {right:?}").into()),
    }
}

/// A process that looks at the mount, until its standard input is closed.
struct Player {
    child: Child,
}

impl Player {
    fn cast(role: &str, target: &Path) -> io::Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .arg(format!("role:{role}"))
            .arg(target)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Self { child })
    }

    fn output(&mut self) -> io::Result<&mut impl Read> {
        self.child
            .stdout
            .as_mut()
            .ok_or_else(|| io::Error::other("no output"))
    }

    /// Lets it end; what it said.
    fn finish(mut self) -> Result<String, Box<dyn Error>> {
        drop(self.child.stdin.take());
        let is_well = reap(&mut self.child, PATIENCE)?;
        let mut said = String::new();
        self.output()?.read_to_string(&mut said)?;
        match is_well {
            true => Ok(said),
            false => Err(said.trim().into()),
        }
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = reap(&mut self.child, PATIENCE);
    }
}

/// Waits for the end of a process; whether it ended well.
fn reap(child: &mut Child, patience: Duration) -> Result<bool, Box<dyn Error>> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if began.elapsed() > patience {
            return Err(format!("process {} hangs", child.id()).into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A process that serves a mount, and what it gave into custody.
struct Server {
    player: Player,
    channel: OwnedFd,
    custody: Custody,
}

/// What outlives a server.
struct Custody {
    device: OwnedFd,
    context: Vec<u8>,
}

impl Server {
    fn establish(target: &Path) -> Result<Self, Box<dyn Error>> {
        let (player, channel) = Self::spawn(&["establish".as_ref(), target.as_os_str()])?;
        let (context, device) = receive(channel.as_fd())?;
        match device {
            Some(device) => Ok(Self {
                player,
                channel,
                custody: Custody { device, context },
            }),
            None => Err(String::from_utf8_lossy(&context).into()),
        }
    }

    fn resume(target: &Path, custody: Custody) -> Result<Self, Box<dyn Error>> {
        let context: String = custody.context.iter().map(|b| format!("{b:02x}")).collect();
        let (player, channel) =
            Self::spawn(&["resume".as_ref(), target.as_os_str(), context.as_ref()])?;
        send(channel.as_fd(), b"serve", Some(custody.device.as_fd()))?;
        let (answer, _) = receive(channel.as_fd())?;
        match answer.as_slice() {
            b"serving" => Ok(Self {
                player,
                channel,
                custody,
            }),
            error => Err(String::from_utf8_lossy(error).into()),
        }
    }

    fn spawn(arguments: &[&std::ffi::OsStr]) -> io::Result<(Player, OwnedFd)> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::sockopt::set_socket_timeout(
            &ours,
            rustix::net::sockopt::Timeout::Recv,
            Some(PATIENCE),
        )?;
        let child = Command::new(std::env::current_exe()?)
            .arg("role:server")
            .args(arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::piped())
            .spawn()?;
        Ok((Player { child }, ours))
    }

    fn ask(&self, what: &str) -> Result<String, Box<dyn Error>> {
        send(self.channel.as_fd(), what.as_bytes(), None)?;
        let (answer, _) = receive(self.channel.as_fd())?;
        Ok(String::from_utf8(answer)?)
    }

    /// SIGKILL.
    fn kill(mut self) -> Result<Custody, Box<dyn Error>> {
        self.player.child.kill()?;
        reap(&mut self.player.child, PATIENCE)?;
        Ok(self.custody)
    }
}
