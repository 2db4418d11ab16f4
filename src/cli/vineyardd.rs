//! vineyardd's flags, and what they ask of a shard; pure.
//!
//! A flag that would change what clients see, and does not yet, is refused by name. Those that
//! only tune the original (its allocator, its logs, RDMA) are taken and have no effect.

use core::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::gflags::{Flag, GflagsError, Kind, Values, parse};
use crate::shard::store::Watermarks;

/// Used where no limit can be found out.
const FALLBACK_SIZE: u64 = 16 << 30;

const fn flag(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag {
        name,
        kind,
        default,
        help,
    }
}

use Kind::{Bool, Double, Int32, String as Text};

/// All flags of vineyardd 0.24, glog's among them, and three of our own: two at the top, and `spill_quota`.
#[rustfmt::skip]
pub(super) const FLAGS: &[Flag] = &[
    flag("arena_dir", Text, "", "directory of a tmpfs for the shared memory; empty: an anonymous file"),
    flag("rpc_host", Text, "0.0.0.0", "address to serve RPC on"),
    flag("deployment", Text, "local", "local or distributed; shown in the instance's status"),
    flag("meta", Text, "local", "where metadata is kept. vineyardd's default is etcd; only local is supported yet"),
    flag("meta_timeout", Int32, "60", "seconds to wait for the metadata backend; no effect with local"),
    flag("skip_launch_etcd", Bool, "true", "no effect with local metadata"),
    flag("etcd_endpoint", Text, "http://127.0.0.1:2379", "no effect with local metadata"),
    flag("etcd_prefix", Text, "vineyard", "no effect with local metadata"),
    flag("etcd_cmd", Text, "", "no effect with local metadata"),
    flag("etcd_data_dir", Text, "", "no effect with local metadata"),
    flag("size", Text, "", "bytes for blobs, as 256Mi or 4G, binary; empty: the container's limit or the machine's memory"),
    flag("allocator", Text, "dlmalloc", "dlmalloc or mimalloc; no effect"),
    flag("reserve_memory", Bool, "false", "take all pages at start"),
    flag("stream_threshold", Int32, "80", "per cent of memory at which writers of streams wait"),
    flag("spill_path", Text, "", "directory to spill cold blobs to; only files of our own are touched there. Empty: nothing is spilled"),
    flag("spill_lower_rate", Double, "0.3", "part of size at which spilling stops"),
    flag("spill_upper_rate", Double, "0.8", "part of size at which spilling begins"),
    flag("spill_quota", Text, "", "bytes for files in spill_path, as 10Gi; empty: what the disk has"),
    flag("socket", Text, "", "UNIX socket; empty: /var/run/vineyard.sock, or else ~/.local/vineyard/vineyard.sock"),
    flag("rpc", Bool, "true", "serve RPC"),
    flag("rpc_socket_port", Int32, "9600", "port to serve RPC on; 0: any"),
    flag("rdma_endpoint", Text, "", "no effect"),
    flag("compression", Bool, "true", "no effect: bytes travel as they are"),
    flag("sync_crds", Bool, "false", "not supported"),
    flag("prometheus", Bool, "false", "no effect"),
    flag("metrics", Bool, "false", "no effect"),
    flag("coredump", Bool, "false", "dump core after a crash"),
    flag("htpasswd", Text, "", "file of passwords for clients; not supported yet"),
    flag("help", Bool, "false", "show the flags"),
    flag("helpfull", Bool, "false", "show the flags"),
    flag("helpshort", Bool, "false", "show the flags"),
    flag("version", Bool, "false", "show the version"),
    flag("flagfile", Text, "", "not supported"),
    flag("fromenv", Text, "", "not supported"),
    flag("tryfromenv", Text, "", "not supported"),
    flag("undefok", Text, "", "not supported"),
    flag("alsologtoemail", Text, "", "no effect"),
    flag("alsologtostderr", Bool, "false", "no effect: the log goes to stderr"),
    flag("colorlogtostderr", Bool, "false", "no effect"),
    flag("colorlogtostdout", Bool, "false", "no effect"),
    flag("drop_log_memory", Bool, "true", "no effect"),
    flag("log_backtrace_at", Text, "", "no effect"),
    flag("log_dir", Text, "", "no effect: the log goes to stderr"),
    flag("log_link", Text, "", "no effect"),
    flag("log_prefix", Bool, "true", "no effect"),
    flag("log_utc_time", Bool, "false", "no effect"),
    flag("log_year_in_prefix", Bool, "true", "no effect"),
    flag("logbuflevel", Int32, "0", "no effect"),
    flag("logbufsecs", Int32, "30", "no effect"),
    flag("logcleansecs", Int32, "300", "no effect"),
    flag("logemaillevel", Int32, "999", "no effect"),
    flag("logfile_mode", Int32, "436", "no effect"),
    flag("logmailer", Text, "", "no effect"),
    flag("logtostderr", Bool, "false", "no effect: the log goes to stderr"),
    flag("logtostdout", Bool, "false", "no effect: the log goes to stderr"),
    flag("max_log_size", Int32, "1800", "no effect"),
    flag("minloglevel", Int32, "0", "no effect"),
    flag("stderrthreshold", Int32, "0", "no effect"),
    flag("stop_logging_if_full_disk", Bool, "false", "no effect"),
    flag("symbolize_stacktrace", Bool, "true", "no effect"),
    flag("timestamp_in_logfile_name", Bool, "true", "no effect"),
    flag("v", Int32, "0", "no effect"),
    flag("vmodule", Text, "", "no effect"),
];

