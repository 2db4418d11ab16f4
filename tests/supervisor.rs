//! The supervisor with real processes: kills, restarts, custody, stops.
//!
//! A supervisor executes its own program, so this one plays all parts: without a part it runs the
//! tests below; each test starts it again as `supervisor`, which starts it as its children.

// Clippy takes a program with a `main` of its own for production code.
#![allow(clippy::unwrap_used)]

mod supervisor_parts;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const TESTS: &[(&str, fn())] = &[
    (
        "connects_made_while_a_shard_is_dead_are_answered_by_the_next_one_on_the_same_inode",
        connects_made_while_a_shard_is_dead_are_answered_by_the_next_one_on_the_same_inode,
    ),
    (
        "a_killed_shard_is_back_within_milliseconds",
        a_killed_shard_is_back_within_milliseconds,
    ),
    (
        "a_child_that_keeps_dying_comes_back_ever_more_slowly_and_is_reported",
        a_child_that_keeps_dying_comes_back_ever_more_slowly_and_is_reported,
    ),
    (
        "no_child_outlives_a_killed_supervisor",
        no_child_outlives_a_killed_supervisor,
    ),
    (
        "the_node_stops_first_then_the_shards",
        the_node_stops_first_then_the_shards,
    ),
    (
        "children_that_ignore_everything_are_gone_within_ten_seconds",
        children_that_ignore_everything_are_gone_within_ten_seconds,
    ),
    ("strays_are_reaped", strays_are_reaped),
    (
        "garbage_costs_only_the_child_that_sends_it",
        garbage_costs_only_the_child_that_sends_it,
    ),
    (
        "two_hundred_restarts_leak_nothing",
        two_hundred_restarts_leak_nothing,
    ),
    (
        "a_wanted_set_touches_only_what_differs",
        a_wanted_set_touches_only_what_differs,
    ),
    (
        "a_removed_child_comes_back_with_nothing_even_if_wanted_before_it_ended",
        a_removed_child_comes_back_with_nothing_even_if_wanted_before_it_ended,
    ),
    (
        "a_dead_node_disturbs_no_shard",
        a_dead_node_disturbs_no_shard,
    ),
    (
        "a_message_too_large_is_refused_to_its_sender",
        a_message_too_large_is_refused_to_its_sender,
    ),
    (
        "a_second_supervisor_is_told_who_runs",
        a_second_supervisor_is_told_who_runs,
    ),
    (
        "a_child_starts_with_a_clean_process",
        a_child_starts_with_a_clean_process,
    ),
    (
        "a_child_that_closes_its_channel_is_replaced",
        a_child_that_closes_its_channel_is_replaced,
    ),
    (
        "ignored_sigchld_does_not_deceive_the_supervisor",
        ignored_sigchld_does_not_deceive_the_supervisor,
    ),
    ("it_works_as_pid_1", it_works_as_pid_1),
    ("a_log_line_says_who_wrote_it", a_log_line_says_who_wrote_it),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = supervisor_parts::play(&args) {
        return code;
    }
    if args.iter().any(|arg| arg == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let wanted: Vec<_> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|w| name.contains(*w));
    let mut failed = Vec::new();
    for (name, test) in TESTS.iter().filter(|(name, _)| is_wanted(name)) {
        let start = Instant::now();
        let outcome = match std::panic::catch_unwind(test) {
            Ok(()) => "ok",
            Err(_) => {
                failed.push(name);
                "FAILED"
            }
        };
        println!(
            "test {name} ... {outcome} ({:.1} s)",
            start.elapsed().as_secs_f64()
        );
    }
    match failed.is_empty() {
        true => ExitCode::SUCCESS,
        false => {
            println!("failed: {failed:?}");
            ExitCode::FAILURE
        }
    }
}

