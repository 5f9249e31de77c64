//! Temporary files without a name (`O_TMPFILE` of `open(2)`), with a fallback where the file
//! system has none (NFS, 9p, older overlayfs).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

/// Tries for a free name. Names carry the process, a counter and the time, so that one is
/// enough unless somebody makes them on purpose.
const NAME_TRIES_MAX: u32 = 16;

/// A readable and writable file in `folder` that nobody else can see, gone with its descriptor.
pub(crate) fn unnamed(folder: &Path) -> io::Result<File> {
    let folder = open_folder(folder)?;
    let mode = Mode::RUSR | Mode::WUSR;
    if let Some(file) = try_unnamed(&folder, mode)? {
        return Ok(file);
    }
    let (file, name) = named(&folder, mode)?;
    rustix::fs::unlinkat(&folder, &name, AtFlags::empty())?;
    Ok(file)
}

/// A descriptor of a folder, to name files relative to it however it is renamed meanwhile.
pub(crate) fn open_folder(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// A file without a name, or `None` where the file system cannot make one.
pub(crate) fn try_unnamed(folder: impl AsFd, mode: Mode) -> io::Result<Option<File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::openat(folder, ".", flags, mode) {
        Ok(file) => Ok(Some(file.into())),
        // Kernels before 3.11 do not know the flag and see a folder opened for writing.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A new file under a name of its own.
pub(crate) fn named(folder: impl AsFd, mode: Mode) -> io::Result<(File, String)> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    with_free_name(|name| rustix::fs::openat(&folder, name, flags, mode).map(File::from))
}

/// Calls `make` with names until one is not taken.
pub(crate) fn with_free_name<T>(
    mut make: impl FnMut(&str) -> rustix::io::Result<T>,
) -> io::Result<(T, String)> {
    for _ in 0..NAME_TRIES_MAX {
        let name = temp_name();
        match make(&name) {
            Err(Errno::EXIST) => {}
            Ok(made) => return Ok((made, name)),
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EXIST.into())
}

fn temp_name() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    // A clock before 1970 only makes the name less unlikely to be taken.
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.subsec_nanos());
    format!(".dormouse-{}-{count}-{nanos:x}.tmp", std::process::id())
}
