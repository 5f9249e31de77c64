//! The small VMM lets a right handler pass, and catches every wrong one.

use std::collections::HashSet;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dormouse_serve::uffd::handshake::{self, Handshake, Layout, Limits, SocketEnd};
use dormouse_sys::process_memory;
use dormouse_sys::userfaultfd::{Event, MESSAGE_BYTES, Protection, Stop};
use dormouse_testkit::vmm::{
    Access, Backing, Config, Cpus, EXIT_HANG, EXIT_SETUP, EXIT_WRONG_BYTE, Ended, HugePages, Lie,
    Manner, Mix, PAGE_BYTES, PageKind, RegionConfig, SmallVmm, Version, checksum, image,
    write_image,
};
use rustix::event::{PollFd, PollFlags, Timespec};

const SEED: u64 = 11;
const PAGES: u64 = 2048;

/// What a handler does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flaw {
    None,
    /// One bit of one page.
    WrongBit(u64),
    /// Zeros for a page that has content.
    Zeros(u64),
    /// A page of its neighbour's content.
    Neighbour(u64),
    /// What was given back is served from the image again.
    ForgetsRemovals,
    /// As a second thread does that looked at a page's state before a removal was read and installs
    /// after: the image comes back where the guest gave memory up.
    InstallsStale,
    /// A fault is never answered.
    Drops(u64),
}

/// The simplest handler there is: one thread, one page at a time.
struct Handler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Handler {
    fn start(flaw: Flaw) -> Handler {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("memory");
        let listener = UnixListener::bind(&socket).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            listener.set_nonblocking(true).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let limits = Limits { timeout: Duration::from_secs(60) };
                        let vmm = handshake::receive(&stream, limits).unwrap();
                        handshake::check(&vmm.regions, image_bytes(&vmm), Layout::Running).unwrap();
                        return serve(&vmm, flaw, &stopped);
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Handler { stop, thread: Some(thread), socket, _folder: folder }
    }

    fn backing(&self) -> Backing {
        Backing::firecracker(&self.socket, Version::V1_12)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the handler panicked");
    }
}

fn image_bytes(vmm: &Handshake) -> u64 {
    vmm.regions.iter().map(|region| region.size).sum()
}

fn serve(vmm: &Handshake, flaw: Flaw, stop: &AtomicBool) {
    let page_of = image(SEED, image_bytes(vmm) / PAGE_BYTES as u64);
    let mut removed: HashSet<u64> = HashSet::new();
    let mut waiting: Vec<u64> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let mut poll = [PollFd::new(&vmm.uffd, PollFlags::IN)];
        let patience = if waiting.is_empty() { 10_000_000 } else { 100_000 };
        let timeout = Timespec { tv_sec: 0, tv_nsec: patience };
        rustix::event::poll(&mut poll, Some(&timeout)).unwrap();
        let mut messages = [[0; MESSAGE_BYTES]; 64];
        let Ok(count) = vmm.uffd.read(&mut messages) else { return };
        for message in &messages[..count] {
            match Event::parse(message) {
                Event::Fault { address, .. } => waiting.push(address),
                Event::Remove(range) if flaw != Flaw::ForgetsRemovals => {
                    if flaw == Flaw::InstallsStale {
                        install_stale(vmm, range.start, &page_of);
                    }
                    removed.extend(range.step_by(PAGE_BYTES));
                }
                Event::Remove(_) => {}
                Event::Other(kind) => panic!("event {kind}"),
            }
        }
        waiting.retain(|&address| {
            let region =
                vmm.regions.iter().find(|region| region.addresses().contains(&address)).unwrap();
            let address = address / region.page_bytes * region.page_bytes;
            let first = (region.offset + address - region.address) / PAGE_BYTES as u64;
            let content: Vec<u8> = (0..region.page_bytes / PAGE_BYTES as u64)
                .flat_map(|at| {
                    let page = first + at;
                    let mut bytes = page_of(page);
                    match flaw {
                        _ if removed.contains(&(address + at * PAGE_BYTES as u64)) => bytes.fill(0),
                        Flaw::WrongBit(bad) if bad == page => bytes[1234] ^= 16,
                        Flaw::Zeros(bad) if bad == page => bytes.fill(0),
                        Flaw::Neighbour(bad) if bad == page => bytes = page_of(page + 1),
                        _ => {}
                    }
                    bytes
                })
                .collect();
            if flaw == Flaw::Drops(first) {
                return false;
            }
            match vmm.uffd.copy(address, &content, Protection::Writable).stop {
                None | Some(Stop::Gone) => false,
                Some(Stop::Changing) => true,
                Some(Stop::Exists) => {
                    vmm.uffd.wake(&(address..address + region.page_bytes)).unwrap();
                    false
                }
                Some(stop) => panic!("{stop:?}"),
            }
        });
    }
}