/// What the machine says, where flags say nothing.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    /// gethostname(2).
    pub(super) hostname: String,
    /// `MY_HOST_NAME`: under which name others reach us.
    pub(super) my_host_name: Option<String>,
    /// `MY_NODE_NAME`: the node's name.
    pub(super) my_node_name: Option<String>,
    /// The container's limit, else the machine's memory, in bytes.
    pub(super) memory: Option<u64>,
    /// The user's directory.
    pub(super) home: Option<PathBuf>,
}

/// Why the flags cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FlagsError {
    #[error(transparent)]
    Syntax(#[from] GflagsError),
    #[error("--{flag} {value} is not supported yet")]
    NotSupported { flag: &'static str, value: String },
    #[error(
        "--{0} asks for etcd as the metadata backend, which is not supported yet; \
         with --meta local it has no effect"
    )]
    NeedsEtcd(&'static str),
    #[error("--{flag} {value}: {expected} is expected")]
    Value {
        flag: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("MY_HOST_NAME {0:?} is not a host name: clients split host:port at the colon")]
    HostName(String),
}

/// What the flags ask for.
#[derive(Debug)]
pub(super) enum Command {
    Help,
    Version,
    Serve(Box<Options>),
}

/// A shard to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Where to listen: the first that can be listened on.
    pub(crate) sockets: Vec<PathBuf>,
    /// Where to serve RPC, if at all.
    pub(crate) rpc: Option<SocketAddr>,
    /// The host that clients are told.
    pub(crate) hostname: String,
    /// The node they are told.
    pub(crate) nodename: String,
    /// Bytes for blobs.
    pub(crate) size: u64,
    /// A tmpfs for the arena.
    pub(crate) arena_dir: Option<PathBuf>,
    /// Take all pages at start.
    pub(crate) reserve_memory: bool,
    /// Per cent of memory at which writers of streams wait.
    pub(crate) stream_threshold: u32,
    /// `local` or `distributed`.
    pub(crate) deployment: String,
    /// Dump core after a crash.
    pub(crate) coredump: bool,
    /// Where and when to spill, if at all.
    pub(crate) spill: Option<SpillOptions>,
}

/// A disk for blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpillOptions {
    /// The directory.
    pub(crate) path: PathBuf,
    /// Bytes for its files together.
    pub(crate) quota: Option<u64>,
    /// When to begin and to stop.
    pub(crate) watermarks: Watermarks,
}

