//! Taking a carry in, from a file or a pipe: each image is a layer whose runs come off the stream
//! while it is walked. What was decoded is kept until the store's workers have read it, which is a
//! bounded number of pieces.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_store::source::{LayerRun, LayerSource};

use super::ORIGIN_LABEL;
use super::record::{CarriedImage, Header, Record, RecordBody};
use crate::error::{Context, Error, Result};
use crate::format::Format;
use crate::import::{Body, CarriedBase, Found, Generation, NewContent};
use crate::verify::{Compare, Replay};

/// Bytes read from the file or pipe at once.
const READ_BYTES: usize = 1 << 20;

/// Looks at a carry; `-` is standard input.
pub fn look(path: &Path) -> Result<Found> {
    let is_pipe = path.as_os_str() == "-";
    let mut source: Box<dyn Read + Send> = if is_pipe {
        Box::new(BufReader::with_capacity(READ_BYTES, io::stdin()))
    } else {
        Box::new(open(path)?)
    };
    let header = Header::read(&mut *source)?;
    let count = header.snapshots.iter().map(|snapshot| snapshot.images.len()).sum();
    let stream = Arc::new(Mutex::new(Stream { source, position: 0, next: 0, count, records: 0 }));
    let mut generations = Vec::new();
    let mut number = 0;
    let mut base = None;
    for (at, snapshot) in header.snapshots.iter().enumerate() {
        let mut generation = Generation::new(format!("{}@{}", snapshot.name, snapshot.number));
        generation.memory_layout = snapshot.memory_layout.clone();
        generation.vmm = snapshot.vmm.clone();
        generation.labels = snapshot.labels.clone();
        generation.labels.insert(ORIGIN_LABEL.to_owned(), snapshot.uuid.to_string());
        let before = at.checked_sub(1).and_then(|at| header.snapshots.get(at));
        if at == 0 {
            base = snapshot.base.map(|uuid| CarriedBase {
                uuid,
                images: snapshot
                    .images
                    .iter()
                    .filter(|image| image.is_changes)
                    .map(|image| (image.image.clone(), image.base_digest.clone()))
                    .collect(),
            });
        } else if snapshot.base.is_some() && snapshot.base != before.map(|before| before.uuid) {
            return Err(Error::corrupt(format!(
                "snapshot {} of the carry is not over the one before it",
                snapshot.uuid
            )));
        }
        for image in &snapshot.images {
            let layer = Arc::new(CarriedLayer {
                image: image.clone(),
                number,
                stream: Arc::clone(&stream),
                waiting: Mutex::new(BTreeMap::new()),
            });
            let replay: Option<Box<dyn Replay>> = if is_pipe {
                None
            } else {
                Some(Box::new(CarryReplay { path: path.to_owned(), number, image: image.clone() }))
            };
            let body = if image.is_changes { Body::Changes(layer) } else { Body::Whole(layer) };
            generation.images.push(NewContent { image: image.image.clone(), body, replay });
            number += 1;
        }
        generations.push(generation);
    }
    Ok(Found {
        format: Format::Carry,
        version: "1".to_owned(),
        generations,
        notes: Vec::new(),
        is_whole: true,
        base,
    })
}

fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).context(|| format!("cannot open {}", path.display()))?;
    Ok(BufReader::with_capacity(READ_BYTES, file))
}

/// What is left of the carry.
struct Stream {
    source: Box<dyn Read + Send>,
    position: u64,
    /// The image whose records come next.
    next: usize,
    count: usize,
    records: u64,
}

impl Stream {
    fn record(&mut self) -> Result<Record> {
        let record = Record::read(&mut *self.source, &mut self.position)?;
        self.records += 1;
        Ok(record)
    }

    /// After the last image's records the end must come, so that a carry that was cut is noticed
    /// before its last snapshot is published.
    fn end_image(&mut self) -> Result<()> {
        self.next += 1;
        if self.next < self.count {
            return Ok(());
        }
        let records = self.records;
        match self.record()?.body {
            RecordBody::End(count) if count == records => Ok(()),
            other => Err(Error::corrupt(format!(
                "the carry ends with {other:?} after {records} records"
            ))),
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("position", &self.position).finish_non_exhaustive()
    }
}

/// An image of a carry.
#[derive(Debug)]
struct CarriedLayer {
    image: CarriedImage,
    number: usize,
    stream: Arc<Mutex<Stream>>,
    /// Decoded runs by their offsets, each with how much of it was not read yet.
    waiting: Mutex<BTreeMap<u64, (usize, Vec<u8>)>>,
}

/// Checks that records come in order, and cover everything unless they are changes.
struct Cover {
    size_bytes: u64,
    is_changes: bool,
    end: u64,
}

impl Cover {
    fn new(image: &CarriedImage) -> Cover {
        Cover { size_bytes: image.size_bytes, is_changes: image.is_changes, end: 0 }
    }

