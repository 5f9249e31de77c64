//! Snapshots and live disks as files, beside `qemu-storage-daemon`'s FUSE export of a raw file.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dormouse_store::commit::CommitRequest;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_testkit::guest::{Assets, Config, Disk, Guest, cache_dir};
use serde_json::Value as Json;

use crate::report::{Bar, Report, Row, Value};
use crate::rounds::{FEW_ROUNDS, ROUNDS, median, medians, seconds};
use crate::scratch::{Scratch, vm};

const STORE: &str = "fuse";

/// Less than the cache of decoded frames, so that it is warm there when the page cache is not.
const IMAGE_BYTES: usize = 40 << 20;

/// The disk of the random requests.
const DISK_MIB: u64 = 256;

const FORKS: usize = 10;

/// Maps the file privately, touches every page and changes every eighth, says so, and waits.
const FORK: &str = "import mmap,os,sys\n\
    f=os.open(sys.argv[1],os.O_RDONLY)\nsize=os.fstat(f).st_size\n\
    m=mmap.mmap(f,size,flags=mmap.MAP_PRIVATE,prot=mmap.PROT_READ|mmap.PROT_WRITE)\n\
    s=0\nfor at in range(0,size,4096):\n s+=m[at]\n if at%32768==0: m[at]=1\n\
    print(s,flush=True)\nsys.stdin.read()";

/// Reads or writes a file of 64 MiB at random for two seconds, and prints what one request takes. In
/// one line, as a guest's shell takes it.
const LOAD: &str = concat!(
    r#"exec("import mmap,os,random,sys,time\n"#,
    r#"f=os.open(\"/root/load\",os.O_RDWR|os.O_DIRECT)\n"#,
    r#"m=mmap.mmap(-1,4096)\nm[:]=os.urandom(4096)\nn,begun=0,time.monotonic()\n"#,
    r#"while time.monotonic()-begun<2:\n at=random.randrange(16384)*4096\n"#,
    r#" (os.preadv if sys.argv[1]==\"read\" else os.pwritev)(f,[m],at)\n n+=1\n"#,
    r#"print((time.monotonic()-begun)/n)")"#,
);

pub(crate) fn measure(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let image = scratch.path("image");
    fs::write(&image, noise(IMAGE_BYTES))?;
    let store = scratch.store(STORE)?;
    let request = CommitRequest::new(vm()?).image(ImageName::Memory, Source::File(image));
    store.commit(request, Job::quiet())?;
    drop(store);
    dormouse(scratch, &["disk", "create", "box", "--size", &format!("{DISK_MIB}MiB")])?;
    let mounted = Mounted::start(scratch)?;
    sequential(&mounted, report)?;
    random(scratch, &mounted, report)?;
    guests(scratch, &mounted, report)?;
    forks(&mounted, report)
}

fn sequential(mounted: &Mounted, report: &mut Report) -> Result<()> {
    let mut file = File::open(mounted.path("vm/1/memory"))?;
    let mut buf = vec![0; 1 << 20];
    let mut read_all = |file: &mut File| -> Result<f64> {
        // Only the page cache is dropped: frames are decoded since the first round.
        rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed)?;
        std::io::Seek::rewind(file)?;
        seconds(|| {
            while file.read(&mut buf)? > 0 {}
            Ok(())
        })
    };
    read_all(&mut file)?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        times.push(read_all(&mut file)?);
    }
    let rate = Value::BytesPerSecond(IMAGE_BYTES as f64 / median(times));
    report.row(Row::new("sequential read, frames decoded", rate).bar(Bar::AtLeast(1e9)));
    Ok(())
}