/// Understands arguments, the program's name left out.
pub(super) fn understand<'a>(
    arguments: impl IntoIterator<Item = &'a str>,
    surroundings: &Surroundings,
) -> Result<Command, FlagsError> {
    let values = parse(FLAGS, arguments)?;
    if ["help", "helpfull", "helpshort"]
        .iter()
        .any(|help| values.is_on(help))
    {
        return Ok(Command::Help);
    }
    if values.is_on("version") {
        return Ok(Command::Version);
    }
    refuse_unsupported(&values)?;
    let hostname = match &surroundings.my_host_name {
        Some(name) if name.contains(':') => return Err(FlagsError::HostName(name.clone())),
        Some(name) if !name.is_empty() => name.clone(),
        Some(_) | None => surroundings.hostname.clone(),
    };
    let nodename = surroundings
        .my_node_name
        .clone()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| hostname.clone());
    let bytes = size(values.text("size"))
        .or(surroundings.memory)
        .unwrap_or(FALLBACK_SIZE);
    Ok(Command::Serve(Box::new(Options {
        sockets: sockets(values.text("socket"), surroundings),
        rpc: rpc(&values)?,
        hostname,
        nodename,
        size: bytes,
        spill: spill(&values, bytes)?,
        arena_dir: some_path(values.text("arena_dir")),
        reserve_memory: values.is_on("reserve_memory"),
        // Less than nothing is nothing: every writer waits.
        stream_threshold: u32::try_from(values.number("stream_threshold")).unwrap_or(0),
        deployment: one_of(
            &values,
            "deployment",
            &["local", "distributed"],
            "local or distributed",
        )?,
        coredump: values.is_on("coredump"),
    })))
}

/// What would silently be something else than asked for.
fn refuse_unsupported(values: &Values) -> Result<(), FlagsError> {
    let refused = |flag| FlagsError::NotSupported {
        flag,
        value: values.text(flag).to_owned(),
    };
    if values.text("meta") != "local" {
        return Err(match values.text("meta") {
            "etcd" | "redis" => refused("meta"),
            other => FlagsError::Value {
                flag: "meta",
                value: other.to_owned(),
                expected: "local",
            },
        });
    }
    if !values.is_given("meta") {
        // vineyardd would go to etcd; whoever says so much about it means it.
        let of_etcd = ["etcd_endpoint", "etcd_prefix", "etcd_cmd", "etcd_data_dir"];
        if let Some(flag) = of_etcd.into_iter().find(|flag| values.is_given(flag)) {
            return Err(FlagsError::NeedsEtcd(flag));
        }
    }
    for flag in ["htpasswd", "flagfile", "fromenv", "tryfromenv", "undefok"] {
        if !values.text(flag).is_empty() {
            return Err(refused(flag));
        }
    }
    if values.is_on("sync_crds") {
        return Err(refused("sync_crds"));
    }
    one_of(
        values,
        "allocator",
        &["dlmalloc", "mimalloc"],
        "dlmalloc or mimalloc",
    )?;
    Ok(())
}

fn one_of(
    values: &Values,
    flag: &'static str,
    allowed: &[&str],
    expected: &'static str,
) -> Result<String, FlagsError> {
    let value = values.text(flag).to_owned();
    if allowed.contains(&value.as_str()) {
        Ok(value)
    } else {
        Err(FlagsError::Value {
            flag,
            value,
            expected,
        })
    }
}

fn spill(values: &Values, bytes: u64) -> Result<Option<SpillOptions>, FlagsError> {
    let Some(path) = some_path(values.text("spill_path")) else {
        if values.is_given("spill_quota") {
            return Err(FlagsError::Value {
                flag: "spill_quota",
                value: values.text("spill_quota").to_owned(),
                expected: "a --spill_path with it",
            });
        }
        return Ok(None);
    };
    let rate = |flag| values.text(flag).trim().parse().unwrap_or(f64::NAN);
    let watermarks = Watermarks::of(bytes, rate("spill_lower_rate"), rate("spill_upper_rate"));
    let watermarks = watermarks.ok_or_else(|| FlagsError::Value {
        flag: "spill_lower_rate",
        value: format!(
            "{} with --spill_upper_rate {}",
            values.text("spill_lower_rate"),
            values.text("spill_upper_rate")
        ),
        expected: "0 <= lower <= upper <= 1",
    })?;
    let quota = match values.text("spill_quota") {
        "" => None,
        text => Some(size(text).ok_or_else(|| FlagsError::Value {
            flag: "spill_quota",
            value: text.to_owned(),
            expected: "a size as 10Gi",
        })?),
    };
    Ok(Some(SpillOptions {
        path,
        quota,
        watermarks,
    }))
}

