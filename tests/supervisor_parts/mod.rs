//! The parts this program plays for `tests/supervisor.rs`: the supervisor, its node and shards.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::signal::unix::{SignalKind, signal};
use vinelet::readiness::Readiness;
use vinelet::supervisor::{
    Backoff, ChildChannel, ChildPlan, Config, FromSupervisor, Inherited, MAX_DEPOSITS, Supervisor,
};
use vinelet::telemetry::{self, Format};

/// Plays the part that the arguments name, if they name one.
pub(crate) fn play(args: &[String]) -> Option<ExitCode> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    Some(match args[..] {
        ["supervisor", dir, node, pace] => supervisor(Path::new(dir), node, pace),
        ["node", dir, part] => node(Path::new(dir), part),
        ["shard", dir, name, part] => shard(Path::new(dir), name, part),
        ["middle", dir] => {
            // Its parent is the shard; what it leaves behind goes to the supervisor.
            let stray = again(&["stray"]);
            event(Path::new(dir), "stray", &stray.to_string());
            ExitCode::SUCCESS
        }
        ["log", format] => {
            telemetry::init("info", format.parse().unwrap(), "shard default/vineyard").unwrap();
            let _span =
                tracing::info_span!(target: "vinelet", "publish", volume_id = "v1").entered();
            tracing::info!(target: "vinelet", bytes = 7, "done");
            tracing::info!(target: "h2", "not to be seen");
            tracing::debug!(target: "vinelet", "not to be seen");
            ExitCode::SUCCESS
        }
        ["stray"] => {
            std::thread::sleep(Duration::from_millis(500));
            ExitCode::SUCCESS
        }
        _ => return None,
    })
}

fn again(args: &[&str]) -> u32 {
    Command::new("/proc/self/exe")
        .args(args)
        .spawn()
        .unwrap()
        .id()
}

fn runtime(task: impl Future<Output = ()>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .unwrap()
        .block_on(tokio::task::LocalSet::new().run_until(task));
    ExitCode::SUCCESS
}

fn event(dir: &Path, name: &str, word: &str) {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(dir.join("events"))
        .unwrap();
    let line = format!("{} {name} {word}\n", now.as_millis());
    file.write_all(line.as_bytes()).unwrap();
}

fn supervisor(dir: &Path, node: &str, pace: &str) -> ExitCode {
    telemetry::init("debug", Format::Text, "supervisor").unwrap();
    let args = ["node", dir.to_str().unwrap(), node]
        .map(str::to_owned)
        .to_vec();
    let mut config = Config::new(dir.join("state"), args);
    if pace == "hasty" {
        config.backoff = Backoff {
            first: Duration::from_millis(1),
            longest: Duration::from_millis(1),
            longest_when_ready: Duration::from_millis(1),
            ..Backoff::default()
        };
    }
    let supervisor = match Supervisor::new(config) {
        Ok(supervisor) => supervisor,
        Err(err) => {
            eprintln!("{err}");
            return ExitCode::FAILURE;
        }
    };
    match supervisor.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{err}");
            ExitCode::FAILURE
        }
    }
}

/// The socket that was deposited, or a new one, deposited now.
fn listener(inherited: Inherited, path: &Path) -> (ChildChannel, UnixListener, usize) {
    let Inherited { channel, deposits } = inherited;
    let count = deposits.len();
    let listener = match deposits
        .into_iter()
        .find(|deposit| deposit.name == "listener")
    {
        Some(mut deposit) => {
            assert_eq!(deposit.context, b"context");
            UnixListener::from(deposit.fds.remove(0))
        }
        None => {
            // Between bind(2) and listen(2) a connect is refused: shown only when it listens.
            let hidden = path.with_extension("new");
            let listener = UnixListener::bind(&hidden).unwrap();
            std::fs::rename(&hidden, path).unwrap();
            channel
                .deposit("listener", b"context", &[listener.as_fd()])
                .unwrap();
            listener
        }
    };
    listener.set_nonblocking(true).unwrap();
    (channel, listener, count)
}

fn process() -> Value {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim_start_matches(':').trim().to_owned()
    };
    // Its own descriptor of the directory is not counted.
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count() - 1;
    json!({
        "SigBlk": field("SigBlk"),
        "Name": field("Name"),
        "argv0": std::env::args().next(),
        "stdin": std::fs::read_link("/proc/self/fd/0").unwrap(),
        "descriptors": descriptors,
    })
}

/// Answers requests, one line each: `"pid"`, `"report"`, `"process"`, `{"want": [...]}`.
fn node(dir: &Path, part: &str) -> ExitCode {
    let inherited = ChildChannel::inherited().unwrap().unwrap();
    let process = process();
    if part == "stubborn" {
        ignore(Signal::SIGTERM);
    }
    let (channel, listener, _) = listener(inherited, &dir.join("node.sock"));
    channel.state(&Readiness::Ready).unwrap();
    runtime(answer(dir, part, channel, listener, process))
}