/// Waits until the removal is over, then installs what was there before.
fn install_stale(vmm: &Handshake, address: u64, page_of: impl Fn(u64) -> [u8; PAGE_BYTES]) {
    let region = vmm.regions.iter().find(|region| region.addresses().contains(&address)).unwrap();
    let page = (region.offset + address - region.address) / PAGE_BYTES as u64;
    for _ in 0..100 {
        match vmm.uffd.copy(address, &page_of(page), Protection::Writable).stop {
            Some(Stop::Changing) => std::thread::sleep(Duration::from_micros(50)),
            _ => return,
        }
    }
}

/// A page with content of its own.
fn full_page() -> u64 {
    let page_of = image(SEED, PAGES);
    let full = |page: &u64| page_of(*page) != [0; 4096] && page_of(*page) != page_of(*page + 1);
    (100..PAGES).find(full).unwrap()
}

fn config(handler: &Handler) -> Config {
    Config::small(SEED, PAGES, handler.backing())
}

/// What became of a VMM over a handler with a flaw.
fn ended(flaw: Flaw, change: impl FnOnce(&mut Config)) -> Ended {
    let handler = Handler::start(flaw);
    let mut config = config(&handler);
    change(&mut config);
    let mut vmm = SmallVmm::spawn(&config).unwrap();
    let error = vmm.run(200_000).and_then(|_| vmm.verify()).expect_err("a flaw that nobody saw");
    error.downcast::<Ended>().unwrap()
}

#[test]
fn a_right_handler_passes() {
    let handler = Handler::start(Flaw::None);
    let mut vmm = SmallVmm::spawn(&config(&handler)).unwrap();
    let report = vmm.run(50_000).unwrap();
    assert_eq!(report.operations, 50_000);
    assert!(report.given_back > 1000 && report.fills > 1000 && report.writes > 1000, "{report:?}");
    assert!(report.unjudged < report.reads / 10, "{report:?}");
    vmm.verify().unwrap();
    assert!(vmm.quit().unwrap().reads >= report.reads + PAGES);
}

#[test]
fn every_version_and_manner_of_firecracker_is_served() {
    use Manner::{AmongOthers, AtOnce, InPieces, TableFirst};
    let cases = [
        (Version::V1_1, AtOnce),
        (Version::V1_7, AtOnce),
        (Version::V1_7, TableFirst),
        (Version::V1_12, InPieces),
        (Version::V1_12, TableFirst),
        (Version::V1_12, AmongOthers),
    ];
    for (version, manner) in cases {
        let handler = Handler::start(Flaw::None);
        let socket = handler.socket.clone();
        let mix = if version == Version::V1_1 { Mix::KEEPING } else { Mix::ALL };
        let backing = Backing::Uffd { socket, version, manner };
        let mut vmm = SmallVmm::spawn(&Config { backing, mix, ..config(&handler) }).unwrap();
        vmm.run(2000).unwrap_or_else(|error| panic!("{version:?} {manner:?}: {error:#}"));
        vmm.quit().unwrap();
    }
}

