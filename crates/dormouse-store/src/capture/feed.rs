//! The feeder: walks a source and hands out pieces in the order of the image, holes unread.

use std::io::Read;
use std::sync::Arc;

use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64, IMAGE_BYTES_MAX, blocks_in};
use dormouse_sys::sparse::data_extents;

use super::pool::{Done, FeedLine, PIECE_BYTES, Piece, PieceBody, Task, stopped};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::{
    Body, EndCheck, LayerPiece, LayerRun, LayerSource, OpenSource, ReadPiece, WriteSource, Written,
};

const PIECE_BYTES_U64: u64 = PIECE_BYTES as u64;

/// Feeds `source` on a thread of its own, which ends with the source, with an error or when the
/// capture is dropped. A read from a pipe that nobody writes to is left behind.
pub(super) fn feed(source: OpenSource, line: FeedLine) -> Result<()> {
    std::thread::Builder::new()
        .name("capture-feed".to_owned())
        .spawn(move || {
            let mut feeder = Feeder { line, number: 0 };
            if let Err(error) = feeder.run(source) {
                // Nobody listens any more if the capture was dropped.
                let _ = feeder.line.done.send(Done::Failed(error));
            }
        })
        .map(drop)
        .map_err(|error| Error::io("cannot start a thread", error))
}

struct Feeder {
    line: FeedLine,
    number: u64,
}

impl Feeder {
    fn run(&mut self, source: OpenSource) -> Result<()> {
        let label = source.label;
        let mut check = EndCheck::Nothing;
        let size_bytes = match source.body {
            Body::Stream(stream) => self.stream(&label, stream)?,
            Body::Written(source) => self.written(&label, source)?,
            Body::Layer(layer) => {
                let bytes = self.layer(&label, &layer)?;
                check = EndCheck::Layer(layer);
                bytes
            }
            Body::Seekable { bytes, reader, file } => {
                if bytes > IMAGE_BYTES_MAX {
                    return Err(too_long(&label));
                }
                match file {
                    None => self.data(&reader, 0..bytes, bytes)?,
                    Some(unchanged) => {
                        let file = unchanged.file();
                        let mut at = 0;
                        for extent in data_extents(file, 0..bytes) {
                            let extent =
                                extent.context(|| format!("cannot look for holes in {label}"))?;
                            // A block that is data in part is data.
                            let start = (extent.start / BLOCK_BYTES_U64 * BLOCK_BYTES_U64).max(at);
                            let end = extent.end.next_multiple_of(BLOCK_BYTES_U64).min(bytes);
                            if start >= end {
                                continue;
                            }
                            self.hole(at, start)?;
                            self.data(&reader, start..end, bytes)?;
                            at = end;
                        }
                        self.hole(at, bytes)?;
                        check = EndCheck::File(unchanged);
                    }
                }
                bytes
            }
        };
        self.send(Piece {
            first_block: blocks_in(size_bytes),
            blocks: 0,
            body: PieceBody::End { size_bytes, check },
        })
    }

    fn hole(&mut self, start: u64, end: u64) -> Result<()> {
        self.unread(start, end, PieceBody::Hole)
    }