/// A supervisor in a directory of its own, with a node that does as it is told.
struct Agent {
    process: Child,
    dir: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

impl Agent {
    /// With back-off too short to matter where `is_patient` is false.
    fn start(node: &str, is_patient: bool) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), node, is_patient)
    }

    fn start_in(dir: tempfile::TempDir, node: &str, is_patient: bool) -> Self {
        let process = supervisor(dir.path(), node, is_patient).spawn().unwrap();
        Self { process, dir }
    }

    fn pid(&self) -> i32 {
        self.process.id().cast_signed()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// What children wrote: `<milliseconds> <name> <word>`.
    fn events(&self) -> Vec<(u64, String)> {
        let text = std::fs::read_to_string(self.path("events")).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(at, what)| (at.parse().unwrap(), what.to_owned()))
            .collect()
    }

    /// Asks the node.
    fn node(&self, request: &Value) -> Value {
        let stream = connect(&self.path("node.sock"));
        writeln!(&stream, "{request}").unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{request}: {answer:?}"))
    }

    fn want(&self, shards: &[(&str, &str)]) {
        let plans: Vec<_> = shards
            .iter()
            .map(|(name, part)| {
                let dir = self.dir.path();
                json!({"name": name, "args": ["shard", dir, name, part], "env": {"PART": part}})
            })
            .collect();
        assert_eq!(self.node(&json!({"want": plans})), json!("ok"));
    }

    fn report(&self) -> BTreeMap<String, Value> {
        let report = self.node(&json!("report"));
        let children = report.as_array().unwrap().iter();
        children
            .map(|child| (child["name"].as_str().unwrap().to_owned(), child.clone()))
            .collect()
    }

    /// The pid of a ready shard, other than `not`.
    fn ready(&self, name: &str, not: i32) -> i32 {
        eventually(&format!("{name} is ready"), || {
            let report = self.report();
            let child = report.get(name)?;
            let pid = i32::try_from(child["pid"].as_i64()?).unwrap();
            (child["state"] == json!("Ready") && pid != not).then_some(pid)
        })
    }

    fn stop(&mut self) -> (ExitStatus, Duration) {
        let start = Instant::now();
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM).unwrap();
        let status = eventually("the supervisor ends", || self.process.try_wait().unwrap());
        (status, start.elapsed())
    }
}

fn supervisor(dir: &Path, node: &str, is_patient: bool) -> Command {
    let log = std::fs::File::create(dir.join("log")).unwrap();
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["supervisor", dir.to_str().unwrap(), node])
        .arg(if is_patient { "patient" } else { "hasty" })
        .stdin(Stdio::null())
        .stderr(log);
    command
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits only for the socket to be made: from then on it has to work.
fn connect(path: &Path) -> UnixStream {
    let stream = eventually("connected", || match UnixStream::connect(path) {
        Ok(stream) => Some(stream),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => None,
        Err(err) => panic!("connecting to {}: {err}", path.display()),
    });
    stream
        .set_read_timeout(Some(Duration::from_secs(15)))
        .unwrap();
    stream
}

/// A shard answers every connect with its pid and how many deposits it began with.
fn ask_shard(agent: &Agent, name: &str) -> (i32, usize) {
    let mut answer = String::new();
    connect(&agent.path(&format!("{name}.sock")))
        .read_to_string(&mut answer)
        .unwrap();
    let (pid, deposits) = answer.split_once(' ').unwrap();
    (pid.parse().unwrap(), deposits.parse().unwrap())
}

fn murder(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Whether there is a process that still runs: not a zombie.
fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name in parentheses stands the state.
    let state = stat.rsplit_once(") ").map(|(_, rest)| &rest[..1]);
    state.is_some_and(|state| !matches!(state, "Z" | "X"))
}

fn children_of(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

fn connects_made_while_a_shard_is_dead_are_answered_by_the_next_one_on_the_same_inode() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "slow")]);
    let first = agent.ready("a", 0);
    assert_eq!(ask_shard(&agent, "a"), (first, 0));
    let inode = || std::fs::metadata(agent.path("a.sock")).unwrap().ino();
    let before = inode();
    murder(first);
    let start = Instant::now();
    // The next one takes 500 ms until it accepts.
    let waiting: Vec<_> = (0..50).map(|_| connect(&agent.path("a.sock"))).collect();
    assert!(
        start.elapsed() < Duration::from_millis(400),
        "connects did not wait"
    );
    for mut stream in waiting {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (pid, deposits) = answer.split_once(' ').unwrap();
        assert_ne!(pid.parse(), Ok(first));
        assert_eq!(deposits, "1");
    }
    assert!(start.elapsed() >= Duration::from_millis(500));
    assert_eq!(inode(), before);
}

fn a_killed_shard_is_back_within_milliseconds() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "serve")]);
    let first = agent.ready("a", 0);
    let start = Instant::now();
    murder(first);
    let (second, _) = ask_shard(&agent, "a");
    let took = start.elapsed();
    assert_ne!(first, second);
    println!("  killed to answered: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
}