#[test]
fn a_wrong_bit_is_caught() {
    let ended = ended(Flaw::WrongBit(full_page()), |config| config.mix = Mix::READING);
    assert_eq!(ended.code, Some(EXIT_WRONG_BYTE), "{ended}");
    let expected = format!("wrong bytes in page {}, word 154 ", full_page());
    assert!(ended.message.contains(&expected), "{ended}");
}

#[test]
fn zeros_for_content_are_caught() {
    let ended = ended(Flaw::Zeros(full_page()), |config| config.mix = Mix::READING);
    assert_eq!(ended.code, Some(EXIT_WRONG_BYTE), "{ended}");
}

#[test]
fn another_pages_content_is_caught() {
    let ended = ended(Flaw::Neighbour(full_page()), |config| config.mix = Mix::READING);
    assert_eq!(ended.code, Some(EXIT_WRONG_BYTE), "{ended}");
}

/// Nothing is written here, so that only the image can be what comes back.
#[test]
fn a_forgotten_removal_is_caught() {
    let mix = Mix { give_back: 10, ..Mix::READING };
    let ended = ended(Flaw::ForgetsRemovals, |config| config.mix = mix);
    assert_eq!(ended.code, Some(EXIT_WRONG_BYTE), "{ended}");
    assert!(ended.message.contains("expected 0x0000000000000000"), "{ended}");
}

/// The race that a handler with several threads loses unless it reads and marks under one lock.
#[test]
fn a_stale_install_is_caught() {
    let mix = Mix { give_back: 10, ..Mix::READING };
    let ended = ended(Flaw::InstallsStale, |config| config.mix = mix);
    assert_eq!(ended.code, Some(EXIT_WRONG_BYTE), "{ended}");
    assert!(ended.message.contains("expected 0x0000000000000000"), "{ended}");
}

#[test]
fn a_fault_that_is_never_answered_is_a_hang() {
    let ended = ended(Flaw::Drops(full_page()), |config| {
        (config.mix, config.hang_ms) = (Mix::READING, 3000);
    });
    assert_eq!(ended.code, Some(EXIT_HANG), "{ended}");
    assert!(ended.message.contains(&format!("page {} ", full_page())), "{ended}");
}

#[test]
fn lies_are_told_as_they_should_be() {
    let cases = [
        (Lie::NoDescriptor, "without a descriptor"),
        (Lie::WrongDescriptor, "none of its 1 descriptors"),
        (Lie::CutShort, "closed its memory socket"),
        (Lie::Silence, "sent nothing"),
        (Lie::NoTable, "not a memory table"),
    ];
    let bad_tables = [Lie::BeyondImage, Lie::MissingRegion, Lie::Overlap, Lie::Misaligned];
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("memory");
    let listener = UnixListener::bind(&socket).unwrap();
    let spawn = |lie| {
        let (socket, version) = (socket.clone(), Version::V1_12);
        let backing = Backing::Uffd { socket, version, manner: Manner::Lie(lie) };
        let vmm = SmallVmm::spawn(&Config::small(SEED, PAGES, backing)).unwrap();
        (vmm, listener.accept().unwrap().0)
    };
    for (lie, expected) in cases {
        let (_vmm, stream) = spawn(lie);
        let brief = Limits { timeout: Duration::from_millis(300) };
        let error = handshake::receive(&stream, brief).expect_err("a lie");
        assert!(error.to_string().contains(expected), "{lie:?}: {error}");
    }
    for lie in bad_tables {
        let (vmm, stream) = spawn(lie);
        let taken = handshake::receive(&stream, Limits::STANDARD).unwrap();
        let bytes = PAGES * PAGE_BYTES as u64;
        let refused = handshake::check(&taken.regions, bytes, Layout::Running);
        assert!(refused.is_err(), "{lie:?} passed");
        assert_eq!(taken.peer.pid(), vmm.pid());
        taken.peer.kill().unwrap();
        assert_eq!(vmm.wait().unwrap().signal, Some(9));
    }
    let (_vmm, stream) = spawn(Lie::Elsewhere);
    let taken = handshake::receive(&stream, Limits::STANDARD).unwrap();
    let refused = taken.uffd.copy(taken.regions[0].address, &[1; 4096], Protection::Writable);
    assert!(matches!(refused.stop, Some(Stop::Unmapped)), "{refused:?}");
}

