//! The tracing subscriber: one line per event on stderr, as text or JSON, with role and pid in
//! each, since the lines of several processes meet in one log.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::str::FromStr;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// What a line looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// A format nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a log format: text or json is expected")]
pub struct FormatError(String);

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(FormatError(text.to_owned())),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A level nobody knows.
    #[error("{0:?} is not a log level: off, error, warn, info, debug or trace is expected")]
    Level(String),
    /// It was called before.
    #[error("logging is set up already")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

/// Sends this process's events of `level` and above to stderr. What the libraries beneath have to
/// say comes from `warn` on, and all of it only at `trace`.
pub fn init(level: &str, format: Format, role: &str) -> Result<(), InitError> {
    let filter = filter(level)?;
    let pid = std::process::id();
    let layer = tracing_subscriber::fmt::layer().log_internal_errors(false);
    let layer = match format {
        Format::Text => layer
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .with_timer(Stamp(format!("{role}[{pid}]")))
            .with_writer(Line::default)
            .boxed(),
        Format::Json => layer
            .json()
            .flatten_event(true)
            .with_writer({
                let role = serde_json::Value::from(role);
                let fields = format!("{{\"role\":{role},\"pid\":{pid},");
                move || Line(Some(fields.clone()))
            })
            .boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init()
        .map_err(InitError::Twice)
}

fn filter(level: &str) -> Result<Targets, InitError> {
    let wrong = || InitError::Level(level.to_owned());
    // It would also take numbers and the empty text.
    let is_word = !level.is_empty() && level.bytes().all(|b| b.is_ascii_alphabetic());
    let level = match is_word {
        true => level.parse::<LevelFilter>().map_err(|_| wrong())?,
        false => return Err(wrong()),
    };
    let others = match level {
        LevelFilter::TRACE => LevelFilter::TRACE,
        level => level.min(LevelFilter::WARN),
    };
    Ok(Targets::new()
        .with_default(others)
        .with_target("vinelet", level))
}

/// The time, followed by who writes.
struct Stamp(String);

impl FormatTime for Stamp {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        SystemTime.format_time(w)?;
        write!(w, " {}", self.0)
    }
}

/// Writes a whole line at once to stderr; for JSON, its first fields in the place of the brace.
///
/// Never fails: a log that nobody reads any more is no reason to do anything else.
#[derive(Default)]
struct Line(Option<String>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let written = match (&self.0, line) {
            (Some(fields), [b'{', rest @ ..]) => {
                let whole = [fields.as_bytes(), rest].concat();
                io::stderr().write_all(&whole)
            }
            _ => io::stderr().write_all(line),
        };
        let _ = written;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_quiet_unless_everything_is_wanted() {
        use tracing::Level;
        let at = |level: &str, target: &str, event: Level| {
            filter(level).unwrap().would_enable(target, &event)
        };
        assert!(at("debug", "vinelet::csi", Level::DEBUG));
        assert!(!at("debug", "h2::codec", Level::DEBUG));
        assert!(at("info", "h2::codec", Level::WARN));
        assert!(!at("error", "h2::codec", Level::WARN));
        assert!(at("trace", "h2::codec", Level::TRACE));
        assert!(!at("off", "vinelet", Level::ERROR));
    }

    #[test]
    fn an_unknown_level_is_refused_with_those_there_are() {
        for bad in ["", "3", "verbose", "info,h2=debug"] {
            let refused = filter(bad).unwrap_err().to_string();
            assert!(refused.ends_with("debug or trace is expected"), "{refused}");
        }
        assert_eq!(
            "xml".parse::<Format>().unwrap_err().to_string(),
            "\"xml\" is not a log format: text or json is expected"
        );
    }
}
