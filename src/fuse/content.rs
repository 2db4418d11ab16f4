//! What the files of the dummy filesystem say.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use super::tree::{File, Source};

/// The files that say the same until they are told otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// `VINEYARD_IPC_SOCKET`: the path of the UNIX socket.
    pub ipc_socket: String,
    /// `VINEYARD_RPC_ENDPOINT`: `host:port` of the RPC door.
    pub rpc_endpoint: String,
    /// `vineyard-config.yaml`, whole.
    pub config: String,
}

/// The files that are made when they are read.
///
/// It is asked on the thread that serves the filesystem: an answer that waits keeps every reader
/// waiting, and one that opens a file of the mount waits for itself.
pub trait Live: Send + Sync + 'static {
    /// `status`.
    fn status(&self) -> String;
    /// `metrics`.
    fn metrics(&self) -> String;
}

/// A handle on the content; clones are the same content.
///
/// It guards the fixed files: a reader gets them as they were before or after
/// [`Files::update`].
#[derive(Clone)]
pub struct Files {
    fixed: Arc<Mutex<Given>>,
    live: Arc<dyn Live>,
}

#[derive(Debug)]
struct Given {
    fixed: Fixed,
    at: SystemTime,
}

impl Files {
    /// Files that say this, from `now` on.
    pub fn new(fixed: Fixed, now: SystemTime, live: impl Live) -> Self {
        Self {
            fixed: Arc::new(Mutex::new(Given { fixed, at: now })),
            live: Arc::new(live),
        }
    }

    /// Lets the fixed files say something else from `now` on.
    pub fn update(&self, fixed: Fixed, now: SystemTime) {
        self.with(|given| {
            if given.fixed != fixed {
                *given = Given { fixed, at: now };
            }
        });
    }

    fn with<T>(&self, look: impl FnOnce(&mut Given) -> T) -> T {
        // Whole values are put in, so a panic elsewhere leaves nothing half done.
        look(&mut self.fixed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Files")
            .field("fixed", &self.fixed)
            .finish_non_exhaustive()
    }
}

impl Source for Files {
    fn content(&self, file: File) -> Vec<u8> {
        let text = match file {
            File::IpcSocket => self.with(|given| given.fixed.ipc_socket.clone()),
            File::RpcEndpoint => self.with(|given| given.fixed.rpc_endpoint.clone()),
            File::Config => self.with(|given| given.fixed.config.clone()),
            File::Status => self.live.status(),
            File::Metrics => self.live.metrics(),
        };
        text.into_bytes()
    }

    fn given(&self) -> SystemTime {
        self.with(|given| given.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter(Mutex<u32>);

    impl Live for Counter {
        fn status(&self) -> String {
            let mut count = self.0.lock().unwrap();
            *count += 1;
            format!("{count}")
        }

        fn metrics(&self) -> String {
            String::new()
        }
    }

    #[test]
    fn an_update_reaches_every_clone_and_dates_the_files() {
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let files = Files::new(Fixed::default(), at(1), Counter(Mutex::new(0)));
        let served = files.clone();
        let fixed = Fixed {
            rpc_endpoint: "host:1".to_owned(),
            ..Fixed::default()
        };
        files.update(fixed.clone(), at(2));
        files.update(fixed, at(3));
        assert_eq!(served.content(File::RpcEndpoint), b"host:1");
        assert_eq!(served.given(), at(2), "the same content again is no news");
    }

    #[test]
    fn live_files_are_asked_each_time() {
        let files = Files::new(
            Fixed::default(),
            SystemTime::UNIX_EPOCH,
            Counter(Mutex::new(0)),
        );
        assert_eq!(files.content(File::Status), b"1");
        assert_eq!(files.content(File::Status), b"2");
    }
}
