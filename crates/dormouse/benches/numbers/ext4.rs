//! ext4 images: of a folder, of a gzip stream, work disks, beside mke2fs, mkext4 and debugfs.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dormouse_ext4::input::decode::unpacked;
use dormouse_ext4::input::oci::manifest::Wanted;
use dormouse_ext4::input::oci::{self, Blobs, LayoutFolder, host_platform};
use dormouse_ext4::input::{Limits, folder, image};
use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::read::Ext4;
use dormouse_ext4::stage::{Stage, Staged};
use dormouse_ext4::tree::{ROOT, Tree};
use dormouse_ext4::write::{Report as Written, Unwatched, write};
use sha2::{Digest as _, Sha256};

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, Random, medians, seconds};
use crate::scratch::{Scratch, remove_dir};

const FILES: usize = 50_000;
const FILES_IN_FOLDER: usize = 100;
const FILES_IN_LARGE_FOLDER: usize = 10_000;
const FILE_BYTES: usize = 12 << 10;
const IMAGE_BYTES: u64 = 4 << 30;
const WORK_FILES: usize = 1000;
const WORK_BYTES: u64 = 64 << 30;
const MIB: f64 = (1 << 20) as f64;

/// Entries of the stream that tells how memory grows.
const MANY: u64 = 10_000_000;

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let source = scratch.path("ext4-tree");
    make_tree(&source, FILES, FILES_IN_FOLDER)?;
    of_a_folder(scratch, &source, report)?;
    floor(scratch, &source, report)?;
    of_a_stream(scratch, &source, report)?;
    remove_dir(&source)?;
    make_tree(&source, FILES, FILES_IN_LARGE_FOLDER)?;
    of_large_folders(scratch, &source, report)?;
    remove_dir(&source)?;
    work_disks(scratch, report)?;
    memory(scratch, report)
}

/// Files of 12 KiB on average, so many in a folder.
fn make_tree(root: &Path, files: usize, in_folder: usize) -> Result<()> {
    let mut random = Random::new(5);
    let mut noise = vec![0; 4 * FILE_BYTES];
    for chunk in noise.chunks_mut(8) {
        let word = random.next().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    for index in 0..files {
        let dir = root.join(format!("folder-{:03}", index / in_folder));
        if index % in_folder == 0 {
            fs::create_dir_all(&dir)?;
        }
        let half = FILE_BYTES as u64;
        let bytes = usize::try_from(random.next() % (2 * half))?;
        let from = usize::try_from(random.next() % half)?;
        fs::write(dir.join(format!("file-{index:06}")), &noise[from..from + bytes])?;
    }
    Ok(())
}

fn new_file(path: &Path) -> Result<File> {
    if path.exists() {
        fs::remove_file(path)?;
    }
    Ok(File::options().read(true).write(true).create_new(true).open(path)?)
}

fn build(source: &Path, target: &Path, size: Size) -> Result<Written> {
    let mut tree = Tree::new();
    folder::read(&mut tree, ROOT, source, &Limits::STANDARD, None, &Unwatched)?;
    let layout = Layout::plan(&mut tree, &Options::new(size), &Staged::nothing())?;
    Ok(write(&tree, &layout, &new_file(target)?, &Unwatched)?)
}

fn of_a_folder(scratch: &Scratch, source: &Path, report: &mut Report) -> Result<()> {
    let (ours, theirs) = (scratch.path("ours.ext4"), scratch.path("theirs.ext4"));
    let [built, mkext4] = medians(
        FEW_ROUNDS,
        [&mut || seconds(|| build(source, &ours, Size::Exactly(IMAGE_BYTES))), &mut || {
            seconds(|| build_with_mkext4(source, &theirs))
        }],
    )?;
    check(&ours)?;
    let mke2fs = seconds(|| build_with_mke2fs(source, &theirs))?;
    let what = format!("{FILES} files from a folder");
    report.row(
        Row::new(&what, Value::Seconds(built))
            .beside("mke2fs -d, one run", Value::Seconds(mke2fs))
            .bar(Bar::RatioAtMost(0.1)),
    );
    report.row(
        Row::new(&what, Value::Seconds(built))
            .beside("mkext4", Value::Seconds(mkext4))
            .bar(Bar::RatioAtMost(1.0)),
    );
    let sync = |path: &Path| Ok(File::open(path)?.sync_all()?);
    let [durable, mke2fs] = medians(
        2,
        [
            &mut || {
                seconds(|| {
                    build(source, &ours, Size::Exactly(IMAGE_BYTES))?;
                    sync(&ours)
                })
            },
            &mut || {
                seconds(|| {
                    build_with_mke2fs(source, &theirs)?;
                    sync(&theirs)
                })
            },
        ],
    )?;
    report.row(
        Row::new(format!("{what}, on disk in the end"), Value::Seconds(durable))
            .beside("mke2fs -d and fsync", Value::Seconds(mke2fs)),
    );
    // Of a size that has no journal to speak of and few tables: what is left are the files.
    let written = build(source, &ours, Size::Exactly(IMAGE_BYTES))?;
    let allocated = File::open(&ours)?.metadata()?.blocks() * 512;
    let needed = blocks_of(source)? + written.metadata_bytes;
    report.row(
        Row::new("bytes allocated", Value::Bytes(allocated as f64))
            .beside("files' blocks and the format", Value::Bytes(needed as f64))
            .bar(Bar::RatioAtMost(1.02)),
    );
    fs::remove_file(&ours)?;
    Ok(fs::remove_file(&theirs)?)
}

fn build_with_mke2fs(source: &Path, target: &Path) -> Result<()> {
    new_file(target)?.set_len(IMAGE_BYTES)?;
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(source).arg(target))
}