    /// The range of a record, cut to the image's length.
    fn next(&mut self, offset: u64, len: u64) -> Result<Range<u64>> {
        let in_order = if self.is_changes { offset >= self.end } else { offset == self.end };
        let end = offset.saturating_add(len);
        if !in_order || end > self.size_bytes.next_multiple_of(BLOCK_BYTES_U64) {
            return Err(Error::corrupt(format!(
                "a record of bytes {offset} to {end}; expected from {} to at most {}",
                self.end, self.size_bytes
            )));
        }
        self.end = end;
        Ok(offset..end.min(self.size_bytes))
    }

    fn finish(&self) -> Result<()> {
        if !self.is_changes && self.end < self.size_bytes {
            return Err(Error::corrupt(format!(
                "the image ends at byte {}; expected {}",
                self.end, self.size_bytes
            )));
        }
        Ok(())
    }
}

impl CarriedLayer {
    fn walk(&self, visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>) -> Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if stream.next != self.number {
            return Err(Error::corrupt("the images of a carry are read in their order, and once"));
        }
        let mut cover = Cover::new(&self.image);
        let passed = |error| Error::io("the store did not take it", error);
        loop {
            let record = stream.record()?;
            match record.body {
                RecordBody::Data(bytes) => {
                    let range = cover.next(record.offset, bytes.len() as u64)?;
                    let len = usize::try_from(range.end - range.start).unwrap_or(bytes.len());
                    let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    waiting.insert(range.start, (len, bytes));
                    drop(waiting);
                    visit(range, LayerRun::Data).map_err(passed)?;
                }
                RecordBody::Zero(len) => {
                    visit(cover.next(record.offset, len)?, LayerRun::Zero).map_err(passed)?;
                }
                RecordBody::ImageEnd => break,
                RecordBody::End(_) => return Err(Error::corrupt("the carry ends within an image")),
            }
        }
        cover.finish()?;
        stream.end_image()
    }
}

impl LayerSource for CarriedLayer {
    fn size_bytes(&self) -> u64 {
        self.image.size_bytes
    }

    fn label(&self) -> String {
        format!("{} of the carry", self.image.image)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let found = waiting.range_mut(..=offset).next_back();
        let part = found.and_then(|(&start, (left, bytes))| {
            let from = usize::try_from(offset - start).ok()?;
            buf.copy_from_slice(bytes.get(from..from.checked_add(buf.len())?)?);
            *left = left.saturating_sub(buf.len());
            Some((start, *left))
        });
        match part {
            None => Err(io::Error::other(format!("byte {offset} was read already"))),
            Some((start, 0)) => {
                waiting.remove(&start);
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        Ok(self.walk(visit)?)
    }
}

/// An image of a carry that is a file, read again from the file's beginning.
#[derive(Debug)]
struct CarryReplay {
    path: PathBuf,
    number: usize,
    image: CarriedImage,
}

impl Replay for CarryReplay {
    fn replay(&self, compare: &mut Compare<'_>) -> Result<()> {
        let mut source = open(&self.path)?;
        Header::read(&mut source)?;
        let (mut number, mut position, mut end) = (0, 0, 0);
        compare.size(self.image.size_bytes)?;
        loop {
            let record = Record::read(&mut source, &mut position)?;
            let is_ours = number == self.number;
            let before = end..record.offset;
            match record.body {
                RecordBody::ImageEnd if is_ours => break,
                RecordBody::ImageEnd => number += 1,
                RecordBody::Data(bytes) if is_ours => {
                    compare.as_before(before)?;
                    compare.bytes(record.offset, &bytes)?;
                    end = record.offset + bytes.len() as u64;
                }
                RecordBody::Zero(len) if is_ours => {
                    compare.as_before(before)?;
                    compare.zeros(record.offset..record.offset + len)?;
                    end = record.offset + len;
                }
                RecordBody::End(_) => return Err(Error::corrupt("the carry ends too early")),
                RecordBody::Data(_) | RecordBody::Zero(_) => {}
            }
        }
        compare.as_before(end..self.image.size_bytes.max(end))
    }
}
