//! Punching files and folders, on the file system of the temporary folder and on tmpfs.

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dormouse_store::disk_usage::{DiskUsage, disk_usage};
use dormouse_store::punch::{
    BLOCK_BYTES, FolderFiles, HolesMean, PunchError, PunchMode, PunchOptions, PunchReport,
    PunchWatch, punch_file, punch_paths,
};
use dormouse_testkit::baseline::wrenn_scan;
use tempfile::TempDir;

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;

/// One folder on each file system to test.
fn folders() -> Vec<TempDir> {
    ["/tmp", "/dev/shm"].map(|parent| TempDir::new_in(parent).unwrap()).into()
}

/// A file made of runs: so many blocks, each zero or not.
fn content(runs: &[(usize, bool)], tail: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &(blocks, is_zero) in runs {
        let end = bytes.len() + blocks * BLOCK;
        // Only the last byte of a data block tells it from zeros.
        while bytes.len() < end {
            bytes.resize(bytes.len() + BLOCK - 1, 0);
            bytes.push(u8::from(!is_zero));
        }
    }
    bytes.extend_from_slice(tail);
    bytes
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
}

/// A whole image in which every block that can be a hole is one.
fn write_sparse(path: &Path) -> Vec<u8> {
    let bytes = content(&[(2, false), (4, true), (2, false)], &[]);
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(&bytes[..2 * BLOCK], 0).unwrap();
    // The third zero block is there as data, the other three are a hole.
    file.write_all_at(&bytes[5 * BLOCK..], 5 * BLOCK as u64).unwrap();
    bytes
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

fn options() -> PunchOptions {
    PunchOptions::new(HolesMean::Unknown)
}

#[test]
fn runs_are_found_joined_and_punched() {
    struct Case {
        name: &'static str,
        bytes: Vec<u8>,
        min_run_bytes: u64,
        zero_blocks: usize,
        punched: &'static [usize],
    }
    let case = |name, bytes, min_run_blocks: u64, zero_blocks, punched| Case {
        name,
        bytes,
        min_run_bytes: min_run_blocks * BLOCK_BYTES,
        zero_blocks,
        punched,
    };
    let cases = [
        case("empty", vec![], 0, 0, &[]),
        case("less than a block", vec![0; 100], 0, 0, &[]),
        case("one zero block", content(&[(1, true)], &[]), 0, 1, &[1]),
        case("no zeros", content(&[(700, false)], &[]), 0, 0, &[]),
        case("ends", content(&[(3, true), (5, false), (2, true)], &[]), 0, 5, &[3, 2]),
        case("zero tail stays", content(&[(1, false), (2, true)], &[0; 777]), 0, 2, &[2]),
        case("data tail", content(&[(1, false), (2, true)], &[9; 4095]), 0, 2, &[2]),
        // 64 blocks are read at a time.
        case("across reads", content(&[(60, false), (8, true), (9, false)], &[]), 0, 8, &[8]),
        case("many reads", content(&[(1, false), (500, true), (1, false)], &[]), 0, 500, &[500]),
        // 2048 blocks are one segment.
        case(
            "across segments",
            content(&[(2040, false), (16, true), (1, false)], &[]),
            0,
            16,
            &[16],
        ),
        case("up to a border", content(&[(2040, false), (8, true), (1, false)], &[]), 0, 8, &[8]),
        case("from a border", content(&[(2048, false), (8, true), (1, false)], &[]), 0, 8, &[8]),
        case("all zero", content(&[(5000, true)], &[0; 5]), 0, 5000, &[5000]),
        case(
            "min run",
            content(&[(1, true), (1, false), (2, true), (1, false), (3, true)], &[]),
            2,
            6,
            &[2, 3],
        ),
        case(
            "min run joined first",
            content(&[(2046, false), (4, true), (1, false), (3, true)], &[]),
            4,
            7,
            &[4],
        ),
        case("min run above all", content(&[(1, false), (7, true)], &[]), 8, 7, &[]),
    ];
    for folder in folders() {
        for Case { name, bytes, min_run_bytes, zero_blocks, punched } in &cases {
            for threads in [1, 2, 5] {
                let path = folder.path().join("memory");
                write(&path, bytes);
                let blocks_before = allocated(&path);
                let mut options = options();
                options.min_run_bytes = *min_run_bytes;
                options.threads = NonZeroUsize::new(threads);
                let what = format!("{name}, {threads} threads, {folder:?}");

                options.mode = PunchMode::DryRun;
                let tried = punch_file(&path, &options, &()).unwrap();
                assert_eq!(allocated(&path), blocks_before, "dry run of {what}");

                options.mode = PunchMode::Punch;
                let report = punch_file(&path, &options, &()).unwrap();
                let punched_bytes = (punched.iter().sum::<usize>() * BLOCK) as u64;
                let expected = PunchReport {
                    before_bytes: blocks_before,
                    after_bytes: allocated(&path),
                    reclaimed_bytes: blocks_before.saturating_sub(allocated(&path)),
                    zero_bytes: (zero_blocks * BLOCK) as u64,
                    punched_bytes,
                    runs: punched.len() as u64,
                };
                assert_eq!(report, expected, "{what}");
                assert_eq!(report.reclaimed_bytes, punched_bytes, "{what}");
                assert_eq!(tried, report, "dry run of {what}");
                assert!(fs::read(&path).unwrap() == *bytes, "content of {what}");
            }
        }
    }
}

/// The plain algorithm and ours on random files with holes: same runs, same bytes afterwards.
#[test]
fn same_as_the_plain_algorithm() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below).unwrap()
    };
    for folder in folders() {
        for round in 0..20 {
            let mut runs = Vec::new();
            while runs.iter().map(|&(blocks, _)| blocks).sum::<usize>() < 20 * MIB / BLOCK {
                runs.push((1 + random([2, 40, 3000][round % 3]), random(2) == 0));
            }
            let bytes = content(&runs, &vec![0; random(4096)]);
            let path = folder.path().join("memory");
            write(&path, &bytes);
            // Some of the zero runs are holes before.
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let zeros = wrenn_scan::zero_runs(&file).unwrap();
            for run in zeros.iter().filter(|_| random(3) == 0) {
                dormouse_sys::sparse::punch_hole(&file, run.start, run.end - run.start).unwrap();
            }
            let left = wrenn_scan::zero_runs(&file).unwrap();

            let mut options = PunchOptions::new(HolesMean::Zero);
            options.threads = NonZeroUsize::new(1 + random(4));
            let report = punch_file(&path, &options, &()).unwrap();
            assert_eq!(report.runs, left.len() as u64);
            assert_eq!(report.zero_bytes, left.iter().map(|run| run.end - run.start).sum::<u64>());
            assert!(wrenn_scan::zero_runs(&file).unwrap().is_empty());
            assert!(fs::read(&path).unwrap() == bytes);
        }
    }
}