#[test]
fn nobody_to_serve_memory_is_an_error() {
    let backing = Backing::firecracker(Path::new("/nonexistent/memory"), Version::V1_12);
    let error = SmallVmm::spawn(&Config::small(SEED, 64, backing)).unwrap_err();
    let ended = error.downcast::<Ended>().unwrap();
    assert_eq!(ended.code, Some(EXIT_SETUP), "{ended}");
}

/// The end of the socket is the end of the VMM, for versions that keep it.
#[test]
fn the_socket_ends_with_the_vmm() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("memory");
    let listener = UnixListener::bind(&socket).unwrap();
    for (version, expected) in
        [(Version::V1_7, SocketEnd::Nothing), (Version::V1_12, SocketEnd::VmGone)]
    {
        let backing = Backing::firecracker(&socket, version);
        let vmm = SmallVmm::spawn(&Config::small(SEED, 64, backing)).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let taken = handshake::receive(&stream, Limits::STANDARD).unwrap();
        assert_eq!(taken.socket_end, expected);
        let is_closed = || {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            let mut poll = [PollFd::new(&stream, PollFlags::IN)];
            rustix::event::poll(&mut poll, Some(&now)).unwrap() > 0
        };
        assert_eq!(is_closed(), expected == SocketEnd::Nothing);
        assert!(!taken.peer.has_ended().unwrap());
        vmm.kill().unwrap();
        assert!(is_closed() && taken.peer.has_ended().unwrap());
    }
}

/// While it is paused its memory stands still, and is what it says it must be.
#[test]
fn a_paused_vmm_can_be_captured() {
    let handler = Handler::start(Flaw::None);
    let folder = tempfile::tempdir().unwrap();
    let mut vmm = SmallVmm::spawn(&config(&handler)).unwrap();
    vmm.start(500_000).unwrap();
    for round in 0..3 {
        vmm.pause().unwrap();
        let expected = folder.path().join("expected");
        vmm.write_expected(&expected).unwrap();
        let expected = std::fs::read(expected).unwrap();
        for region in vmm.regions() {
            let mut got = vec![0; usize::try_from(region.size).unwrap()];
            let addresses = region.address..region.address + region.size;
            process_memory::read(vmm.pid(), &[addresses], &mut got).unwrap();
            let offset = usize::try_from(region.offset).unwrap();
            assert!(got == expected[offset..offset + got.len()], "round {round}");
        }
        vmm.resume().unwrap();
    }
    assert_eq!(vmm.idle().unwrap().operations, 500_000);
    vmm.quit().unwrap();
}

#[test]
fn what_happened_to_pages_is_told() {
    let handler = Handler::start(Flaw::None);
    let mut vmm = SmallVmm::spawn(&config(&handler)).unwrap();
    assert!(vmm.pages().unwrap().iter().all(|run| !run.touched));
    let touched = vmm.touch(&[9, 3, 4, 2000]).unwrap();
    assert_eq!(touched.latencies_ns.len(), 4);
    assert!(touched.latencies_ns.iter().sum::<u64>() <= touched.elapsed_ns);
    vmm.touch_with(&[3, 77], Access::Write).unwrap();
    let pages = |vmm: &mut SmallVmm, wanted: fn(&dormouse_testkit::vmm::PageRun) -> bool| {
        let runs = vmm.pages().unwrap();
        let flat = runs.iter().filter(|run| wanted(run));
        flat.flat_map(|run| run.first..run.first + run.pages).collect::<Vec<u64>>()
    };
    assert_eq!(pages(&mut vmm, |run| run.touched), [3, 4, 9, 77, 2000]);
    assert_eq!(pages(&mut vmm, |run| run.written), [3, 77]);
    assert!(pages(&mut vmm, |run| run.given_back).is_empty());
    vmm.mark().unwrap();
    assert!(pages(&mut vmm, |run| run.touched).is_empty());
    assert!(vmm.touch(&[PAGES]).is_err(), "beyond memory");
}