fn a_child_that_keeps_dying_comes_back_ever_more_slowly_and_is_reported() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "crash"), ("b", "serve")]);
    let b = agent.ready("b", 0);
    let starts = eventually("eight starts", || {
        let starts: Vec<_> = agent
            .events()
            .into_iter()
            .filter(|(_, what)| what == "a start")
            .collect();
        (starts.len() >= 8).then_some(starts)
    });
    let gaps: Vec<_> = starts
        .windows(2)
        .map(|pair| pair[1].0 - pair[0].0)
        .collect();
    for (gap, least) in gaps.iter().zip([0, 50, 100, 200, 400, 800, 1600]) {
        assert!(*gap >= least, "{gaps:?}");
    }
    let report = agent.report();
    let why = report["a"]["state"]["Failing"].as_str().unwrap().to_owned();
    assert!(
        why.contains("before it was ready; it exited with code 2"),
        "{why}"
    );
    assert!(why.contains("(port 9600 is taken)"), "{why}");
    assert!(report["a"]["restarts"].as_u64().unwrap() >= 6);
    assert_eq!(report["b"]["pid"], json!(b));
    assert!(
        agent
            .log()
            .contains("child keeps ending before it is ready")
    );
}

fn no_child_outlives_a_killed_supervisor() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "serve"), ("b", "stubborn")]);
    agent.ready("a", 0);
    agent.ready("b", 0);
    let children = children_of(agent.pid());
    assert_eq!(children.len(), 3);
    murder(agent.pid());
    eventually("all children are gone", || {
        children.iter().all(|&pid| !is_alive(pid)).then_some(())
    });
}

fn the_node_stops_first_then_the_shards() {
    let mut agent = Agent::start("obedient", true);
    agent.want(&[("a", "serve"), ("b", "serve")]);
    agent.ready("a", 0);
    agent.ready("b", 0);
    let (status, took) = agent.stop();
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    let words: Vec<_> = agent.events().into_iter().map(|(_, what)| what).collect();
    let at = |word: &str| words.iter().position(|w| w == word).unwrap();
    // The node takes 200 ms to drain.
    assert!(at("node stop") < at("node end"), "{words:?}");
    assert!(
        at("node end") < at("a stop") && at("node end") < at("b stop"),
        "{words:?}"
    );
    assert!(
        !words.iter().any(|word| word.ends_with(" term")),
        "{words:?}"
    );
}

fn children_that_ignore_everything_are_gone_within_ten_seconds() {
    let mut agent = Agent::start("stubborn", true);
    agent.want(&[("a", "stubborn"), ("b", "deaf")]);
    agent.ready("a", 0);
    agent.ready("b", 0);
    let children = children_of(agent.pid());
    let (status, took) = agent.stop();
    println!("  took {took:?}");
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(children.iter().all(|&pid| !is_alive(pid)));
    let events = agent.events();
    assert!(
        events.iter().any(|(_, what)| what == "b term"),
        "{events:?}"
    );
    let log = agent.log();
    assert!(log.contains("SIGTERM") && log.contains("SIGKILL"));
}

fn strays_are_reaped() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "stray")]);
    let a = agent.ready("a", 0);
    let stray = eventually("the stray has come to the supervisor", || {
        let report = |(_, what): &(u64, String)| what.strip_prefix("stray ")?.parse::<i32>().ok();
        let stray = agent.events().iter().find_map(report)?;
        children_of(agent.pid()).contains(&stray).then_some(stray)
    });
    eventually("the stray is reaped", || {
        (!Path::new(&format!("/proc/{stray}")).exists()).then_some(())
    });
    assert_eq!(agent.ready("a", 0), a);
}

fn garbage_costs_only_the_child_that_sends_it() {
    let agent = Agent::start("obedient", true);
    let kinds = [
        "text",
        "empty-object",
        "large",
        "descriptors",
        "no-descriptor",
        "want",
        "deposits",
    ];
    let names: Vec<String> = kinds.iter().map(|kind| format!("garbage-{kind}")).collect();
    let mut shards = vec![("a", "serve")];
    shards.extend(names.iter().map(|name| (name.as_str(), name.as_str())));
    agent.want(&shards);
    let a = agent.ready("a", 0);
    let node = agent.node(&json!("pid"));
    for name in &names {
        eventually(&format!("{name} was killed and started again"), || {
            let report = agent.report();
            (report.get(name)?["restarts"].as_u64()? >= 1).then_some(())
        });
        let line = agent.log();
        let line = line
            .lines()
            .find(|line| line.contains("misbehaves") && line.contains(&format!("child={name}")));
        println!("  {}", line.unwrap().split_once("why=").unwrap().1);
    }
    assert_eq!(agent.ready("a", 0), a);
    assert_eq!(agent.node(&json!("pid")), node);
}