async fn answer(
    dir: &Path,
    part: &str,
    channel: ChildChannel,
    listener: UnixListener,
    process: Value,
) {
    let report = Rc::new(RefCell::new(json!([])));
    let requests = {
        let (channel, report) = (channel.clone(), Rc::clone(&report));
        async move {
            let listener = tokio::net::UnixListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                let request: Value = serde_json::from_str(&line).unwrap();
                let answer = match (request.as_str(), request.get("want")) {
                    (Some("pid"), _) => json!(std::process::id()),
                    (Some("process"), _) => process.clone(),
                    (Some("report"), _) => report.borrow().clone(),
                    (_, Some(plans)) => {
                        let plans: Vec<ChildPlan> = serde_json::from_value(plans.clone()).unwrap();
                        match channel.want(plans) {
                            Ok(()) => json!("ok"),
                            Err(err) => json!(err.to_string()),
                        }
                    }
                    _ => Value::Null,
                };
                let _ = stream.write_all(format!("{answer}\n").as_bytes()).await;
            }
        }
    };
    tokio::task::spawn_local(requests);
    while let Some(said) = channel.next().await {
        match said {
            FromSupervisor::Report(children) => {
                *report.borrow_mut() = serde_json::to_value(children).unwrap();
            }
            FromSupervisor::Stop if part == "stubborn" => event(dir, "node", "stop"),
            FromSupervisor::Stop => {
                event(dir, "node", "stop");
                tokio::time::sleep(Duration::from_millis(200)).await;
                event(dir, "node", "end");
                return;
            }
        }
    }
}

fn ignore(signal: Signal) {
    let mut set = SigSet::empty();
    set.add(signal);
    set.thread_block().unwrap();
}

fn shard(dir: &Path, name: &str, part: &str) -> ExitCode {
    event(dir, name, "start");
    let inherited = ChildChannel::inherited().unwrap().unwrap();
    assert_eq!(std::env::var("PART").as_deref(), Ok(part));
    if let Some(kind) = part.strip_prefix("garbage-") {
        misbehave(inherited.channel, kind);
        loop {
            std::thread::park();
        }
    }
    match part {
        "crash" => {
            let why = Readiness::Failing("port 9600 is taken".to_owned());
            inherited.channel.state(&why).unwrap();
            return ExitCode::from(2);
        }
        "silent" => {
            drop(inherited);
            loop {
                std::thread::park();
            }
        }
        "stubborn" => ignore(Signal::SIGTERM),
        "slow" => std::thread::sleep(Duration::from_millis(500)),
        "stray" => {
            let mut middle = Command::new("/proc/self/exe");
            middle
                .args(["middle", dir.to_str().unwrap()])
                .status()
                .unwrap();
        }
        _ => {}
    }
    let path = dir.join(format!("{name}.sock"));
    let (channel, listener, deposits) = listener(inherited, &path);
    runtime(async move {
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        let mut term = match part {
            "stubborn" => None,
            _ => Some(signal(SignalKind::terminate()).unwrap()),
        };
        channel.state(&Readiness::Ready).unwrap();
        let mut ignores_stop = false;
        loop {
            let terminated = async {
                match &mut term {
                    Some(term) => term.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                accepted = listener.accept() => {
                    let text = format!("{} {deposits}", std::process::id());
                    let (mut stream, _) = accepted.unwrap();
                    let _ = stream.write_all(text.as_bytes()).await;
                }
                said = channel.next(), if !ignores_stop => match said {
                    Some(FromSupervisor::Stop) => {
                        event(dir, name, "stop");
                        if !matches!(part, "stubborn" | "deaf") {
                            return;
                        }
                        ignores_stop = true;
                    }
                    Some(FromSupervisor::Report(_)) => panic!("a report is for the node"),
                    None => return,
                },
                _ = terminated => {
                    event(dir, name, "term");
                    return;
                }
            }
        }
    })
}

/// Says what no honest child says; past the checks of its own end.
fn misbehave(channel: ChildChannel, kind: &str) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let socket = channel_socket();
    let send = |bytes: &[u8], descriptors: usize| {
        let fds = vec![null.as_fd(); descriptors];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if descriptors > 0 {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(
            &socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    };
    let deposit = |n: usize| json!({"Deposit": {"name": n.to_string(), "context": []}}).to_string();
    match kind {
        "text" => send(b"hello", 0),
        "empty-object" => send(b"{}", 0),
        "large" => send(&vec![b' '; 100_000], 0),
        "descriptors" => send(deposit(0).as_bytes(), 12),
        "no-descriptor" => send(deposit(0).as_bytes(), 0),
        "want" => channel.want(Vec::new()).unwrap(),
        "deposits" => {
            for n in 0..MAX_DEPOSITS {
                let name = n.to_string();
                channel.deposit(&name, &[], &[null.as_fd()]).unwrap();
            }
            let refused = channel.deposit("more", &[], &[null.as_fd()]).unwrap_err();
            assert_eq!(refused.to_string(), "deposit \"more\" is one more than 256");
            // The socket may still be full of the honest ones.
            while std::panic::catch_unwind(|| send(deposit(MAX_DEPOSITS).as_bytes(), 1)).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        _ => panic!("no such garbage: {kind}"),
    }
}

/// The channel's socket, which the channel does not show: the only socket this process has.
fn channel_socket() -> OwnedFd {
    let is_socket = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
    };
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let entry = entries.into_iter().find(is_socket).unwrap();
    let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
    let pidfd = rustix::process::pidfd_open(
        rustix::process::getpid(),
        rustix::process::PidfdFlags::empty(),
    );
    let flags = rustix::process::PidfdGetfdFlags::empty();
    rustix::process::pidfd_getfd(pidfd.unwrap(), number.cast_signed(), flags).unwrap()
}