fn random(scratch: &Scratch, mounted: &Mounted, report: &mut Report) -> Result<()> {
    let raw = scratch.path("raw");
    File::create(&raw)?.set_len(DISK_MIB << 20)?;
    let theirs = scratch.path("theirs");
    let _daemon = Daemon::start(&raw, &theirs)?;
    let ours = mounted.path("live/box/disk/root");
    // Kept open, or each run of fio would open the live disk anew.
    let _open = File::options().read(true).write(true).open(&ours)?;
    for file in [&ours, &theirs] {
        fio(file, "write", "1m", 1)?;
    }
    for (mode, depth) in [("randread", 1), ("randwrite", 1), ("randread", 16), ("randwrite", 16)] {
        let run = |file: &Path| fio(file, mode, "4k", depth);
        let [ours, theirs] = medians(FEW_ROUNDS, [&mut || run(&ours), &mut || run(&theirs)])?;
        // Times, as a ratio is ours ÷ the other's and less is better.
        report.row(
            Row::new(format!("4 KiB {mode}, {depth} at once, each"), Value::Seconds(1.0 / ours))
                .beside("qemu-storage-daemon", Value::Seconds(1.0 / theirs))
                .bar(Bar::RatioAtMost(1.0 / 0.8)),
        );
    }
    Ok(())
}

/// The same out of guests, each with its root disk on one of the files.
fn guests(scratch: &Scratch, mounted: &Mounted, report: &mut Report) -> Result<()> {
    let assets = Assets::prepare(&cache_dir(), &mut |_| {})?;
    let (raw, shown) = (scratch.path("guest.raw"), scratch.path("guest-theirs"));
    let status = Command::new("cp").arg("--sparse=always").args([&assets.disk(), &raw]).status()?;
    ensure!(status.success(), "cp failed");
    dormouse(scratch, &["commit", "guest", "--disk", raw.to_str().context("a path of UTF-8")?])?;
    dormouse(scratch, &["disk", "create", "guest", "--from", "guest:root"])?;
    let _daemon = Daemon::start(&raw, &shown)?;
    let boot = |disk: PathBuf, name: &str| -> Result<Guest> {
        let dir = scratch.path(name);
        fs::create_dir_all(&dir)?;
        let config = Config { memory_mib: 256, disk: Disk::File(disk), ..Config::in_dir(&dir) };
        let mut guest = Guest::boot(&assets, &config)?;
        guest.check("head -c 67108864 /dev/urandom > /root/load && sync")?;
        Ok(guest)
    };
    let mut ours = boot(mounted.path("live/guest/disk/root"), "guest-a")?;
    let mut theirs = boot(shown, "guest-b")?;
    for mode in ["read", "write"] {
        let [ours, theirs] = medians(
            FEW_ROUNDS,
            [&mut || requests_of(&mut ours, mode), &mut || requests_of(&mut theirs, mode)],
        )?;
        report.row(
            Row::new(format!("a guest's 4 KiB random {mode}, each"), Value::Seconds(ours))
                .beside("qemu-storage-daemon", Value::Seconds(theirs))
                .bar(Bar::RatioAtMost(1.0 / 0.8)),
        );
    }
    Ok(())
}

/// Seconds that a guest's request takes, past its page cache.
fn requests_of(guest: &mut Guest, mode: &str) -> Result<f64> {
    let text = guest.check(&format!("python3 -c '{LOAD}' {mode}"))?;
    text.trim().parse().context("the guest tells no time")
}

fn forks(mounted: &Mounted, report: &mut Report) -> Result<()> {
    // As the kernel prints it.
    let file = mounted.path("vm/1/memory").canonicalize()?;
    let one = clean_pages(&file, 1)?;
    let ten = clean_pages(&file, FORKS)?;
    ensure!(one > 0.0, "{} is mapped nowhere", file.display());
    report.row(
        Row::new(format!("clean pages of {FORKS} forks"), Value::Bytes(ten))
            .beside("of one", Value::Bytes(one))
            .bar(Bar::RatioAtMost(1.1)),
    );
    Ok(())
}

/// Bytes of memory that the clean pages of so many private mappings take.
fn clean_pages(file: &Path, forks: usize) -> Result<f64> {
    let mut running = Vec::new();
    for _ in 0..forks {
        let mut child = Command::new("python3")
            .args(["-c", FORK])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        let output = child.stdout.take().context("it was piped")?;
        running.push((Ended(child), stdin, output));
    }
    let mut bytes = 0;
    for (_, _, output) in &mut running {
        BufReader::new(output).read_line(&mut String::new())?;
    }
    for (child, _, _) in &running {
        bytes += clean_part(child.0.id(), file)?;
    }
    drop(running);
    Ok(bytes as f64)
}

