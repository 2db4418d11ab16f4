//! One connection: read, dispatch, reply.
//!
//! Invariant: a reply is written whole before the next request is looked at, and what the client
//! has sent meanwhile is read ahead only while its request waits, up to [`READ_AHEAD`] bytes.

#[path = "packed.rs"]
mod packed;

use std::future::{Future, pending};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use tokio::sync::watch;
use tokio::task::{JoinError, spawn_blocking};

use super::dispatch::{Client, Descriptor, Step};
use crate::shard::ids::ObjectId;
use crate::shard::protocol::frame::{self, Decoder, FrameError};
use crate::shard::protocol::reply::Reply;
use crate::shard::protocol::zstd::ZstdError;
use crate::shard::store::{self, Store, Transport};

/// Bytes read ahead while a request waits, in order to notice that its client has gone.
const READ_AHEAD: usize = 64 << 10;

/// Bytes of a blob that pass through a buffer of ours at a time.
const CHUNK: usize = 256 << 10;

/// The transport of a connection.
pub(super) trait Link: Send + 'static {
    const TRANSPORT: Transport;

    /// Appends what there is to read, at least one byte; 0 at the end.
    fn read(&mut self, into: &mut Vec<u8>) -> impl Future<Output = io::Result<usize>> + Send;

    /// As `read`, into a given space.
    fn read_slice(&mut self, into: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send;

    /// Writes all of it.
    fn write(&mut self, bytes: &[u8]) -> impl Future<Output = io::Result<()>> + Send;

    /// Passes a descriptor along with one byte that belongs to it alone.
    fn send_descriptor(
        &mut self,
        descriptor: BorrowedFd<'_>,
    ) -> impl Future<Output = io::Result<()>> + Send;
}

