//! Bytes of blobs on the stream, compressed: for clients that insist.
//!
//! A sender that does not keep to the rules loses its connection: nobody knows where its next
//! request would begin.

use std::io;

use super::{BrokenOff, CHUNK, Connection, Link};
use crate::shard::protocol::frame;
use crate::shard::protocol::reply::Reply;
use crate::shard::protocol::zstd::{MAX_CHUNK, Packer, Unpacker};
use crate::shard::store;

impl<L: Link> Connection<L> {
    /// As [`Connection::upload`], of compressed bytes.
    pub(super) async fn upload_packed(
        &mut self,
        go_ahead: Reply,
        blobs: &[store::Payload],
    ) -> Result<(), BrokenOff> {
        self.answer(&go_ahead).await?;
        let (mut unpacker, mut chunk) = (Unpacker::default(), Vec::new());
        let mut stored = Ok(());
        for blob in blobs {
            let mut at = 0;
            while at < blob.size {
                self.receive_chunk(&mut chunk).await?;
                unpacker.feed(&chunk);
                while let Some(block) = unpacker.next_block()? {
                    let length = block.len() as u64;
                    if length > blob.size - at {
                        return Err(BrokenOff::Overrun(blob.id));
                    }
                    if stored.is_ok() {
                        stored = self.client.store().write_blob(blob, at, block);
                    }
                    at += length;
                    // A chunk can become gigabytes; others are served in between.
                    tokio::task::yield_now().await;
                }
            }
            if unpacker.is_in_midst() {
                return Err(BrokenOff::Overrun(blob.id));
            }
        }
        let reply = self.client.uploaded(go_ahead, blobs, stored);
        Ok(self.answer(&reply).await?)
    }

    /// As [`Connection::download`], with the bytes as compressed chunks.
    pub(super) async fn download_packed(
        &mut self,
        reply: &Reply,
        blobs: &[store::Payload],
    ) -> Result<(), BrokenOff> {
        reply.encode(&mut self.out);
        let mut packer = Packer::default();
        let mut bytes = Vec::new();
        for blob in blobs {
            let mut at = 0;
            while at < blob.size {
                let left = usize::try_from(blob.size - at).unwrap_or(usize::MAX);
                bytes.resize(left.min(Packer::MOST), 0);
                self.client
                    .store()
                    .read_blob(blob, at, &mut bytes)
                    .map_err(BrokenOff::Vanished)?;
                packer.chunk(&bytes, &mut self.out);
                at += bytes.len() as u64;
                if self.out.len() >= CHUNK {
                    self.link.write(&self.out).await?;
                    self.out.clear();
                }
            }
        }
        self.client.downloaded(blobs);
        self.link.write(&self.out).await?;
        frame::reuse(&mut self.out);
        Ok(())
    }

    async fn receive_chunk(&mut self, chunk: &mut Vec<u8>) -> Result<(), BrokenOff> {
        let mut length = [0; 8];
        self.receive_raw(&mut length).await?;
        let length = u64::from_le_bytes(length);
        if length == 0 || length > MAX_CHUNK {
            return Err(BrokenOff::Chunk(length));
        }
        chunk.resize(usize::try_from(length).unwrap_or(0), 0);
        Ok(self.receive_raw(chunk).await?)
    }

    /// Fills `into` with bytes that are not framed.
    async fn receive_raw(&mut self, into: &mut [u8]) -> io::Result<()> {
        let ahead = self.decoder.take_raw(into.len() as u64);
        let mut at = ahead.len();
        into[..at].copy_from_slice(ahead);
        while at < into.len() {
            match self.link.read_slice(&mut into[at..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => at += count,
            }
        }
        Ok(())
    }
}