#[test]
fn a_private_file_is_checked_like_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    write_image(SEED, PAGES, &path).unwrap();
    let config = Config::small(SEED, PAGES, Backing::PrivateFile(path.clone()));
    let mut vmm = SmallVmm::spawn(&config).unwrap();
    assert_eq!(vmm.checksum().unwrap(), checksum(PAGES, image(SEED, PAGES)));
    vmm.run(50_000).unwrap();
    vmm.verify().unwrap();
    vmm.quit().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    assert_eq!(
        checksum(PAGES, |page| {
            let at = usize::try_from(page).unwrap() * PAGE_BYTES;
            *bytes[at..].first_chunk().unwrap()
        }),
        checksum(PAGES, image(SEED, PAGES)),
        "the file was written to"
    );

    bytes[usize::try_from(full_page()).unwrap() * PAGE_BYTES + 5] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let mut vmm = SmallVmm::spawn(&config).unwrap();
    let ended = vmm.verify().unwrap_err().downcast::<Ended>().unwrap();
    assert_eq!(ended.code, Some(EXIT_WRONG_BYTE), "{ended}");
}

#[test]
fn huge_pages_are_served_and_given_back_whole() {
    let _reserved = HugePages::reserve(16).unwrap();
    let handler = Handler::start(Flaw::None);
    let regions = [6, 4].map(|huge| RegionConfig { pages: huge * 512, kind: PageKind::Huge });
    let config = Config { regions: regions.to_vec(), ..config(&handler) };
    let mut vmm = SmallVmm::spawn(&config).unwrap();
    assert_eq!(vmm.regions()[1].page_bytes, 2 << 20);
    let report = vmm.run(20_000).unwrap();
    assert!(report.given_back > 0 && report.given_back.is_multiple_of(512), "{report:?}");
    vmm.verify().unwrap();
    vmm.quit().unwrap();
}

/// A guest's own accesses, where there is KVM: right ones pass, and wrong ones are caught.
#[test]
fn host_virtual_cpus_fault_like_a_guest() {
    if !Cpus::has_kvm() {
        assert!(std::env::var_os("DORMOUSE_TEST_HOST").is_none(), "there is no KVM here");
        eprintln!("SKIPPED: there is no KVM here");
        return;
    }
    let handler = Handler::start(Flaw::None);
    let mut vmm = SmallVmm::spawn(&Config { cpus: Cpus::Kvm, ..config(&handler) }).unwrap();
    let report = vmm.run(20_000).unwrap();
    assert!(report.given_back > 0 && report.writes > 1000, "{report:?}");
    vmm.verify().unwrap();
    vmm.quit().unwrap();

    let mix = Mix { kernel_read: 0, ..Mix::READING };
    for flaw in [Flaw::WrongBit(full_page()), Flaw::InstallsStale] {
        let give_back = if flaw == Flaw::InstallsStale { 10 } else { 0 };
        let ended = ended(flaw, |config| {
            (config.cpus, config.mix) = (Cpus::Kvm, Mix { give_back, ..mix });
        });
        assert_eq!(ended.code, Some(EXIT_WRONG_BYTE), "{flaw:?}: {ended}");
    }
}

/// A test that fails leaves nothing behind: neither threads that wait for pages keep it alive.
#[test]
fn a_dropped_vmm_is_gone_even_while_its_threads_wait() {
    let handler = Handler::start(Flaw::Drops(full_page()));
    let mut vmm = SmallVmm::spawn(&config(&handler)).unwrap();
    let pid = vmm.pid();
    vmm.start(1_000_000_000).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let before = Instant::now();
    drop(vmm);
    assert!(before.elapsed() < Duration::from_secs(30));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}
