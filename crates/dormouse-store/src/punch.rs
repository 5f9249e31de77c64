//! Giving the zero blocks of memory files back to the file system.
//!
//! A VMM writes the memory of its guest to a file, zeros and all. [`punch_paths`] finds the zero
//! blocks in such files and punches holes there: the content stays, the space goes.
//!
//! What it keeps to:
//!
//! - only whole 4 KiB blocks that were read as zeros are punched, so a reader sees the same bytes
//!   before, during and after, and so does whoever comes back after a crash at any moment;
//! - holes are never read, and a short last block is never punched;
//! - a file in which holes may mean "as in the snapshot before" is refused, see [`HolesMean`].
//!
//! Nobody may write to a file while it is punched: a block written between being read and being
//! punched is lost, and the kernel has no call that would test and punch in one step.

mod scan;
mod select;

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use dormouse_sys::file_size::{FileKind, file_size};
use dormouse_sys::sparse;

use self::select::Target;

/// The unit that is tested and punched: the block size of guests' memory.
pub const BLOCK_BYTES: u64 = 4096;

/// What the holes a file already has stand for.
///
/// In the difference file of a VMM a hole says "this block is as in the snapshot before" and a
/// block of zeros says "this block is zero now"; punching would turn the one into the other.
/// A difference that happens to have no holes cannot be told from a whole image by looking, so
/// whoever punches must not name one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HolesMean {
    /// Not known. A file that has holes is refused, unless it lies in a Cloud Hypervisor
    /// snapshot folder (`config.json` and `state.json` beside it), whose memory files are always
    /// whole. Files punched before have holes and are refused, too.
    Unknown,

    /// Zero: the caller vouches that the files are whole images.
    Zero,
}

/// Which files of a folder are meant when the folder is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FolderFiles {
    /// Regular files whose name starts with `memory`.
    Memory,

    /// Every regular file.
    All,
}

/// Whether to punch or only to say what punching would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PunchMode {
    /// Punch.
    Punch,

    /// Read only; `after_bytes` of the report is then an estimate.
    DryRun,
}

/// How to punch.
#[derive(Clone, Debug)]
pub struct PunchOptions {
    /// Punch or try.
    pub mode: PunchMode,

    /// What holes already there stand for.
    pub holes: HolesMean,

    /// Which files of a folder are meant.
    pub folder_files: FolderFiles,

    /// Runs of zero blocks shorter than this stay, to bound how many pieces a file is cut into.
    /// Anything up to [`BLOCK_BYTES`] punches every run.
    pub min_run_bytes: u64,

    /// Threads that read and punch, by default one per CPU.
    pub threads: Option<NonZeroUsize>,
}

impl PunchOptions {
    /// Punches every run in the memory files of folders, on all CPUs.
    pub fn new(holes: HolesMean) -> PunchOptions {
        PunchOptions {
            mode: PunchMode::Punch,
            holes,
            folder_files: FolderFiles::Memory,
            min_run_bytes: 0,
            threads: None,
        }
    }

    fn threads(&self) -> usize {
        let threads = self.threads.or_else(|| thread::available_parallelism().ok());
        threads.map_or(1, NonZeroUsize::get)
    }
}

/// What punching did to one file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PunchReport {
    /// Bytes allocated before.
    pub before_bytes: u64,

    /// Bytes allocated afterwards; in a dry run those before less those of the runs.
    pub after_bytes: u64,

    /// Bytes given back. 0 when the notes the file system keeps about new holes took more.
    pub reclaimed_bytes: u64,

    /// Bytes in whole blocks of zeros outside holes, also in runs too short to punch.
    pub zero_bytes: u64,

    /// Bytes in the runs that were punched, or would have been.
    pub punched_bytes: u64,

    /// Runs that were punched, or would have been.
    pub runs: u64,
}

/// Why a file was not punched, or not to its end. What was punched by then stays punched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PunchError {
    /// It has holes and nobody vouched for what they mean.
    #[error(
        "{path} has holes already and is not in a Cloud Hypervisor snapshot folder: if it is a \
         difference, punching would turn \"now zero\" into \"unchanged\"; if it is a whole image, \
         say so with `--holes zero`"
    )]
    MayBeDifference {
        /// The file.
        path: PathBuf,
    },

    /// Only regular files have blocks to give back.
    #[error("{path} is {}, not a regular file", kind.describe())]
    NotRegular {
        /// What was named.
        path: PathBuf,

        /// What it is.
        kind: FileKind,
    },

    /// [`PunchWatch::is_cancelled`] said so.
    #[error("{path}: cancelled")]
    Cancelled {
        /// The file that was not finished or not begun.
        path: PathBuf,
    },

    /// The kernel refused something.
    #[error("{path}: cannot {action}")]
    Io {
        /// The file or folder.
        path: PathBuf,

        /// What was tried, as a verb.
        action: &'static str,

        /// What the kernel said.
        source: io::Error,
    },
}

/// One file, and what became of it.
#[derive(Debug)]
pub struct PunchOutcome {
    /// The file, or what was named if no file could be found through it.
    pub path: PathBuf,

    /// What punching did.
    pub result: Result<PunchReport, PunchError>,
}

/// Who watches files being punched, and may stop it. Called from several threads at once.
pub trait PunchWatch: Sync {
    /// `path`, `len_bytes` long, is begun.
    fn began(&self, _path: &Path, _len_bytes: u64) {}

    /// Another `bytes` of `path`, holes included, are done. Sums up to its length, short of the
    /// last block, unless punching fails.
    fn advanced(&self, _path: &Path, _bytes: u64) {}

    /// `path` is done.
    fn ended(&self, _path: &Path, _result: &Result<PunchReport, PunchError>) {}