fn some_path(text: &str) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

fn sockets(text: &str, surroundings: &Surroundings) -> Vec<PathBuf> {
    if let Some(path) = some_path(text) {
        return vec![path];
    }
    let at_home = surroundings
        .home
        .as_ref()
        .map(|home| home.join(".local/vineyard/vineyard.sock"));
    std::iter::once(PathBuf::from("/var/run/vineyard.sock"))
        .chain(at_home)
        .collect()
}

fn rpc(values: &Values) -> Result<Option<SocketAddr>, FlagsError> {
    if !values.is_on("rpc") {
        return Ok(None);
    }
    let wrong = |flag, expected| FlagsError::Value {
        flag,
        value: values.text(flag).to_owned(),
        expected,
    };
    let host: IpAddr = values
        .text("rpc_host")
        .parse()
        .map_err(|_| wrong("rpc_host", "an IP address"))?;
    let port = u16::try_from(values.number("rpc_socket_port"))
        .map_err(|_| wrong("rpc_socket_port", "a port from 0 to 65535"))?;
    Ok(Some(SocketAddr::new(host, port)))
}

/// A number as strtod(3) reads it and at most one letter k, m, g, t, p or e, all binary; what
/// follows (`i`, `B`, anything) is ignored. Nothing, and what is not positive, is no size.
fn size(text: &str) -> Option<u64> {
    let text = text.trim_start();
    let end = (1..=text.len())
        .rev()
        .filter(|&end| text.is_char_boundary(end))
        .find(|&end| is_number(&text[..end]))?;
    let number: f64 = text[..end].parse().ok()?;
    let shift = match text[end..]
        .bytes()
        .next()
        .map(|letter| letter.to_ascii_lowercase())
    {
        Some(b'k') => 10,
        Some(b'm') => 20,
        Some(b'g') => 30,
        Some(b't') => 40,
        Some(b'p') => 50,
        Some(b'e') => 60,
        Some(_) | None => 0,
    };
    // Saturates; a float holds every size a machine can have.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bytes = (number * 2_f64.powi(shift)) as u64;
    (bytes > 0).then_some(bytes)
}

