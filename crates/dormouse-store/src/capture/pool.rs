//! The workers: reading and hashing pieces, compressing frames.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select_biased, unbounded};
use dormouse_image::block::BLOCK_BYTES;
use dormouse_image::codec::{Codec, Encoder};
use dormouse_image::digest::{Digest, DomainKey};
use dormouse_image::pack::EncodedFrame;
use dormouse_image::zero::is_zero;

use crate::error::{Error, ErrorKind, Result};
use crate::progress::Job;
use crate::source::{EndCheck, ReadPiece};

/// Bytes read at once: small enough to be hashed out of the second-level cache.
pub(crate) const PIECE_BYTES: usize = 512 << 10;

/// Pieces in flight for each thread.
pub(crate) const BUFFERS_PER_THREAD: usize = 6;

/// Frames being compressed for each thread.
pub(crate) const FRAMES_PER_THREAD: usize = 32;

/// How often a waiting capture looks whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(50);

/// A stretch of an image. The last block of an image is padded with zeros.
pub(super) struct Piece {
    pub(super) first_block: u64,
    pub(super) blocks: u64,
    pub(super) body: PieceBody,
}

pub(super) enum PieceBody {
    /// Nothing was there to read.
    Hole,

    /// Zeros, known without reading.
    Zero,

    /// Bytes, with a digest for each block that is not zero.
    Data { bytes: Vec<u8>, digests: Vec<Option<Digest>> },

    /// The end of the source, with its length. It comes when all of it was read, so this is when
    /// to look whether it changed meanwhile.
    End { size_bytes: u64, check: EndCheck },
}

/// Work for a worker.
pub(super) enum Task {
    /// Test and hash a piece, after reading it if it has not been read yet.
    Hash {
        number: u64,
        first_block: u64,
        bytes: Vec<u8>,
        /// Whom to read from; `offset` and `len` are in bytes, the rest of `bytes` is padding.
        read: Option<(Arc<dyn ReadPiece>, u64, usize)>,
    },

    /// Compress blocks into a frame.
    Compress { number: u64, blocks: Vec<u8>, digests: Vec<Digest> },
}

/// What workers and feeders hand to the sequencer.
pub(super) enum Done {
    /// The piece with this number.
    Piece { number: u64, piece: Piece },

    /// The frame with this number.
    Compressed { number: u64, frame: EncodedFrame },

    /// Something failed.
    Failed(Error),
}

/// The workers and the ways to them.
pub(super) struct Pool {
    hash: Sender<Task>,
    compress: Sender<Task>,
    done: Receiver<Done>,
    done_sender: Sender<Done>,
    buffers: Sender<Vec<u8>>,
    free_buffers: Receiver<Vec<u8>>,
    workers: Vec<thread::JoinHandle<()>>,
}

/// What a feeder needs of the pool.
pub(super) struct FeedLine {
    pub(super) hash: Sender<Task>,
    pub(super) done: Sender<Done>,
    pub(super) buffers: Receiver<Vec<u8>>,
}

impl Pool {
    pub(super) fn start(threads: usize, key: &DomainKey, codec: Codec) -> Result<Pool> {
        let buffer_count = threads * BUFFERS_PER_THREAD;
        let (hash, hash_tasks) = bounded(buffer_count);
        let (compress, compress_tasks) = unbounded();
        let (done_sender, done) = unbounded();
        let (buffers, free_buffers) = bounded(buffer_count);
        for _ in 0..buffer_count {
            buffers.send(Vec::new()).map_err(|_| stopped())?;
        }
        let mut workers = Vec::new();
        for number in 0..threads {
            let worker = Worker {
                key: key.clone(),
                encoder: Encoder::new(codec)
                    .map_err(|error| Error::image("cannot start compressing", error))?,
                done: done_sender.clone(),
            };
            let (hash_tasks, compress_tasks) = (hash_tasks.clone(), compress_tasks.clone());
            let handle = thread::Builder::new()
                .name(format!("capture-{number}"))
                .spawn(move || worker.run(&hash_tasks, &compress_tasks))
                .map_err(|error| Error::io("cannot start a thread", error))?;
            workers.push(handle);
        }
        Ok(Pool { hash, compress, done, done_sender, buffers, free_buffers, workers })
    }

    pub(super) fn feed_line(&self) -> FeedLine {
        FeedLine {
            hash: self.hash.clone(),
            done: self.done_sender.clone(),
            buffers: self.free_buffers.clone(),
        }
    }

    pub(super) fn send(&self, task: Task) -> Result<()> {
        self.compress.send(task).map_err(|_| stopped())
    }

    /// Gives a buffer back to the feeder.
    pub(super) fn recycle(&self, bytes: Vec<u8>) {
        // The pool holds as many buffers as the line has places, so this never blocks or fails.
        let _ = self.buffers.try_send(bytes);
    }

    /// The next thing that is done, unless the job is cancelled meanwhile.
    pub(super) fn wait(&self, job: Job<'_>) -> Result<Done> {
        loop {
            job.check()?;
            match self.done.recv_timeout(CANCEL_POLL) {
                Ok(done) => return Ok(done),
                // A worker ends before the pool only if it panicked, and what it had is lost.
                Err(RecvTimeoutError::Timeout) => {
                    if self.workers.iter().any(thread::JoinHandle::is_finished) {
                        return Err(stopped());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(stopped()),
            }
        }
    }
}

struct Worker {
    key: DomainKey,
    encoder: Encoder,
    done: Sender<Done>,
}

impl Worker {
    /// Works until the pool is dropped. Frames go first, because they hold more memory.
    fn run(mut self, hash: &Receiver<Task>, compress: &Receiver<Task>) {
        loop {
            let task = select_biased! {
                recv(compress) -> task => task,
                recv(hash) -> task => task,
            };
            let Ok(task) = task else { return };
            let done = self.work(task).unwrap_or_else(Done::Failed);
            if self.done.send(done).is_err() {
                return;
            }
        }
    }

    fn work(&mut self, task: Task) -> Result<Done> {
        match task {
            Task::Hash { number, first_block, mut bytes, read } => {
                if let Some((reader, offset, len)) = read {
                    reader.read_piece(&mut bytes[..len], offset)?;
                    bytes[len..].fill(0);
                }
                let (whole, _) = bytes.as_chunks::<BLOCK_BYTES>();
                let mut digests: Vec<Option<Digest>> = vec![None; whole.len()];
                let data = whole.iter().zip(&mut digests).filter(|(block, _)| !is_zero(*block));
                self.key.digest_each(data, |place, digest| *place = Some(digest));
                let blocks = digests.len() as u64;
                let body = PieceBody::Data { bytes, digests };
                Ok(Done::Piece { number, piece: Piece { first_block, blocks, body } })
            }
            Task::Compress { number, blocks, digests } => {
                let frame = EncodedFrame::encode(&mut self.encoder, &blocks, digests)
                    .map_err(|error| Error::image("cannot compress", error))?;
                Ok(Done::Compressed { number, frame })
            }
        }
    }
}

pub(super) fn stopped() -> Error {
    Error::new(ErrorKind::Io, "a worker thread stopped")
}