    /// Hands on a range in which there is nothing to read.
    fn unread(&mut self, start: u64, end: u64, body: PieceBody) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        let first_block = start / BLOCK_BYTES_U64;
        let blocks = blocks_in(end) - first_block;
        self.send(Piece { first_block, blocks, body })
    }

    /// The runs of a layer; between them it is as what lies below.
    fn layer(&mut self, label: &str, layer: &Arc<dyn LayerSource>) -> Result<u64> {
        let bytes = layer.size_bytes();
        if bytes > IMAGE_BYTES_MAX {
            return Err(too_long(label));
        }
        let reader: Arc<dyn ReadPiece> = Arc::new(LayerPiece(Arc::clone(layer)));
        let mut at = 0;
        let mut failed = None;
        let walked = layer.for_each_run(&mut |run, kind| {
            let step = self.hole(at, run.start).and_then(|()| match kind {
                LayerRun::Data => self.data(&reader, run.clone(), bytes),
                LayerRun::Zero => self.unread(run.start, run.end, PieceBody::Zero),
            });
            at = run.end;
            step.map_err(|error| {
                failed = Some(error);
                std::io::ErrorKind::Interrupted.into()
            })
        });
        match (failed, walked) {
            (Some(error), _) => return Err(error),
            (None, walked) => walked.context(|| format!("cannot walk {label}"))?,
        }
        self.hole(at, bytes)?;
        Ok(bytes)
    }

    /// Hands out a range for the workers to read; pieces end at multiples of their size, so that
    /// none lies across a leaf's border.
    fn data(
        &mut self,
        reader: &Arc<dyn ReadPiece>,
        range: std::ops::Range<u64>,
        size_bytes: u64,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / PIECE_BYTES_U64 + 1) * PIECE_BYTES_U64);
            let mut bytes = self.line.buffers.recv().map_err(|_| stopped())?;
            let len = usize::try_from(end.min(size_bytes) - at).map_err(|_| stopped())?;
            bytes.resize(len.next_multiple_of(BLOCK_BYTES), 0);
            self.hash(at / BLOCK_BYTES_U64, bytes, Some((Arc::clone(reader), at, len)))?;
            at = end;
        }
        Ok(())
    }

    fn stream(&mut self, label: &str, mut stream: Box<dyn Read + Send>) -> Result<u64> {
        let mut at = 0;
        loop {
            let mut bytes = self.line.buffers.recv().map_err(|_| stopped())?;
            bytes.resize(PIECE_BYTES, 0);
            let mut len = 0;
            while len < PIECE_BYTES {
                match stream.read(&mut bytes[len..]) {
                    Ok(0) => break,
                    Ok(read) => len += read,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Error::io(format!("cannot read {label}"), error)),
                }
            }
            if len > 0 {
                bytes.truncate(len.next_multiple_of(BLOCK_BYTES));
                bytes[len..].fill(0);
                self.hash(at / BLOCK_BYTES_U64, bytes, None)?;
                at += len as u64;
            }
            if at > IMAGE_BYTES_MAX {
                return Err(too_long(label));
            }
            if len < PIECE_BYTES {
                return Ok(at);
            }
        }
    }

    /// Pieces as they are written; between them nothing was.
    fn written(&mut self, label: &str, mut source: Box<dyn WriteSource>) -> Result<u64> {
        let mut at = 0;
        loop {
            let spare = self.line.buffers.recv().map_err(|_| stopped())?;
            let next = source.next(spare);
            match next.context(|| format!("{label} came to no end"))? {
                Written::Data { offset, bytes } => {
                    let len = bytes.len() as u64;
                    let is_sound = offset >= at
                        && len > 0
                        && offset.is_multiple_of(BLOCK_BYTES_U64)
                        && len.is_multiple_of(BLOCK_BYTES_U64)
                        && offset % PIECE_BYTES_U64 + len <= PIECE_BYTES_U64;
                    if !is_sound {
                        return Err(unsound(label, at, offset, len));
                    }
                    if offset > IMAGE_BYTES_MAX - len {
                        return Err(too_long(label));
                    }
                    self.hole(at, offset)?;
                    self.hash(offset / BLOCK_BYTES_U64, bytes, None)?;
                    at = offset + len;
                }
                Written::End { size_bytes } => {
                    if blocks_in(size_bytes) * BLOCK_BYTES_U64 < at {
                        return Err(unsound(label, at, size_bytes, 0));
                    }
                    if size_bytes > IMAGE_BYTES_MAX {
                        return Err(too_long(label));
                    }
                    self.hole(at, size_bytes)?;
                    return Ok(size_bytes);
                }
            }
        }
    }

    fn hash(
        &mut self,
        first_block: u64,
        bytes: Vec<u8>,
        read: Option<(Arc<dyn ReadPiece>, u64, usize)>,
    ) -> Result<()> {
        let task = Task::Hash { number: self.number, first_block, bytes, read };
        self.number += 1;
        self.line.hash.send(task).map_err(|_| stopped())
    }

    fn send(&mut self, piece: Piece) -> Result<()> {
        let number = self.number;
        self.number += 1;
        self.line.done.send(Done::Piece { number, piece }).map_err(|_| stopped())
    }
}

fn unsound(label: &str, at: u64, offset: u64, len: u64) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!(
            "{label} came to byte {at}, and then {len} bytes at {offset}; expected whole blocks behind it"
        ),
    )
}

fn too_long(label: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{label} has more than 16 TiB"))
}