#[test]
fn files_with_holes_need_a_voucher() {
    for folder in folders() {
        let path = folder.path().join("memory");
        let bytes = write_sparse(&path);
        let before = allocated(&path);
        let refused = punch_file(&path, &options(), &()).unwrap_err();
        assert!(matches!(refused, PunchError::MayBeDifference { .. }), "{refused}");
        assert!(refused.to_string().contains("--holes zero"), "{refused}");
        let mut dry = options();
        dry.mode = PunchMode::DryRun;
        assert!(punch_file(&path, &dry, &()).is_err(), "a dry run refuses, too");
        assert_eq!(allocated(&path), before);

        // One of the two files of a Cloud Hypervisor folder does not make one.
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert!(punch_file(&path, &options(), &()).is_err());
        fs::write(folder.path().join("state.json"), "{}").unwrap();
        let report = punch_file(&path, &options(), &()).unwrap();
        assert_eq!((report.runs, report.reclaimed_bytes), (1, BLOCK_BYTES));
        assert_eq!(fs::read(&path).unwrap(), bytes);

        // A link in such a folder to a file elsewhere does not vouch for that file.
        let elsewhere = folder.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        write_sparse(&elsewhere.join("diff"));
        let link = folder.path().join("memory-link");
        std::os::unix::fs::symlink(elsewhere.join("diff"), &link).unwrap();
        assert!(punch_file(&link, &options(), &()).is_err());
        let report = punch_file(&link, &PunchOptions::new(HolesMean::Zero), &()).unwrap();
        assert_eq!((report.runs, report.zero_bytes), (1, BLOCK_BYTES));
        // A file that is nothing but a hole has holes, too.
        File::create(elsewhere.join("hole")).unwrap().set_len(1 << 30).unwrap();
        assert!(punch_file(&elsewhere.join("hole"), &options(), &()).is_err());
    }
}

#[test]
fn a_folder_means_its_memory_files() {
    for folder in folders() {
        let root = folder.path();
        let bytes = content(&[(1, false), (3, true)], &[]);
        for name in ["memory", "memory-ranges", "memory.2", "disk", "not-memory"] {
            write(&root.join(name), &bytes);
        }
        fs::create_dir(root.join("memory-folder")).unwrap();
        write(&root.join("memory-folder/memory"), &bytes);
        write_sparse(&root.join("memory-diff"));
        fs::hard_link(root.join("memory"), root.join("memory-twice")).unwrap();
        std::os::unix::fs::symlink("disk", root.join("memory-link")).unwrap();
        let missing = root.join("missing");

        let mut dry = options();
        dry.mode = PunchMode::DryRun;
        dry.folder_files = FolderFiles::All;
        let names = |outcomes: &[dormouse_store::punch::PunchOutcome]| -> Vec<(String, bool)> {
            let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
            outcomes.iter().map(|each| (name(&each.path), each.result.is_ok())).collect()
        };
        let expected = |names: &[(&str, bool)]| -> Vec<(String, bool)> {
            names.iter().map(|&(name, is_ok)| (name.to_owned(), is_ok)).collect()
        };
        assert_eq!(
            names(&punch_paths(&[root.to_owned()], &dry, &())),
            expected(&[
                ("disk", true),
                ("memory", true),
                ("memory-diff", false),
                ("memory-ranges", true),
                ("memory.2", true),
                ("not-memory", true),
            ])
        );

        let paths: [PathBuf; 4] =
            [missing, root.to_owned(), root.join("memory"), root.join("not-memory")];
        let outcomes = punch_paths(&paths, &options(), &());
        assert_eq!(
            names(&outcomes),
            expected(&[
                ("missing", false),
                ("memory", true),
                ("memory-diff", false),
                ("memory-ranges", true),
                ("memory.2", true),
                ("not-memory", true),
            ])
        );
        for outcome in outcomes.iter().filter(|outcome| outcome.result.is_ok()) {
            assert_eq!(outcome.result.as_ref().unwrap().reclaimed_bytes, 3 * BLOCK_BYTES);
            assert_eq!(fs::read(&outcome.path).unwrap(), bytes);
        }
        assert_eq!(allocated(&root.join("disk")), 4 * BLOCK_BYTES);
        assert_eq!(allocated(&root.join("memory-folder/memory")), 4 * BLOCK_BYTES);
    }
}