/// Why a connection ended before its client wanted it to.
#[derive(Debug, thiserror::Error)]
enum BrokenOff {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("a request that waited for the disk came to no end")]
    Disk(#[source] JoinError),
    #[error(transparent)]
    Zstd(#[from] ZstdError),
    #[error("a chunk of {0} bytes is announced")]
    Chunk(u64),
    #[error("the bytes for blob {0} do not end where it ends")]
    Overrun(ObjectId),
    #[error("a blob vanished while it was sent")]
    Vanished(#[source] store::Error),
}

/// Serves one client until it goes, or until `draining` and nothing of it is in hand.
pub(super) async fn converse<L: Link>(link: L, store: Store, draining: watch::Receiver<bool>) {
    let connection = Connection {
        link,
        client: Client::new(&store, L::TRANSPORT),
        decoder: Decoder::new(),
        out: Vec::new(),
        draining,
    };
    if let Err(error) = connection.run().await {
        tracing::debug!(
            transport = ?L::TRANSPORT,
            error = &error as &(dyn std::error::Error + 'static),
            "a connection was broken off"
        );
    }
}

struct Connection<L> {
    link: L,
    client: Client,
    decoder: Decoder,
    /// Frames on their way out; empty between requests.
    out: Vec<u8>,
    draining: watch::Receiver<bool>,
}

impl<L: Link> Connection<L> {
    async fn run(mut self) -> Result<(), BrokenOff> {
        loop {
            let body = self.decoder.next_body()?;
            let Some(request) = body.map(|body| self.client.understand(body)) else {
                if self.receive().await? {
                    continue;
                }
                return Ok(());
            };
            let step = match request {
                Ok(request) => {
                    let is_slow = self.client.may_wait_for_disk(&request);
                    let step;
                    (self.client, step) =
                        act(self.client, is_slow, |client| client.dispatch(request)).await?;
                    step
                }
                Err(error) => Step::Reply(Reply::from(&error)),
            };
            match step {
                Step::Reply(reply) => self.answer(&reply).await?,
                Step::ReplyWithRegions(reply, regions) => {
                    self.answer_with_regions(&reply, &regions).await?;
                }
                Step::Wait(wait) => {
                    let store = self.client.store().clone();
                    let waited = tokio::select! {
                        biased;
                        waited = wait.over(&store) => waited,
                        gone = hung_up(&mut self.link, &mut self.decoder) => return Ok(gone?),
                        () = drained(&mut self.draining) => return Ok(()),
                    };
                    let is_slow = waited.may_wait_for_disk(&store);
                    let (reply, regions);
                    (self.client, (reply, regions)) =
                        act(self.client, is_slow, |client| client.resume(waited)).await?;
                    self.answer_with_regions(&reply, &regions).await?;
                }
                Step::Upload { go_ahead, blobs } => self.upload(go_ahead, &blobs).await?,
                Step::Download { reply, blobs } => self.download(&reply, &blobs).await?,
                Step::UploadPacked { go_ahead, blobs } => {
                    self.upload_packed(go_ahead, &blobs).await?;
                }
                Step::DownloadPacked { reply, blobs } => {
                    self.download_packed(&reply, &blobs).await?;
                }
                Step::Close => return Ok(()),
            }
        }
    }

    /// Reads once. False: there will be no further request.
    async fn receive(&mut self) -> Result<bool, BrokenOff> {
        // A request that has begun to arrive is in hand.
        let idle = self.decoder.buffered() == 0;
        let read = self.link.read(self.decoder.incoming());
        let count = tokio::select! {
            biased;
            count = read => count?,
            () = drained(&mut self.draining), if idle => 0,
        };
        Ok(count > 0)
    }

    async fn answer(&mut self, reply: &Reply) -> io::Result<()> {
        reply.encode(&mut self.out);
        self.link.write(&self.out).await?;
        frame::reuse(&mut self.out);
        Ok(())
    }

    async fn answer_with_regions(
        &mut self,
        reply: &Reply,
        regions: &[Descriptor],
    ) -> io::Result<()> {
        self.answer(reply).await?;
        let store = self.client.store().clone();
        for region in regions {
            let descriptor = match region {
                Descriptor::Arena => store.arena(),
                Descriptor::File(file) => file.as_fd(),
            };
            self.link.send_descriptor(descriptor).await?;
        }
        Ok(())
    }

    /// Takes the bytes of `blobs`, one after another and without frames. If they cannot be stored
    /// they are taken nevertheless: the client sends them before it reads on.
    async fn upload(&mut self, go_ahead: Reply, blobs: &[store::Payload]) -> Result<(), BrokenOff> {
        self.answer(&go_ahead).await?;
        let total: u64 = blobs.iter().map(|blob| blob.size).sum();
        let mut chunk = vec![0; usize::try_from(total).map_or(CHUNK, |total| total.min(CHUNK))];
        let mut stored = Ok(());
        for blob in blobs {
            let mut at = 0;
            while at < blob.size {
                let left = blob.size - at;
                let mut bytes = self.decoder.take_raw(left);
                if bytes.is_empty() {
                    let most = usize::try_from(left).map_or(CHUNK, |left| left.min(chunk.len()));
                    let count = self.link.read_slice(&mut chunk[..most]).await?;
                    if count == 0 {
                        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                    }
                    bytes = &chunk[..count];
                }
                if stored.is_ok() {
                    stored = self.client.store().write_blob(blob, at, bytes);
                }
                at += bytes.len() as u64;
            }
        }
        let reply = self.client.uploaded(go_ahead, blobs, stored);
        Ok(self.answer(&reply).await?)
    }

    /// Sends a reply and the bytes of `blobs`, one after another and without frames. Small ones
    /// leave together with the reply.
    async fn download(&mut self, reply: &Reply, blobs: &[store::Payload]) -> Result<(), BrokenOff> {
        reply.encode(&mut self.out);
        for blob in blobs {
            let mut at = 0;
            while at < blob.size {
                if self.out.len() >= CHUNK {
                    self.link.write(&self.out).await?;
                    self.out.clear();
                }
                let free = CHUNK - self.out.len();
                let most = usize::try_from(blob.size - at).map_or(free, |left| left.min(free));
                let start = self.out.len();
                self.out.resize(start + most, 0);
                self.client
                    .store()
                    .read_blob(blob, at, &mut self.out[start..])
                    .map_err(BrokenOff::Vanished)?;
                at += most as u64;
            }
        }
        self.client.downloaded(blobs);
        self.link.write(&self.out).await?;
        frame::reuse(&mut self.out);
        Ok(())
    }
}

/// Lets a client act. A disk may be slow: others are served meanwhile.
async fn act<T: Send + 'static>(
    mut client: Client,
    is_slow: bool,
    act: impl FnOnce(&mut Client) -> T + Send + 'static,
) -> Result<(Client, T), BrokenOff> {
    let act = move || {
        let done = act(&mut client);
        (client, done)
    };
    match is_slow {
        true => spawn_blocking(act).await.map_err(BrokenOff::Disk),
        false => Ok(act()),
    }
}

/// Done when the client has gone. What it sends meanwhile is kept; beyond [`READ_AHEAD`] nobody
/// looks any more.
async fn hung_up<L: Link>(link: &mut L, decoder: &mut Decoder) -> io::Result<()> {
    while decoder.buffered() < READ_AHEAD {
        if link.read(decoder.incoming()).await? == 0 {
            return Ok(());
        }
    }
    pending().await
}

async fn drained(draining: &mut watch::Receiver<bool>) {
    // An error: the server is gone altogether.
    drop(draining.wait_for(|draining| *draining).await);
}