/// mke2fs goes through all of a folder for each name that it adds.
fn of_large_folders(scratch: &Scratch, source: &Path, report: &mut Report) -> Result<()> {
    let (ours, theirs) = (scratch.path("ours.ext4"), scratch.path("theirs.ext4"));
    let built = seconds(|| build(source, &ours, Size::Exactly(IMAGE_BYTES)))?;
    check(&ours)?;
    let mke2fs = seconds(|| build_with_mke2fs(source, &theirs))?;
    report.row(
        Row::new(
            format!("the same files in folders of {FILES_IN_LARGE_FOLDER}"),
            Value::Seconds(built),
        )
        .beside("mke2fs -d, one run", Value::Seconds(mke2fs))
        .bar(Bar::RatioAtMost(0.1)),
    );
    fs::remove_file(&ours)?;
    Ok(fs::remove_file(&theirs)?)
}

/// What no way of building can do without: opening and reading each file, by two threads that do
/// nothing else, and bringing as many bytes into a file, in the page cache or past it.
fn floor(scratch: &Scratch, source: &Path, report: &mut Report) -> Result<()> {
    let files = crate::scratch::files_below(source)?;
    let reading = seconds(|| {
        std::thread::scope(|scope| {
            let halves = files.chunks(files.len().div_ceil(2)).map(|half| {
                scope.spawn(move || -> io::Result<()> {
                    let mut buffer = vec![0; 4 * FILE_BYTES];
                    half.iter().try_for_each(|path| File::open(path)?.read(&mut buffer).map(|_| ()))
                })
            });
            let halves: Vec<_> = halves.collect();
            halves.into_iter().try_for_each(|half| {
                half.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?.map_err(Into::into)
            })
        })
    })?;
    let bytes = usize::try_from(blocks_of(source)? >> 20)?;
    let target = scratch.path("floor");
    let writing = |flags: &str| {
        let mut dd = Command::new("dd");
        let (count, output) = (format!("count={bytes}"), format!("of={}", target.display()));
        dd.args(["if=/dev/zero", "bs=1M", "status=none", &count, &output]);
        if !flags.is_empty() {
            dd.arg(flags);
        }
        seconds(|| run(&mut dd))
    };
    let cached = writing("")?;
    fs::remove_file(&target)?;
    let direct = writing("oflag=direct")?;
    fs::remove_file(&target)?;
    report.row(Row::new("the floor: opening and reading the files", Value::Seconds(reading)));
    report.row(
        Row::new("writing as many bytes past the page cache", Value::Seconds(direct))
            .beside("through it", Value::Seconds(cached)),
    );
    Ok(())
}

fn blocks_of(dir: &Path) -> Result<u64> {
    let files = crate::scratch::files_below(dir)?;
    files.iter().try_fold(0, |sum, path| Ok(sum + path.metadata()?.len().div_ceil(4096) * 4096))
}

