//! Memory of this process that a pager of it serves, and the image that it comes from.

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Result;
use dormouse_image::block::BLOCK_BYTES;
use dormouse_live::pages::PAGE_BYTES;
use dormouse_serve::uffd::handshake::{Handshake, Region, SocketEnd};
use dormouse_serve::uffd::{
    Content, Effort, MemorySource, Pager, Piece, SourceError, Vm, VmConfig,
};
use dormouse_store::reader::{self, ImageReader, PieceContent};
use dormouse_sys::mapping::{Mapping, PageSize};
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{Features, Register, Userfaultfd};

/// An image of the store, frame by frame.
#[derive(Debug)]
pub(super) struct Stored(pub(super) ImageReader);

impl MemorySource for Stored {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn pieces(
        &self,
        range: Range<u64>,
        effort: Effort,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), SourceError> {
        let effort = match effort {
            Effort::All => reader::Effort::All,
            Effort::Block(at) => reader::Effort::Block(at),
            Effort::AtHand => reader::Effort::Decoded,
        };
        let mut found = Vec::new();
        self.0.pieces(range, effort, &mut found)?;
        pieces.extend(found.into_iter().map(|piece| {
            let content = match piece.content {
                PieceContent::Zero => Content::Zeros(piece.len),
                PieceContent::Frame { frame, blocks } => Content::Bytes {
                    keeper: frame,
                    range: blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES,
                },
            };
            Piece { at: piece.at, content }
        }));
        Ok(())
    }
}

/// Memory that is missing, and its descriptor.
pub(super) fn observed(bytes: u64, mode: Register) -> Result<(Mapping, Userfaultfd)> {
    let memory = Mapping::anonymous(usize::try_from(bytes)?, PageSize::Small)?;
    let uffd = Userfaultfd::open(Features::EVENT_REMOVE)?;
    uffd.register(&memory.addresses(), mode)?;
    Ok((memory, uffd))
}

/// A guest: the thread that touches its memory.
pub(super) struct Guest {
    pub(super) memory: Mapping,
    pub(super) vm: Arc<Vm>,
    pub(super) copy: Userfaultfd,
    _socket: UnixStream,
}

impl Guest {
    pub(super) fn wake(
        pager: &Pager,
        source: Arc<dyn MemorySource>,
        config: VmConfig,
    ) -> Result<Guest> {
        let size = source.size_bytes();
        let (memory, uffd) = observed(size, Register::Missing)?;
        let copy = Userfaultfd::from_fd(uffd.as_fd().try_clone_to_owned()?)?;
        let address = memory.addresses().start;
        let handshake = Handshake {
            regions: vec![Region { address, size, offset: 0, page_bytes: PAGE_BYTES }],
            uffd,
            features: Features::EVENT_REMOVE,
            others: Vec::new(),
            peer: Peer::by_pid(std::process::id())?,
            socket_end: SocketEnd::VmGone,
        };
        let (ours, theirs) = UnixStream::pair()?;
        let vm = pager.serve(handshake, ours, source, config, |_, _| {})?;
        Ok(Guest { memory, vm, copy, _socket: theirs })
    }

    /// Touches pages one after the other; seconds.
    pub(super) fn read(&self, pages: impl Iterator<Item = u64>) -> Result<f64> {
        let begin = Instant::now();
        for page in pages {
            std::hint::black_box(self.memory.bytes()[at(page)?].load(Ordering::Relaxed));
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Touches them, and tells how long each took.
    pub(super) fn latencies(&self, pages: &[u64], writes: bool) -> Result<Vec<f64>> {
        latencies(&self.memory, pages, writes)
    }
}

/// How long each page's first access took.
pub(super) fn latencies(memory: &Mapping, pages: &[u64], writes: bool) -> Result<Vec<f64>> {
    let mut times = Vec::with_capacity(pages.len());
    for &page in pages {
        let byte = &memory.bytes()[at(page)?];
        let begin = Instant::now();
        if writes {
            byte.store(1, Ordering::Relaxed);
        } else {
            std::hint::black_box(byte.load(Ordering::Relaxed));
        }
        times.push(begin.elapsed().as_secs_f64());
    }
    Ok(times)
}

fn at(page: u64) -> Result<usize> {
    Ok(usize::try_from(page * PAGE_BYTES)?)
}
