//! Builds for E2B: a full one, or one for each generation of a line.
//!
//! The id of a build is its snapshot's UUID, never the one that it was imported under: what another
//! header refers to in that build lies elsewhere than in ours.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};

use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::{ExportTarget, ImageReader, NewFolder, private_folder};
use dormouse_store::store::Snapshot;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::build::{Device, suffix};
use super::frames::{Frame, encode};
use super::header::{BuildEntry, Header};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{ExportReport, ExportRequest, Line};
use crate::format::Format;
use crate::page_map::{PAGE_BYTES, PageMap};
use crate::rank;
use crate::records::Metadata;
use crate::replay::DataCodec;
use crate::wrenn::write_file;

/// Bytes of a frame, as E2B has them by default.
const FRAME_BYTES: usize = 2 << 20;

/// The longest `metadata.json` of ours that is written again.
const METADATA_BYTES_MAX: u64 = 64 << 20;

/// What is known of a device's builds so far.
struct Written {
    image: ImageReader,
    map: PageMap,
    entries: BTreeMap<Uuid, BuildEntry>,
}

/// Writes `dir/BUILD/…` for every snapshot of the line.
pub fn export(
    line: &Line,
    dir: &std::path::Path,
    request: &ExportRequest,
    job: Job<'_>,
) -> Result<ExportReport> {
    let version = match request.version.as_deref() {
        None | Some("3") => 3,
        Some("5") => 5,
        Some(other) => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("E2B's headers are written in version 3 or 5, not {other}"),
            ));
        }
    };
    let codec = request.data_codec.unwrap_or(DataCodec::Plain);
    if version == 3 && codec != DataCodec::Plain {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "headers of version 3 cannot say that data is compressed: take version=5",
        ));
    }
    let new = NewFolder::create(dir)?;
    let mut report = ExportReport::new(Format::E2b, version.to_string(), dir);
    let mut devices: BTreeMap<Device, Written> = BTreeMap::new();
    for (number, snapshot) in line.snapshots().iter().enumerate() {
        let build = line.build_id(number, request);
        let metadata = Metadata {
            version,
            block_bytes: BLOCK_BYTES_U64,
            size_bytes: 0,
            generation: number as u64,
            build,
            base: line.build_id(0, request),
        };
        let folder = new.path().join(build.to_string());
        private_folder(&folder)?;
        let in_report = |name: &str| format!("{build}/{name}");
        for device in Device::ALL {
            let name = device.image()?;
            if snapshot.manifest().image(&name).is_none() {
                devices.remove(&device);
                continue;
            }
            let image = snapshot.image(&name)?;
            let written = device_files(
                &folder,
                device,
                image,
                &metadata,
                codec,
                devices.remove(&device),
                job,
            )?;
            devices.insert(device, written);
            let data = format!("{}{}", device.object(), suffix(codec));
            for name in [data, format!("{}.header", device.object())] {
                if folder.join(&name).exists() {
                    report.wrote(&in_report(&name), new.path())?;
                }
            }
        }
        let state = ImageName::State(Name::new("vmstate")?);
        if snapshot.manifest().image(&state).is_some() {
            let path = folder.join("snapfile");
            snapshot.image(&state)?.export(&path, ExportTarget::New, job)?;
            report.wrote(&in_report("snapfile"), new.path())?;
        }
        let json = metadata_json(snapshot, build)?;
        write_file(&folder.join("metadata.json"), &mut |sink| {
            sink.write_all(&json).context(|| "cannot write metadata.json".to_owned())
        })?;
        report.wrote(&in_report("metadata.json"), new.path())?;
        report.skipped(
            snapshot.manifest(),
            &["memory", "disk/root", "state/vmstate", "state/metadata"],
        );
        fs::File::open(&folder)
            .and_then(|folder| folder.sync_all())
            .context(|| format!("cannot sync {}", folder.display()))?;
    }
    new.publish()?;
    Ok(report)
}

fn device_files(
    folder: &std::path::Path,
    device: Device,
    image: ImageReader,
    metadata: &Metadata,
    codec: DataCodec,
    before: Option<Written>,
    job: Job<'_>,
) -> Result<Written> {
    let build = metadata.build;
    let (map, mut entries) = match before {
        None => (rank::full(&image, build)?, BTreeMap::new()),
        Some(before) => (rank::over(&image, &before.image, &before.map, build)?, before.entries),
    };
    job.progress.begin("export", None);
    let path = folder.join(format!("{}{}", device.object(), suffix(codec)));
    let mut entry = BuildEntry { size_bytes: 0, sha256: None, codec, frames: Vec::new() };
    // No data, no object.
    if rank::runs_of(&map, build).next().is_some() {
        write_file(&path, &mut |sink| {
            let mut object = Object::new(sink, codec);
            rank::write_data(&image, &map, build, &mut object, job)?;
            entry = object.finish()?;
            Ok(())
        })?;
        if codec != DataCodec::Plain {
            let sidecar =
                folder.join(format!("{}{}.uncompressed-size", device.object(), suffix(codec)));
            write_file(&sidecar, &mut |sink| {
                write!(sink, "{}", entry.size_bytes).context(|| "cannot write a length".to_owned())
            })?;
        }
        entries.insert(build, entry);
    }
    let header = Header {
        metadata: Metadata { size_bytes: image.size_bytes(), ..*metadata },
        builds: if metadata.version == 5 { needed(&entries, &map) } else { BTreeMap::new() },
        map,
        trailing_bytes: 0,
    };
    let path = folder.join(format!("{}.header", device.object()));
    write_file(&path, &mut |sink| {
        sink.write_all(&header.encode()?).context(|| "cannot write a header".to_owned())
    })?;
    Ok(Written { image, map: header.map, entries })
}