/// A tree of folders and regular files, which is all that the bench has.
fn build_with_mkext4(source: &Path, target: &Path) -> Result<()> {
    use mkext4::{FsBuilder, InodeCount, InodeHandle, Meta, Options as Theirs};
    fn declare(
        builder: &mut FsBuilder,
        folder: InodeHandle,
        path: &Path,
        files: &mut Vec<(InodeHandle, PathBuf)>,
    ) -> Result<()> {
        let mut entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name().into_string().ok().context("a name of ours is text")?;
            let metadata = entry.metadata()?;
            let mode = u16::try_from(metadata.mode() & 0o7777)?;
            let nanoseconds = u32::try_from(metadata.mtime_nsec())?;
            let mtime = (metadata.mtime(), nanoseconds);
            let meta = Meta::new(mode, metadata.uid(), metadata.gid(), mtime);
            if metadata.is_dir() {
                let below = builder.mkdir(folder, &name, meta)?;
                declare(builder, below, &entry.path(), files)?;
            } else {
                let file = builder.file(folder, &name, meta, metadata.len())?;
                // It refuses to be given the content of an empty one.
                if metadata.len() > 0 {
                    files.push((file, entry.path()));
                }
            }
        }
        Ok(())
    }
    let mut options = Theirs::new(IMAGE_BYTES, [7; 16], 1);
    options.inodes = InodeCount::Auto;
    let mut builder = FsBuilder::new(options)?;
    let mut files = Vec::new();
    declare(&mut builder, mkext4::ROOT, source, &mut files)?;
    let layout = builder.seal()?;
    let mut sink = mkext4::sink::FileSink::create(target, IMAGE_BYTES)?;
    let mut writer = layout.writer(&mut sink)?;
    for (file, path) in files {
        writer.fill(file, &mut File::open(path)?)?;
    }
    writer.finish()?;
    Ok(())
}