/// Decimal digits with sign, point and exponent; not `inf` or `nan`, which Rust would take too.
fn is_number(text: &str) -> bool {
    text.bytes()
        .all(|b| matches!(b, b'0'..=b'9' | b'.' | b'+' | b'-' | b'e' | b'E'))
        && text.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surroundings() -> Surroundings {
        Surroundings {
            hostname: "vm".into(),
            my_host_name: None,
            my_node_name: None,
            memory: Some(1 << 33),
            home: Some("/root".into()),
        }
    }

    fn options(line: &str) -> Result<Options, String> {
        match understand(line.split_whitespace(), &surroundings()) {
            Ok(Command::Serve(options)) => Ok(*options),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn the_python_launchers_command_line_is_understood() {
        let options = options(
            "--deployment local --size= --socket /tmp/s.sock --norpc --rpc_socket_port 9600 --meta local",
        )
        .unwrap();
        assert_eq!(options.sockets, [PathBuf::from("/tmp/s.sock")]);
        assert_eq!((options.rpc, options.size), (None, 1 << 33));
        assert_eq!(
            (options.hostname.as_str(), options.nodename.as_str()),
            ("vm", "vm")
        );
    }

    #[test]
    fn the_upstream_test_runners_command_line_is_understood() {
        let options = options(
            "--size 8589934592 --socket /tmp/s --rpc_socket_port 1234 --meta local --allocator mimalloc \
             --spill_lower_rate 0.3 --spill_upper_rate 0.8 --rdma_endpoint 127.0.0.1:5 --coredump",
        )
        .unwrap();
        assert_eq!(options.rpc, Some("0.0.0.0:1234".parse().unwrap()));
        assert_eq!(options.size, 8 << 30);
        assert!(options.coredump && !options.reserve_memory);
    }

    #[test]
    fn spilling_is_asked_for_by_its_path() {
        let spill = |line| options(line).unwrap().spill;
        assert_eq!(spill("--spill_upper_rate 0.5"), None);
        let expected = SpillOptions {
            path: "/d".into(),
            quota: Some(10 << 30),
            watermarks: Watermarks::of(1000, 0.3, 0.8).unwrap(),
        };
        let line = "--size 1000 --spill_path /d --spill_quota 10Gi";
        assert_eq!(spill(line), Some(expected));
        assert_eq!(spill("--spill_path=/d").unwrap().quota, None);
    }

    #[test]
    fn without_a_socket_there_are_two_places() {
        assert_eq!(
            options("").unwrap().sockets,
            [
                PathBuf::from("/var/run/vineyard.sock"),
                PathBuf::from("/root/.local/vineyard/vineyard.sock")
            ]
        );
    }

    #[test]
    fn what_would_change_behaviour_silently_is_refused_by_name() {
        for (line, text) in [
            ("--meta etcd", "--meta etcd is not supported yet"),
            ("--meta redis", "--meta redis is not supported yet"),
            ("--meta x", "--meta x: local is expected"),
            (
                "--spill_path /tmp/x --spill_lower_rate 0.9",
                "--spill_lower_rate 0.9 with --spill_upper_rate 0.8: 0 <= lower <= upper <= 1 is expected",
            ),
            (
                "--spill_path /tmp/x --spill_quota much",
                "--spill_quota much: a size as 10Gi is expected",
            ),
            (
                "--spill_quota 1Gi",
                "--spill_quota 1Gi: a --spill_path with it is expected",
            ),
            ("--htpasswd f", "--htpasswd f is not supported yet"),
            ("--flagfile f", "--flagfile f is not supported yet"),
            ("--sync_crds false", "--sync_crds true is not supported yet"),
            (
                "--allocator x",
                "--allocator x: dlmalloc or mimalloc is expected",
            ),
            (
                "--deployment x",
                "--deployment x: local or distributed is expected",
            ),
            (
                "--rpc_socket_port 65536",
                "--rpc_socket_port 65536: a port from 0 to 65535 is expected",
            ),
            (
                "--rpc_host localhost",
                "--rpc_host localhost: an IP address is expected",
            ),
            ("--bogus", "unknown command line flag 'bogus'"),
        ] {
            assert_eq!(options(line).unwrap_err(), text);
        }
        let error = options("--etcd_endpoint http://e:2379").unwrap_err();
        assert!(
            error.starts_with("--etcd_endpoint asks for etcd"),
            "{error}"
        );
        assert!(options("--meta local --etcd_endpoint http://e:2379").is_ok());
    }

    #[test]
    fn glogs_flags_are_taken() {
        let line =
            "--log_dir /tmp -v 3 --logtostderr --minloglevel=1 --stderrthreshold 0 --metrics";
        assert!(options(line).is_ok());
    }

    #[test]
    fn sizes_are_read_as_vineyardd_reads_them() {
        for (text, expected) in [
            ("1024", Some(1024)),
            ("256Mi", Some(256 << 20)),
            ("256M", Some(256 << 20)),
            ("256mb", Some(256 << 20)),
            ("4Gi", Some(4 << 30)),
            ("4GiB", Some(4 << 30)),
            ("1.5k", Some(1536)),
            ("2t", Some(2 << 40)),
            ("1e3", Some(1000)),
            ("1e", Some(1 << 60)),
            ("1E", Some(1 << 60)),
            (" 7", Some(7)),
            ("10x", Some(10)),
            ("8000é", Some(8000)),
            ("", None),
            ("0", None),
            ("-5", None),
            ("abc", None),
            ("nan", None),
            ("inf", None),
            ("0.3", None),
        ] {
            assert_eq!(size(text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_hosts_name_is_what_peers_shall_use() {
        let with = |name: &str| {
            let surroundings = Surroundings {
                my_host_name: Some(name.to_owned()),
                ..surroundings()
            };
            match understand([], &surroundings) {
                Ok(Command::Serve(options)) => Ok(options.hostname),
                Ok(other) => panic!("{other:?}"),
                Err(error) => Err(error),
            }
        };
        assert_eq!(with("10.1.2.3"), Ok("10.1.2.3".to_owned()));
        assert_eq!(with(""), Ok("vm".to_owned()));
        assert!(with("fd00::1").is_err());
    }
}
