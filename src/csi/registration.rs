//! Kubelet's plugin registration, in this process instead of a sidecar.
//!
//! Kubelet watches a directory; a socket that appears there is asked who it is (GetInfo), the
//! CSI endpoint it names is called (NodeGetInfo), and the outcome is told
//! (NotifyRegistrationStatus). A socket that vanishes is a plugin that left. After a negative
//! outcome kubelet does not try again until the socket is made anew.
//!
//! So the socket here stays, answers for as long as the process lives, and is made anew when it
//! was refused or when somebody removed it or its directory.

use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::net::UnixListener;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::door::{self, Acceptor, One};
use super::grpc::registration::registration_server::{
    Registration as RegistrationService, RegistrationServer,
};
use super::grpc::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};

/// Pauses before the socket is made anew: after a refusal, or where it could not be made.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// What kubelet is told, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistrationOptions {
    /// The directory kubelet watches.
    pub directory: PathBuf,
    /// The driver's name.
    pub driver_name: String,
    /// The CSI socket, as kubelet sees it.
    pub endpoint: PathBuf,
}

/// What kubelet makes of us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registered {
    /// It has not said anything; the text says what is being waited for.
    Waiting(String),
    /// It knows the driver.
    Yes,
    /// It refuses the driver, and why.
    Refused(String),
}