    /// Whether to stop; asked at least once per mebibyte read.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Nobody watches.
impl PunchWatch for () {}

/// A flag that stops the work once it is set.
impl PunchWatch for AtomicBool {
    fn is_cancelled(&self) -> bool {
        self.load(Ordering::Relaxed)
    }
}

/// Punches the zero blocks of files, and of the files directly in folders.
///
/// Gives one outcome per file, in the order of `paths` and by name within a folder; a file that
/// fails does not keep the others from being punched. A file named twice, also through a hard
/// link, is punched once. A folder without files of the wanted name gives no outcome. Links are
/// followed for `paths` themselves, not within a folder.
pub fn punch_paths(
    paths: &[PathBuf],
    options: &PunchOptions,
    watch: &dyn PunchWatch,
) -> Vec<PunchOutcome> {
    let targets = select::targets(paths, options.folder_files);
    let results: Vec<Mutex<Option<Result<PunchReport, PunchError>>>> =
        targets.iter().map(|_| Mutex::new(None)).collect();
    let put = |index: usize, result| {
        *results[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    };

    let threads = options.threads();
    // A file of many segments keeps all threads busy alone, and reading one file after the other
    // suits the disk. The small ones share the threads afterwards.
    let (large, small): (Vec<usize>, Vec<usize>) = (0..targets.len())
        .partition(|&index| targets[index].len() >= scan::SEGMENT_BYTES * threads as u64);
    for index in large {
        put(index, punch_target(&targets[index], options, threads, watch));
    }
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(&index) = small.get(next.fetch_add(1, Ordering::Relaxed)) {
            put(index, punch_target(&targets[index], options, 1, watch));
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(small.len()) {
            scope.spawn(work);
        }
        work();
    });

    let results = results.into_iter().map(|result| {
        let result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
        result.expect("every target is in one of the two lists and both were worked off")
    });
    let paths = targets.iter().map(|target| target.path().to_owned());
    paths.zip(results).map(|(path, result)| PunchOutcome { path, result }).collect()
}

/// Punches the zero blocks of one file. A link is followed.
pub fn punch_file(
    path: &Path,
    options: &PunchOptions,
    watch: &dyn PunchWatch,
) -> Result<PunchReport, PunchError> {
    let result = punch_with(path, options, options.threads(), watch);
    watch.ended(path, &result);
    result
}

fn punch_target(
    target: &Target,
    options: &PunchOptions,
    threads: usize,
    watch: &dyn PunchWatch,
) -> Result<PunchReport, PunchError> {
    let result = match target {
        Target::File { path, .. } => punch_with(path, options, threads, watch),
        Target::Failed { path, action, error } => {
            // Told once, and an `io::Error` cannot be cloned.
            let source = error.raw_os_error().map_or_else(
                || io::Error::new(error.kind(), error.to_string()),
                io::Error::from_raw_os_error,
            );
            Err(PunchError::Io { path: path.clone(), action, source })
        }
    };
    watch.ended(target.path(), &result);
    result
}

fn punch_with(
    path: &Path,
    options: &PunchOptions,
    threads: usize,
    watch: &dyn PunchWatch,
) -> Result<PunchReport, PunchError> {
    let failed = |action| move |source| PunchError::Io { path: path.to_owned(), action, source };
    if watch.is_cancelled() {
        return Err(PunchError::Cancelled { path: path.to_owned() });
    }
    let file = open(path, options.mode)?;
    let size = file_size(&file).map_err(failed("stat it"))?;
    let (FileKind::Regular, Some(len)) = (size.kind, size.bytes) else {
        return Err(PunchError::NotRegular { path: path.to_owned(), kind: size.kind });
    };
    if options.holes == HolesMean::Unknown
        && sparse::has_holes(&file, len).map_err(failed("look for holes in it"))?
        && !is_in_cloud_hypervisor_folder(path).map_err(failed("look around it"))?
    {
        return Err(PunchError::MayBeDifference { path: path.to_owned() });
    }
    let before_bytes = sparse::allocated_bytes(&file).map_err(failed("stat it"))?;
    watch.began(path, len);

    let scan = scan::Scan { path, file: &file, options, watch };
    let found = scan.run(len / BLOCK_BYTES * BLOCK_BYTES, threads)?;
    let after_bytes = match options.mode {
        PunchMode::Punch => sparse::allocated_bytes(&file).map_err(failed("stat it"))?,
        PunchMode::DryRun => before_bytes.saturating_sub(found.punched_bytes),
    };
    Ok(PunchReport {
        before_bytes,
        after_bytes,
        reclaimed_bytes: before_bytes.saturating_sub(after_bytes),
        zero_bytes: found.zero_bytes,
        punched_bytes: found.punched_bytes,
        runs: found.runs,
    })
}

/// Opens what is surely a regular file: opening a pipe would wait for its other end.
fn open(path: &Path, mode: PunchMode) -> Result<File, PunchError> {
    use std::os::unix::fs::OpenOptionsExt;

    let failed = |source| PunchError::Io { path: path.to_owned(), action: "open it", source };
    if path.is_dir() {
        return Err(PunchError::NotRegular { path: path.to_owned(), kind: FileKind::Folder });
    }
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits())
        .map_err(|error| failed(io::Error::other(error)))?;
    OpenOptions::new()
        .read(true)
        .write(mode == PunchMode::Punch)
        .custom_flags(nonblock)
        .open(path)
        .map_err(failed)
}

/// Whether the VMM's description and state lie beside the file itself, not beside a link to it.
fn is_in_cloud_hypervisor_folder(path: &Path) -> io::Result<bool> {
    let path = path.canonicalize()?;
    Ok(path.parent().is_some_and(|folder| {
        ["config.json", "state.json"].iter().all(|name| folder.join(name).is_file())
    }))
}