fn two_hundred_restarts_leak_nothing() {
    let agent = Agent::start("obedient", false);
    agent.want(&[("a", "serve")]);
    let descriptors = || {
        std::fs::read_dir(format!("/proc/{}/fd", agent.pid()))
            .unwrap()
            .count()
    };
    let mut pid = agent.ready("a", 0);
    let before = descriptors();
    for _ in 0..200 {
        murder(pid);
        pid = eventually("another one answers", || {
            let (next, deposits) = ask_shard(&agent, "a");
            assert_eq!(deposits, 1);
            (next != pid).then_some(next)
        });
    }
    agent.ready("a", 0);
    assert_eq!(agent.report()["a"]["restarts"], json!(200));
    assert_eq!(descriptors(), before);
    assert_eq!(children_of(agent.pid()).len(), 2);
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let memory = status
        .lines()
        .filter(|line| line.starts_with("Rss") || line.starts_with("VmRSS"));
    memory.for_each(|line| println!("  {line}"));
}

fn a_wanted_set_touches_only_what_differs() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "serve"), ("b", "serve"), ("c", "serve")]);
    let [a, b, c] = ["a", "b", "c"].map(|name| agent.ready(name, 0));
    agent.want(&[("a", "serve"), ("b", "slow"), ("d", "serve")]);
    let new_b = agent.ready("b", b);
    let d = agent.ready("d", 0);
    eventually("c is gone", || (!is_alive(c)).then_some(()));
    let report = agent.report();
    assert_eq!(report.keys().collect::<Vec<_>>(), ["a", "b", "d"]);
    assert_eq!(agent.ready("a", 0), a);
    // A replaced child keeps its deposits, a removed one does not.
    assert_eq!(ask_shard(&agent, "b"), (new_b, 1));
    std::fs::remove_file(agent.path("c.sock")).unwrap();
    agent.want(&[
        ("a", "serve"),
        ("b", "slow"),
        ("c", "serve"),
        ("d", "serve"),
    ]);
    let new_c = agent.ready("c", c);
    assert_eq!(ask_shard(&agent, "c"), (new_c, 0));
    assert_eq!(ask_shard(&agent, "d"), (d, 0));
}

fn a_removed_child_comes_back_with_nothing_even_if_wanted_before_it_ended() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "deaf")]);
    let a = agent.ready("a", 0);
    agent.want(&[]);
    eventually("it is asked to stop", || {
        (agent.report().get("a")?["state"] == json!("Draining")).then_some(())
    });
    std::fs::remove_file(agent.path("a.sock")).unwrap();
    agent.want(&[("a", "serve")]);
    agent.want(&[("a", "serve")]);
    let new = agent.ready("a", a);
    assert_eq!(ask_shard(&agent, "a"), (new, 0));
    assert!(!is_alive(a));
    agent.want(&[]);
    eventually("it is gone", || agent.report().is_empty().then_some(()));
}

fn a_dead_node_disturbs_no_shard() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "serve")]);
    let a = agent.ready("a", 0);
    let node = agent.node(&json!("pid"));
    murder(i32::try_from(node.as_i64().unwrap()).unwrap());
    assert_ne!(agent.node(&json!("pid")), node);
    // The new node has heard of the shard without asking, and says the same again.
    assert_eq!(agent.ready("a", 0), a);
    agent.want(&[("a", "serve")]);
    assert_eq!(ask_shard(&agent, "a"), (a, 0));
}

fn a_message_too_large_is_refused_to_its_sender() {
    let agent = Agent::start("obedient", true);
    let node = agent.node(&json!("pid"));
    let plan = json!({"name": "a", "args": ["x".repeat(70_000)], "env": {}});
    let answer = agent.node(&json!({"want": [plan]}));
    assert!(
        answer.as_str().unwrap().ends_with("is larger than 65536"),
        "{answer}"
    );
    assert_eq!(agent.node(&json!("pid")), node);
}

fn a_second_supervisor_is_told_who_runs() {
    let agent = Agent::start("obedient", true);
    agent.node(&json!("pid"));
    let second = supervisor(agent.dir.path(), "obedient", true)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let text = String::from_utf8(second.stderr).unwrap();
    assert!(
        text.contains(&format!("another agent, pid {} on ", agent.pid())),
        "{text}"
    );
}