/// A process's part of the clean pages of a file: those that it shares are divided.
fn clean_part(pid: u32, file: &Path) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let name = file.to_str().context("a path of UTF-8")?;
    let (mut is_ours, mut kib) = (false, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(key) = words.next() else { continue };
        let value = words.next().and_then(|value| value.parse::<u64>().ok()).unwrap_or(0);
        match key.strip_suffix(':') {
            None => is_ours = line.ends_with(name),
            Some("Pss") if is_ours => kib += value,
            Some("Pss_Dirty") if is_ours => kib -= value,
            Some(_) => {}
        }
    }
    Ok(kib * 1024)
}

/// Requests a second.
fn fio(file: &Path, mode: &str, block: &str, depth: u32) -> Result<f64> {
    let output = Command::new("fio")
        .args(["--name=x", "--direct=1", "--output-format=json", "--randrepeat=0"])
        .args(["--ioengine=libaio", &format!("--iodepth={depth}"), &format!("--bs={block}")])
        .args([format!("--rw={mode}"), format!("--filename={}", file.display())])
        .args([format!("--size={DISK_MIB}m"), "--allow_file_create=0".to_owned()])
        .args(if mode.starts_with("rand") { &["--time_based", "--runtime=2"][..] } else { &[] })
        .output()
        .context("cannot start fio")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    let json: Json = serde_json::from_slice(&output.stdout)?;
    let side = if mode.ends_with("read") { "read" } else { "write" };
    json["jobs"][0][side]["iops"].as_f64().context("fio tells no rate")
}

fn dormouse(scratch: &Scratch, arguments: &[&str]) -> Result<()> {
    let status = Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .arg("--store")
        .arg(scratch.path(STORE))
        .args(arguments)
        .stdout(Stdio::null())
        .status()?;
    ensure!(status.success(), "dormouse {arguments:?} failed");
    Ok(())
}

/// A process that is ended.
#[derive(Debug)]
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `dormouse mount`.
#[derive(Debug)]
struct Mounted {
    _process: Ended,
    dir: PathBuf,
}

impl Mounted {
    fn start(scratch: &Scratch) -> Result<Mounted> {
        let dir = scratch.path("mnt");
        fs::create_dir_all(&dir)?;
        let mut child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .arg("--store")
            .arg(scratch.path(STORE))
            .args(["-q", "mount"])
            .arg(&dir)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("it was piped")?;
        let mounted = Mounted { _process: Ended(child), dir };
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        ensure!(!line.is_empty(), "dormouse mount failed");
        Ok(mounted)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Before the process ends, so that no dead mount is left; it tells itself if it is in use.
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
    }
}

/// `qemu-storage-daemon` with a raw file that it shows as another one.
#[derive(Debug)]
struct Daemon {
    _process: Ended,
    _monitor: Option<ChildStdin>,
    shown: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It is killed, and would leave a dead mount.
        let _ = Command::new("umount").arg("-l").arg(&self.shown).status();
    }
}

impl Daemon {
    fn start(raw: &Path, shown: &Path) -> Result<Daemon> {
        File::create(shown)?.flush()?;
        let node = format!("driver=file,node-name=n,filename={}", raw.display());
        let export = format!(
            "type=fuse,id=e,node-name=n,mountpoint={},writable=on,allow-other=off",
            shown.display()
        );
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node, "--export", &export])
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot start qemu-storage-daemon")?;
        let monitor = child.stdin.take();
        let mut process = Ended(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        while fs::metadata(shown)?.len() == 0 {
            if let Some(status) = process.0.try_wait()? {
                bail!("qemu-storage-daemon ended with {status}");
            }
            ensure!(Instant::now() < deadline, "qemu-storage-daemon shows no file");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Daemon { _process: process, _monitor: monitor, shown: shown.to_owned() })
    }
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}