/// A layout with one gzip layer of a folder. Returns the layer's path.
fn make_layout(at: &Path, source: &Path) -> Result<PathBuf> {
    let blobs = at.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let layer = at.join("layer");
    run(Command::new("tar").args(["-C"]).arg(source).arg("-zcf").arg(&layer).arg("."))?;
    let put = |bytes: &[u8]| -> Result<String> {
        let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(blobs.join(&hex), bytes)?;
        Ok(format!(r#""digest":"sha256:{hex}","size":{}"#, bytes.len()))
    };
    let packed = fs::read(&layer)?;
    let layer = put(&packed)?;
    let kind = "application/vnd.oci.image";
    let manifest = format!(r#"{{"layers":[{{"mediaType":"{kind}.layer.v1.tar+gzip",{layer}}}]}}"#);
    let manifest = put(manifest.as_bytes())?;
    fs::write(at.join("index.json"), format!(r#"{{"manifests":[{{{manifest}}}]}}"#))?;
    Ok(at.join("layer"))
}

fn build_of_layout(layout: &Path, target: &Path) -> Result<Written> {
    let file = Arc::new(new_file(target)?);
    let mut tree = Tree::new();
    let mut stage = Stage::new(Arc::clone(&file), Size::Slack(0));
    let blobs: Arc<dyn Blobs> = Arc::new(LayoutFolder::new(layout));
    let wanted = Wanted { tag: None, platform: host_platform() };
    oci::read(&mut tree, &mut stage, &blobs, &wanted, &Limits::STANDARD, &Unwatched)?;
    let staged = stage.finish()?;
    let options = Options::new(Size::Slack(0));
    let layout = Layout::plan(&mut tree, &options, &staged)?;
    Ok(write(&tree, &layout, &file, &Unwatched)?)
}

fn of_a_stream(scratch: &Scratch, source: &Path, report: &mut Report) -> Result<()> {
    let (layout, target) = (scratch.path("layout"), scratch.path("stream.ext4"));
    let archive = make_layout(&layout, source)?;
    let open = |path: &Path| -> Result<Box<dyn Read + Send>> { Ok(unpacked(File::open(path)?)?) };
    let store = scratch.path("ext4-store");
    let [built, committed, unpacking] = medians(
        FEW_ROUNDS,
        [
            &mut || seconds(|| build_of_layout(&layout, &target)),
            &mut || commit_of_layout(&layout, &store),
            &mut || seconds(|| Ok(io::copy(&mut open(&archive)?, &mut io::sink())?)),
        ],
    )?;
    check(&target)?;
    report.row(
        Row::new("the same from an OCI image with a gzip layer", Value::Seconds(built))
            .beside("unpacking alone", Value::Seconds(unpacking))
            .bar(Bar::RatioAtMost(1.3)),
    );
    // Hashed, compressed, on disk and published in the end.
    report.row(
        Row::new("and into a commit, by the command", Value::Seconds(committed))
            .beside("unpacking alone", Value::Seconds(unpacking)),
    );
    remove_dir(&store)?;
    remove_dir(&layout)?;
    Ok(fs::remove_file(&target)?)
}

/// How long the command takes to make the first snapshot of a store.
fn commit_of_layout(layout: &Path, store: &Path) -> Result<f64> {
    if store.exists() {
        remove_dir(store)?;
    }
    let dormouse = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        command.arg("-q").arg("--store").arg(store);
        command
    };
    run(dormouse().arg("init"))?;
    let source = format!("oci:{}", layout.display());
    seconds(|| run(dormouse().args(["ext4", "build", &source, "--commit", "box"])))
}

fn make_disk(seed: &Path, target: &Path) -> Result<Written> {
    let seed = Arc::new(Ext4::open_file(File::open(seed)?)?);
    let mut tree = Tree::new();
    image::read(&mut tree, ROOT, &seed, b"/", &Limits::STANDARD, &Unwatched)?;
    let options = Options::new(Size::Exactly(WORK_BYTES));
    let layout = Layout::plan(&mut tree, &options, &Staged::nothing())?;
    Ok(write(&tree, &layout, &new_file(target)?, &Unwatched)?)
}

fn work_disks(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let source = scratch.path("home");
    make_tree(&source, WORK_FILES, FILES_IN_FOLDER)?;
    let (seed, empty) = (scratch.path("seed.ext4"), scratch.path("empty.ext4"));
    build(&source, &seed, Size::Slack(1 << 20))?;
    let nothing = scratch.path("nothing");
    fs::create_dir_all(&nothing)?;
    build(&nothing, &empty, Size::Slack(1 << 20))?;
    let target = scratch.path("work.ext4");
    let [filled, bare] = medians(
        FEW_ROUNDS,
        [&mut || seconds(|| make_disk(&seed, &target)), &mut || {
            seconds(|| make_disk(&empty, &target))
        }],
    )?;
    make_disk(&seed, &target)?;
    check(&target)?;
    let banger = seconds(|| by_debugfs(&source, &target))?;
    report.row(
        Row::new(format!("work disk of 64 GiB, {WORK_FILES} files"), Value::Seconds(filled))
            .beside("mkfs.ext4 + one debugfs per file", Value::Seconds(banger))
            .bar(Bar::AtMost(0.05)),
    );
    report.row(Row::new("an empty one", Value::Seconds(bare)).bar(Bar::AtMost(0.005)));
    remove_dir(&source)?;
    Ok(fs::remove_file(&target)?)
}

/// As banger does it: a process for each file, all of them root's.
fn by_debugfs(source: &Path, target: &Path) -> Result<()> {
    new_file(target)?.set_len(WORK_BYTES)?;
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(target))?;
    let debugfs =
        |request: &str| run(Command::new("debugfs").args(["-w", "-R", request]).arg(target));
    for dir in fs::read_dir(source)? {
        let dir = dir?;
        let name = dir.file_name().to_string_lossy().into_owned();
        debugfs(&format!("mkdir /{name}"))?;
        for file in fs::read_dir(dir.path())? {
            let file = file?;
            let to = format!("/{name}/{}", file.file_name().to_string_lossy());
            debugfs(&format!("write {} {to}", file.path().display()))?;
        }
    }
    Ok(())
}

/// The most memory that the command takes for a stream of many empty files.
/// How memory grows with a stream's entries, into a file and into a commit.
fn memory(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let (target, store) = (scratch.path("many.ext4"), scratch.path("ext4-store"));
    run(Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .arg("-q")
        .arg("--store")
        .arg(&store)
        .arg("init"))?;
    let bar = 64.0 * MIB + 200.0 * MANY as f64;
    for (what, goal) in [("into a file", "-o"), ("into a commit", "--commit")] {
        let mut build = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        build.arg("-q").arg("--store").arg(&store).args(["ext4", "build", "-", goal]);
        match goal {
            "-o" => build.arg(&target),
            _ => build.arg("many"),
        };
        let most = peak_of_many(&mut build)?;
        report.row(
            Row::new(format!("peak memory, {MANY} entries {what}"), Value::Bytes(most))
                .bar(Bar::AtMost(bar)),
        );
    }
    check(&target)?;
    remove_dir(&store)?;
    Ok(fs::remove_file(&target)?)
}

/// The most memory of a build that is given many entries.
fn peak_of_many(build: &mut Command) -> Result<f64> {
    let mut child = build.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let mut stdin = io::BufWriter::new(child.stdin.take().context("no pipe")?);
    let pid = child.id();
    let watcher = std::thread::spawn(move || {
        let mut most = 0.0_f64;
        // The kernel keeps the maximum; it is gone with the process.
        while let Some(now) = peak_bytes(pid) {
            most = most.max(now);
            std::thread::sleep(Duration::from_millis(5));
        }
        most
    });
    for index in 0..MANY {
        stdin.write_all(&header(&format!("d{:04}/file-number-{index:07}", index / 500)))?;
    }
    stdin.write_all(&[0; 1024])?;
    stdin.flush()?;
    drop(stdin);
    ensure!(child.wait()?.success(), "the build of many files failed");
    Ok(watcher.join().unwrap_or(f64::NAN))
}

fn peak_bytes(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib * 1024.0)
}

fn header(name: &str) -> [u8; 512] {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    for (at, text) in [(100, "0000644"), (108, "0000000"), (116, "0000000"), (124, "00000000000")] {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    header[136..147].copy_from_slice(b"00000000001");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

fn check(image: &Path) -> Result<()> {
    run(Command::new("e2fsck").arg("-fn").arg(image))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}