#[test]
fn only_regular_files() {
    let folder = TempDir::new().unwrap();
    let fifo = folder.path().join("memory-fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
        .unwrap();
    // Not waited for: the folder leaves it out, and by name it is refused.
    assert!(punch_paths(&[folder.path().to_owned()], &options(), &()).is_empty());
    for path in [fifo.as_path(), folder.path(), Path::new("/dev/null")] {
        let error = punch_file(path, &options(), &()).unwrap_err();
        assert!(matches!(error, PunchError::NotRegular { .. }), "{path:?}: {error}");
    }
}

/// Counts what it is told, and cancels once that is more than a limit.
#[derive(Default)]
struct Counter {
    began: AtomicU64,
    advanced: AtomicU64,
    ended: AtomicU64,
    limit: Option<u64>,
}

impl PunchWatch for Counter {
    fn began(&self, _path: &Path, len_bytes: u64) {
        self.began.fetch_add(len_bytes, Ordering::Relaxed);
    }

    fn advanced(&self, _path: &Path, bytes: u64) {
        self.advanced.fetch_add(bytes, Ordering::Relaxed);
    }

    fn ended(&self, _path: &Path, _result: &Result<PunchReport, PunchError>) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.limit.is_some_and(|limit| self.advanced.load(Ordering::Relaxed) > limit)
    }
}

#[test]
fn progress_and_cancelling() {
    for folder in folders() {
        let big = content(&[(6000, false), (1, true), (6000, false), (5, true)], &[]);
        let small = content(&[(3, true)], &[]);
        write(&folder.path().join("memory"), &big);
        write(&folder.path().join("memory2"), &small);
        let paths = [folder.path().to_owned()];

        let counter = Counter { limit: Some(4 << 20), ..Counter::default() };
        let outcomes = punch_paths(&paths, &options(), &counter);
        let cancelled = |outcome: &dormouse_store::punch::PunchOutcome| {
            matches!(outcome.result, Err(PunchError::Cancelled { .. }))
        };
        assert!(outcomes.len() == 2 && outcomes.iter().all(cancelled), "{outcomes:?}");
        assert!(counter.advanced.load(Ordering::Relaxed) < 6 << 20);
        assert!(fs::read(folder.path().join("memory")).unwrap() == big);
        let flag = AtomicBool::new(true);
        assert!(punch_paths(&paths, &options(), &flag).iter().all(cancelled));

        // What was punched by then makes it a file with holes, if it got so far.
        let counter = Counter::default();
        let outcomes = punch_paths(&paths, &PunchOptions::new(HolesMean::Zero), &counter);
        assert!(outcomes.iter().all(|outcome| outcome.result.is_ok()), "{outcomes:?}");
        let all = (big.len() + small.len()) as u64;
        assert_eq!(counter.began.into_inner(), all);
        assert_eq!(counter.advanced.into_inner(), all);
        assert_eq!(counter.ended.into_inner(), 2);
        assert!(fs::read(folder.path().join("memory")).unwrap() == big);
    }
}

#[test]
fn usage_counts_hard_links_once() {
    for folder in folders() {
        let root = folder.path();
        fs::create_dir_all(root.join("a/b")).unwrap();
        write(&root.join("one"), &[1; 5000]);
        fs::hard_link(root.join("one"), root.join("a/one")).unwrap();
        write(&root.join("a/b/two"), &[2; 100]);
        File::create(root.join("a/hole")).unwrap().set_len(1 << 30).unwrap();
        let expected =
            DiskUsage { allocated_bytes: 3 * 4096, apparent_bytes: 5100 + (1 << 30), files: 3 };
        assert_eq!(disk_usage(root).unwrap(), expected);
        let one = DiskUsage { allocated_bytes: 2 * 4096, apparent_bytes: 5000, files: 1 };
        assert_eq!(disk_usage(&root.join("one")).unwrap(), one);
        let error = disk_usage(&root.join("missing")).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }
}