/// Entries of the builds that a map refers to, each with the frames that it needs.
fn needed(entries: &BTreeMap<Uuid, BuildEntry>, map: &PageMap) -> BTreeMap<Uuid, BuildEntry> {
    let mut needed = BTreeMap::new();
    for &build in map.builds() {
        let Some(entry) = entries.get(&build) else { continue };
        let mut ranges: Vec<(u64, u64)> = rank::runs_of(map, build)
            .filter_map(|run| {
                let start = u64::from(run.place?.page) * PAGE_BYTES;
                Some((start, start + run.pages * PAGE_BYTES))
            })
            .collect();
        ranges.sort_unstable();
        let mut next = 0;
        let frames = entry
            .frames
            .iter()
            .filter(|frame| {
                let end = frame.decoded_at + u64::from(frame.decoded_bytes);
                while ranges.get(next).is_some_and(|range| range.1 <= frame.decoded_at) {
                    next += 1;
                }
                ranges.get(next).is_some_and(|range| range.0 < end)
            })
            .copied()
            .collect();
        needed.insert(build, BuildEntry { frames, ..entry.clone() });
    }
    needed
}

/// A data object while it is written: plain, or in frames.
struct Object<'a> {
    sink: &'a mut dyn Write,
    codec: DataCodec,
    hash: Sha256,
    frame: Vec<u8>,
    frames: Vec<Frame>,
    decoded: u64,
    encoded: u64,
}

impl<'a> Object<'a> {
    fn new(sink: &'a mut dyn Write, codec: DataCodec) -> Object<'a> {
        Object {
            sink,
            codec,
            hash: Sha256::new(),
            frame: Vec::new(),
            frames: Vec::new(),
            decoded: 0,
            encoded: 0,
        }
    }

    fn end_frame(&mut self) -> Result<()> {
        let bytes = encode(self.codec, &self.frame)?;
        self.sink.write_all(&bytes).context(|| "cannot write a data file".to_owned())?;
        let too_long = |_| Error::corrupt("a frame over 4 GiB");
        let frame = Frame {
            decoded_at: self.decoded,
            encoded_at: self.encoded,
            decoded_bytes: u32::try_from(self.frame.len()).map_err(too_long)?,
            encoded_bytes: u32::try_from(bytes.len()).map_err(too_long)?,
        };
        self.decoded += self.frame.len() as u64;
        self.encoded += bytes.len() as u64;
        self.frames.push(frame);
        self.frame.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<BuildEntry> {
        if !self.frame.is_empty() {
            self.end_frame()?;
        }
        Ok(BuildEntry {
            size_bytes: self.decoded,
            sha256: Some(self.hash.finalize().into()),
            codec: self.codec,
            frames: self.frames,
        })
    }
}

impl Write for Object<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.hash.update(buf);
        if self.codec == DataCodec::Plain {
            self.sink.write_all(buf)?;
            self.decoded += buf.len() as u64;
            return Ok(buf.len());
        }
        let mut rest = buf;
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(rest.len().min(FRAME_BYTES - self.frame.len()));
            self.frame.extend_from_slice(head);
            rest = tail;
            if self.frame.len() == FRAME_BYTES {
                self.end_frame()?;
            }
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// `metadata.json` as it came, with the new build's id; or the least that E2B reads.
fn metadata_json(snapshot: &Snapshot, build: Uuid) -> Result<Vec<u8>> {
    let manifest = snapshot.manifest();
    let name = ImageName::State(Name::new("metadata")?);
    let known = match manifest.image(&name) {
        Some(entry) if entry.size_bytes <= METADATA_BYTES_MAX => {
            let mut bytes = vec![0; usize::try_from(entry.size_bytes).unwrap_or(0)];
            snapshot.image(&name)?.read_at(&mut bytes, 0)?;
            serde_json::from_slice::<serde_json::Value>(&bytes).ok()
        }
        _ => None,
    };
    let mut json = known.filter(serde_json::Value::is_object).unwrap_or_else(|| {
        serde_json::json!({
            "version": 2,
            "template": {
                "kernel_version": manifest.labels.get("e2b.kernel-version"),
                "firecracker_version": manifest.vmm.version,
            },
        })
    });
    if !json["template"].is_object() {
        json["template"] = serde_json::json!({});
    }
    json["template"]["build_id"] = serde_json::Value::from(build.to_string());
    serde_json::to_vec(&json)
        .map_err(|error| Error::corrupt(format!("cannot write metadata.json: {error}")))
}