type OnNewListener = Box<dyn FnMut(BorrowedFd<'_>) + Send>;

/// The registration of one driver.
pub struct Registration {
    options: RegistrationOptions,
    inherited: Option<std::os::unix::net::UnixListener>,
    was_registered: bool,
    on_new_listener: OnNewListener,
    state: watch::Sender<Registered>,
}

impl Registration {
    /// A registration, with the listener of an earlier process if there is one.
    pub fn new(
        options: RegistrationOptions,
        inherited: Option<std::os::unix::net::UnixListener>,
    ) -> Self {
        let waiting = Registered::Waiting("kubelet has not asked yet".to_owned());
        Self {
            options,
            inherited,
            was_registered: false,
            on_new_listener: Box::new(|_| {}),
            state: watch::Sender::new(waiting),
        }
    }

    /// Lets `hook` see every listener that is made from now on, so that it can be kept.
    pub fn on_new_listener(mut self, hook: impl FnMut(BorrowedFd<'_>) + Send + 'static) -> Self {
        self.on_new_listener = Box::new(hook);
        self
    }

    /// Says that kubelet had accepted the driver on the inherited listener: it does not ask again
    /// while the socket stays.
    pub fn was_registered(mut self, was: bool) -> Self {
        self.was_registered = was;
        self
    }

    /// What kubelet makes of us, now and later.
    pub fn state(&self) -> watch::Receiver<Registered> {
        self.state.subscribe()
    }

    /// Where the socket is.
    pub fn socket(&self) -> PathBuf {
        let name = format!("{}-reg.sock", self.options.driver_name);
        self.options.directory.join(name)
    }

    /// Keeps the driver registered until `stop`, then removes the socket.
    pub async fn run(self, stop: impl Future<Output = ()> + Send) {
        let path = self.socket();
        let (acceptor, incoming) = Acceptor::new();
        let refused = Arc::new(Notify::new());
        let service = RegistrationServer::new(Service {
            options: self.options.clone(),
            state: self.state.clone(),
            refused: refused.clone(),
        });
        let (stopped, is_stopped) = tokio::sync::oneshot::channel::<()>();
        let serve = door::answer(incoming, One(service), async move {
            let _ = is_stopped.await;
        });
        let keep = Keeper {
            path: path.clone(),
            directory: self.options.directory,
            listener: None,
            inherited: self.inherited,
            was_registered: self.was_registered,
            on_new_listener: self.on_new_listener,
            state: self.state,
            changed: Arc::new(Notify::new()),
            watching: None,
            pause: FIRST_PAUSE,
        };
        let keep = async move {
            tokio::select! {
                () = keep.run(&acceptor, &refused) => {}
                () = stop => {}
            }
            drop(acceptor);
            drop(stopped);
            if let Err(error) = door::remove(&path) {
                tracing::warn!(path = %path.display(), %error, "removing the registration socket");
            }
        };
        let (outcome, ()) = tokio::join!(serve, keep);
        if let Err(error) = outcome {
            tracing::error!(%error, "serving the registration socket");
        }
    }
}

/// A socket file, by its inode.
type FileId = (u64, u64);

/// Keeps the socket in its place.
struct Keeper {
    path: PathBuf,
    directory: PathBuf,
    listener: Option<(UnixListener, FileId)>,
    inherited: Option<std::os::unix::net::UnixListener>,
    was_registered: bool,
    on_new_listener: OnNewListener,
    state: watch::Sender<Registered>,
    /// Something happened in the watched directory. Many events are one.
    changed: Arc<Notify>,
    /// The watcher, and the inode it watches.
    watching: Option<(RecommendedWatcher, FileId)>,
    pause: Duration,
}

impl Keeper {
    async fn run(mut self, acceptor: &Acceptor, refused: &Notify) {
        // When the socket is to be made anew after a refusal. Until then the old one answers.
        let mut again: Option<Instant> = None;
        loop {
            if again.is_some_and(|at| at <= Instant::now()) {
                again = None;
                self.listener = None;
            }
            let retry = match self.ensure() {
                Ok(()) => again,
                Err(error) => {
                    let text = chain(&*error);
                    tracing::warn!(error = text, "no registration socket");
                    self.state.send_replace(Registered::Waiting(text));
                    Some(Instant::now() + self.next_pause())
                }
            };
            let accept = async {
                match &self.listener {
                    Some((listener, _)) => acceptor.accept(listener).await,
                    None => std::future::pending().await,
                }
            };
            let wait = async {
                match retry {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let changed = self.changed.clone();
            tokio::select! {
                () = accept => return,
                () = wait => {}
                () = changed.notified() => {}
                // Kubelet looks only at sockets that are new to it.
                () = refused.notified() => again = Some(Instant::now() + self.next_pause()),
            }
            if *self.state.borrow() == Registered::Yes {
                self.pause = FIRST_PAUSE;
            }
        }
    }

    fn next_pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(LAST_PAUSE);
        pause
    }

    /// Sees to it that the directory is watched and our socket is in it.
    fn ensure(&mut self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        // First the watch, then the look: what happens between the two is not missed.
        let made = std::fs::create_dir_all(&self.directory);
        self.watch_nearest()?;
        made?;
        let there = socket_at(&self.path);
        if let Some((_, ours)) = &self.listener
            && there == Some(*ours)
        {
            return Ok(());
        }
        // Only at the start: a listener of an earlier process is good if its file still is.
        if let (Some(listener), Some(id)) = (self.inherited.take(), there)
            && std::os::unix::net::UnixStream::connect(&self.path).is_ok()
        {
            listener.set_nonblocking(true)?;
            self.listener = Some((UnixListener::from_std(listener)?, id));
            if self.was_registered {
                self.state.send_replace(Registered::Yes);
            }
            return Ok(());
        }
        let is_again = self.listener.take().is_some();
        let listener = crate::sockets::listen_unix(&self.path, 0o600)?;
        listener.set_nonblocking(true)?;
        let id = socket_at(&self.path).ok_or("the registration socket vanished at once")?;
        (self.on_new_listener)(listener.as_fd());
        self.listener = Some((UnixListener::from_std(listener)?, id));
        let why = if is_again { "made anew" } else { "made" };
        tracing::info!(path = %self.path.display(), why, "registration socket");
        let was_refused = matches!(*self.state.borrow(), Registered::Refused(_));
        if !was_refused {
            let waiting = "kubelet has not asked yet".to_owned();
            self.state.send_replace(Registered::Waiting(waiting));
        }
        Ok(())
    }

    /// Watches the directory, or what there is of it.
    fn watch_nearest(&mut self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let nearest = self.directory.ancestors().find_map(|directory| {
            let metadata = std::fs::metadata(directory).ok()?;
            Some((directory, (metadata.dev(), metadata.ino())))
        });
        let (directory, id) = nearest.ok_or("no directory to watch")?;
        if self
            .watching
            .as_ref()
            .is_some_and(|(_, watched)| *watched == id)
        {
            return Ok(());
        }
        let changed = self.changed.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<_>| {
            if matters(event) {
                changed.notify_one();
            }
        })?;
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
        self.watching = Some((watcher, id));
        Ok(())
    }
}

/// Opening and reading change nothing; an error may hide a change.
fn matters(event: notify::Result<notify::Event>) -> bool {
    event.map_or(true, |event| !event.kind.is_access())
}

fn socket_at(path: &Path) -> Option<FileId> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    let id = (metadata.dev(), metadata.ino());
    metadata.file_type().is_socket().then_some(id)
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// What kubelet calls.
struct Service {
    options: RegistrationOptions,
    state: watch::Sender<Registered>,
    refused: Arc<Notify>,
}

#[tonic::async_trait]
impl RegistrationService for Service {
    /// Newer kubelets ask this again and again to see whether the plugin lives.
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: self.options.driver_name.clone(),
            endpoint: self.options.endpoint.display().to_string(),
            // As node-driver-registrar says; kubelet compares the major number.
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            tracing::info!("kubelet registered the driver");
            self.state.send_replace(Registered::Yes);
        } else {
            tracing::error!(error = status.error, "kubelet refuses the driver");
            self.state.send_replace(Registered::Refused(status.error));
            self.refused.notify_one();
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