fn a_child_starts_with_a_clean_process() {
    let agent = Agent::start("obedient", true);
    let seen = agent.node(&json!("process"));
    println!("  {seen}");
    assert_eq!(seen["SigBlk"], "0000000000000000");
    assert_eq!(seen["Name"], "vinelet");
    assert_eq!(seen["argv0"], "vinelet");
    assert_eq!(seen["stdin"], "/dev/null");
    // The standard three, the channel, and what whoever runs the tests gave us and all we start.
    assert_eq!(seen["descriptors"], 4 + given_descriptors());
}

/// Descriptors beyond the standard three that are not closed on exec.
fn given_descriptors() -> usize {
    let infos = std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    let is_given = |info: &std::fs::DirEntry| {
        let number: u32 = info.file_name().to_str().unwrap().parse().unwrap();
        let text = std::fs::read_to_string(info.path()).unwrap_or_default();
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        // O_CLOEXEC in octal, as open(2) of Linux has it.
        number > 2 && flags.is_some_and(|flags| flags & 0o2_000_000 == 0)
    };
    infos.filter(is_given).count()
}

fn a_child_that_closes_its_channel_is_replaced() {
    let agent = Agent::start("obedient", true);
    agent.want(&[("a", "silent")]);
    eventually("it was started again", || {
        (agent.report().get("a")?["restarts"].as_u64()? >= 1).then_some(())
    });
    assert!(agent.log().contains("SIGKILL"));
}

fn ignored_sigchld_does_not_deceive_the_supervisor() {
    let dir = tempfile::tempdir().unwrap();
    // A shell cannot ignore SIGCHLD for what it executes; Python can.
    let exe = std::env::current_exe().unwrap();
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    let script = "import os, signal, sys\n\
                  signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n\
                  os.execv(sys.argv[1], sys.argv[1:])";
    let started = Command::new("python3")
        .args(["-c", script])
        .arg(exe)
        .args([
            "supervisor",
            dir.path().to_str().unwrap(),
            "obedient",
            "patient",
        ])
        .stderr(log)
        .spawn();
    let Ok(process) = started else {
        println!("  not tried: there is no python3");
        return;
    };
    let mut agent = Agent { process, dir };
    agent.want(&[("a", "serve")]);
    let a = agent.ready("a", 0);
    murder(a);
    agent.ready("a", a);
    assert!(agent.stop().0.success());
}

fn it_works_as_pid_1() {
    let dir = tempfile::tempdir().unwrap();
    let exe = std::env::current_exe().unwrap();
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    let mut unshare = Command::new("unshare");
    unshare.args([
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--kill-child",
    ]);
    if !unshare
        .arg("true")
        .status()
        .is_ok_and(|status| status.success())
    {
        println!("  not tried: no user namespace may be made here");
        return;
    }
    let mut unshare = Command::new("unshare");
    let process = unshare
        .args([
            "--user",
            "--map-root-user",
            "--pid",
            "--fork",
            "--kill-child",
        ])
        .arg(exe)
        .args([
            "supervisor",
            dir.path().to_str().unwrap(),
            "obedient",
            "patient",
        ])
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut agent = Agent { process, dir };
    agent.want(&[("a", "serve")]);
    let first = agent.ready("a", 0);
    let (second, _) = {
        let init = children_of(agent.pid())[0];
        let log = agent.log();
        assert!(log.contains("supervisor[1]"), "{log}");
        // Its shard by our numbers: the child that is not the node, which came first.
        murder(children_of(init)[1]);
        eventually("another one answers", || {
            let answer = ask_shard(&agent, "a");
            (answer.0 != first).then_some(answer)
        })
    };
    assert_eq!(agent.ready("a", first), second);
    kill(Pid::from_raw(children_of(agent.pid())[0]), Signal::SIGTERM).unwrap();
    let status = eventually("it ends", || agent.process.try_wait().unwrap());
    assert!(status.success(), "{status}");
}

fn a_log_line_says_who_wrote_it() {
    let log = |format: &str| {
        let mut command = Command::new("/proc/self/exe");
        let process = command.args(["log", format]).stderr(Stdio::piped()).spawn();
        let process = process.unwrap();
        let pid = process.id();
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success());
        (pid, String::from_utf8(output.stderr).unwrap())
    };
    let (pid, text) = log("text");
    assert!(
        text.contains(&format!(" shard default/vineyard[{pid}] ")),
        "{text}"
    );
    assert!(
        text.ends_with("publish{volume_id=\"v1\"}: done bytes=7\n"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    let (pid, text) = log("json");
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(line["role"], "shard default/vineyard");
    assert_eq!(line["pid"], pid);
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["message"], "done");
    assert_eq!(line["bytes"], 7);
    assert_eq!(line["span"]["volume_id"], "v1");
}
