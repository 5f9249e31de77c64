//! `captured.json`: what a capture has that is durable, for the commit that takes it.
//!
//! The process that mounts holds what is named here as long as the file can be read, so whoever holds
//! it, too, and finds it unchanged afterwards may rely on it.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use anyhow::{Context, Result};
use dormouse_store::manifest::{Figures, RootRef};
use dormouse_store::name::{ImageName, SnapRef};
use dormouse_store::source::Staged;
use dormouse_store::store::Store;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::DESCRIPTION;
use crate::exit::{Fault, Kind};

const FORMAT: &str = "dormouse-capture";
const VERSION: u32 = 1;

/// The longest description that is read: of some thousand images, where a VM has a handful.
const DESCRIPTION_BYTES_MAX: u64 = 4 << 20;

/// What is told first, so that a later version's is refused before it is misunderstood.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

/// What a capture has; `docs/format.md` has the fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Captured {
    format: String,
    version: u32,

    /// The store's id.
    store: Uuid,

    /// The snapshot that it lies over, `NAME@N`.
    parent: Option<String>,

    /// Memory and states.
    pub(crate) images: Vec<CapturedImage>,
}

/// An image that was captured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CapturedImage {
    /// Which one.
    pub(crate) image: ImageName,

    /// The root of its map; none if it is all zero.
    root: Option<RootRef>,

    /// Its length.
    size_bytes: u64,

    /// What capturing it found and stored.
    figures: Figures,
}

/// How long a file counts as open whose last close has just returned.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The bytes of a description, of which a mount writes a few hundred for each image.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(DESCRIPTION_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > DESCRIPTION_BYTES_MAX {
        let message =
            format!("it has more than {DESCRIPTION_BYTES_MAX} bytes, so no mount wrote it");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(bytes)
}

fn read_once_whole(path: &Path) -> io::Result<Vec<u8>> {
    let begun = Instant::now();
    loop {
        match read_bounded(path) {
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
                    && begun.elapsed() < CLOSE_TIMEOUT =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// Whether a file of the capture failed: the description's error is then that file's.
fn not_stored(error: &io::Error) -> bool {
    let is = |number: Errno| error.raw_os_error() == Some(number.raw_os_error());
    is(Errno::NOSPC) || is(Errno::IO) || is(Errno::INVAL)
}

impl CapturedImage {
    pub(super) fn of(image: ImageName, staged: &Staged) -> CapturedImage {
        let reader = staged.image();
        let (root, size_bytes) = (reader.root(), reader.size_bytes());
        CapturedImage { image, root, size_bytes, figures: *staged.figures() }
    }

    /// The image, held by this process from now on.
    pub(crate) fn hold(&self, store: &Store) -> Result<Staged> {
        let label = format!("captured {}", self.image);
        Ok(store.staged_image(&label, self.root.as_ref(), self.size_bytes, self.figures)?)
    }
}

impl Captured {
    pub(super) fn new(store: Uuid, parent: Option<String>, images: Vec<CapturedImage>) -> Captured {
        Captured { format: FORMAT.to_owned(), version: VERSION, store, parent, images }
    }

    pub(super) fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads the description of the capture in `folder`, a folder of a mount of `store`.
    pub(crate) fn read(folder: &Path, store: &Store) -> Result<Captured> {
        let path = folder.join(DESCRIPTION);
        let bytes = read_once_whole(&path).map_err(|error| {
            let cannot = format!("cannot read {}", path.display());
            match error.raw_os_error() {
                Some(number) if number == Errno::BUSY.raw_os_error() => {
                    let message =
                        format!("a file in {} is open, or was not written", folder.display());
                    Fault::new(Kind::Busy, message).into()
                }
                _ if not_stored(&error) => anyhow::Error::from(error).context(format!(
                    "what was written to {} is not stored; the mount's log says why",
                    folder.display()
                )),
                _ => anyhow::Error::from(error).context(cannot),
            }
        })?;
        let no_capture = || format!("{} is no capture of a mount", folder.display());
        let head: Head = serde_json::from_slice(&bytes).with_context(no_capture)?;
        if head.format != FORMAT || head.version != VERSION {
            let message = format!(
                "{} has {} in version {}; this build knows {FORMAT} in version {VERSION}",
                path.display(),
                head.format,
                head.version
            );
            return Err(Fault::new(Kind::Unsupported, message).into());
        }
        let captured: Captured = serde_json::from_slice(&bytes).with_context(no_capture)?;
        if captured.store != store.id() {
            let message = format!("{} is of another store's mount", folder.display());
            return Err(Fault::new(Kind::Refused, message).into());
        }
        Ok(captured)
    }

    /// The snapshot that it lies over.
    pub(crate) fn parent(&self) -> Result<Option<SnapRef>> {
        Ok(self.parent.as_deref().map(str::parse).transpose()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_without_end_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(DESCRIPTION);
        fs::File::create(&path).unwrap().set_len(DESCRIPTION_BYTES_MAX).unwrap();
        assert_eq!(read_bounded(&path).unwrap().len() as u64, DESCRIPTION_BYTES_MAX);
        fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(read_bounded(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
