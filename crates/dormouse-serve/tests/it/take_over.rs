//! The process that serves a guest is killed under load, at any moment, and another takes over: what a
//! guest cannot live without is kept by a holder meanwhile.
//!
//! The process is this binary, started again ([`server_process`]). `DORMOUSE_PAGER_KILLS` is how often
//! it is killed.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use dormouse_live::pages::{PAGE_BYTES, Pages, Tracking};
use dormouse_serve::holder::{Holder, Until, hold};
use dormouse_serve::uffd::handshake::{self, Handshake, Limits, Region, SocketEnd};
use dormouse_serve::uffd::{Pager, Vm, VmConfig};
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{Features, Userfaultfd};
use dormouse_testkit::vmm::{Backing, Config, Mix, SmallVmm, Version, image};

use crate::guests::{Image, LONG, PAGE, apply, first_difference, pager_config};

/// The folder with the sockets, for a process that is to be a server.
const FOLDER: &str = "DORMOUSE_TEST_SERVER";

/// The configuration of its guest, as JSON.
const GUEST: &str = "DORMOUSE_TEST_SERVER_GUEST";

const NAME: &str = "vm";

fn memory_socket(folder: &Path) -> PathBuf {
    folder.join("memory")
}

fn holder_at(folder: &Path) -> Holder {
    Holder::at(folder.join("holder"))
}

/// A server, where it is asked for one.
#[test]
fn server_process() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let config: Config = serde_json::from_str(&std::env::var(GUEST).unwrap()).unwrap();
    let pager = Pager::start(pager_config(2)).unwrap();
    let vm = match take_over(&pager, &folder, &config) {
        Some(vm) => vm,
        None => {
            let listener = UnixListener::bind(memory_socket(&folder)).unwrap();
            println!("listening");
            serve(&pager, &folder, &config, &listener)
        }
    };
    println!("serving");
    // Prefetching and captures are killed in their midst, too.
    pager.prefetch(&vm, vec![0..config.image_bytes() / 2]);
    loop {
        if let Ok(capture) = vm.seal() {
            let mut bytes = vec![0; config.image_bytes() as usize];
            // Whatever came of it, it is not stored.
            drop(apply(&capture, &mut bytes));
        }
        thread::sleep(Duration::from_millis(3));
    }
}

fn serve(pager: &Pager, folder: &Path, config: &Config, listener: &UnixListener) -> Arc<Vm> {
    let (stream, _) = listener.accept().unwrap();
    let handshake = handshake::receive(&stream, Limits { timeout: LONG }).unwrap();
    let source = Arc::new(Image::of(config));
    let vm = pager.serve(handshake, stream, source, VmConfig::STANDARD, |_, _| {}).unwrap();
    let regions: Vec<_> =
        vm.regions().map(|r| (r.address, r.size, r.offset, r.page_bytes)).collect();
    let note = serde_json::to_string(&regions).unwrap();
    let descriptors = [vm.as_fd(), vm.pages().fd().as_fd(), vm.peer().pidfd().as_fd()];
    holder_at(folder).keep(NAME, &note, &descriptors, Until::LastIsReadable).unwrap();
    vm
}

fn take_over(pager: &Pager, folder: &Path, config: &Config) -> Option<Arc<Vm>> {
    let kept = holder_at(folder).take(NAME).unwrap()?;
    let regions: Vec<(u64, u64, u64, u64)> = serde_json::from_str(&kept.note).unwrap();
    let region = |(address, size, offset, page_bytes)| Region { address, size, offset, page_bytes };
    let [uffd, pages, pidfd] = <[OwnedFd; 3]>::try_from(kept.descriptors).unwrap();
    let handshake = Handshake {
        regions: regions.into_iter().map(region).collect(),
        uffd: Userfaultfd::from_fd(uffd).unwrap(),
        features: Features::EVENT_REMOVE,
        others: Vec::new(),
        peer: Peer::from_pidfd(pidfd).unwrap(),
        socket_end: SocketEnd::Nothing,
    };
    let (source, pages) = (Arc::new(Image::of(config)), Pages::adopt(pages).unwrap());
    let (tell, _) = channel();
    let tell = move |_: &Vm, end| tell.send(format!("{end:?}")).unwrap_or_default();
    Some(pager.take_over(handshake, None, source, pages, VmConfig::STANDARD, tell).unwrap())
}

/// A server in a process; killed when dropped.
struct Server(Child, BufReader<std::process::ChildStdout>);

impl Server {
    fn start(folder: &Path, config: &Config) -> Server {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["take_over::server_process", "--exact", "--nocapture", "--test-threads=1"])
            .env(FOLDER, folder)
            .env(GUEST, serde_json::to_string(config).unwrap())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Server(child, stdout)
    }

    fn wait_for(&mut self, what: &str) {
        let mut line = String::new();
        while !line.trim_end().ends_with(what) {
            line.clear();
            assert_ne!(self.1.read_line(&mut line).unwrap(), 0, "the server ended before {what}");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_server_that_is_killed_under_load_is_taken_over() {
    let kills = std::env::var("DORMOUSE_PAGER_KILLS").ok().and_then(|text| text.parse().ok());
    let kills: u64 = kills.unwrap_or(12);
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("holder")).unwrap();
    let holding = thread::spawn(move || hold(&listener, LONG, &mut |_| {}));
    let backing = Backing::firecracker(&memory_socket(folder.path()), Version::V1_12);
    let mix = Mix { give_back: 6, ..Mix::ALL };
    let config = Config { mix, threads: 4, ..Config::small(9, 6000, backing) };

    let mut server = Server::start(folder.path(), &config);
    server.wait_for("listening");
    let mut small = SmallVmm::spawn(&config).unwrap();
    server.wait_for("serving");
    small.start(u64::MAX / 2).unwrap();
    for round in 0..kills {
        // Sometimes as soon as it has taken over.
        thread::sleep(Duration::from_millis(round * 37 % 60));
        drop(server);
        server = Server::start(folder.path(), &config);
        server.wait_for("serving");
        small.mark().unwrap();
    }
    drop(server);
    // At last this process takes over, and captures: what is stored is what the guest says it must be.
    let pager = Pager::start(pager_config(2)).unwrap();
    let vm = take_over(&pager, folder.path(), &config).unwrap();
    assert_eq!(vm.is_tracked(), VmConfig::STANDARD.tracking == Tracking::Exact);
    small.pause().unwrap();
    let expected = folder.path().join("expected");
    small.write_expected(&expected).unwrap();
    let expected = std::fs::read(expected).unwrap();
    let mut taken: Vec<u8> = (0..config.pages()).flat_map(image(9, config.pages())).collect();
    let capture = vm.seal().unwrap();
    apply(&capture, &mut taken).unwrap();
    capture.finish();
    assert_eq!(first_difference(&taken, &expected), None);
    let mut whole = vec![0; 6000 * PAGE];
    let mut at = 0;
    for region in small.regions() {
        let bytes = &mut whole[at..at + (region.size as usize)];
        let addresses = region.address..region.address + region.size;
        dormouse_sys::process_memory::read(small.pid(), &[addresses], bytes).unwrap();
        at += bytes.len();
    }
    assert_eq!(first_difference(&whole, &expected), None);
    assert_eq!(at as u64, 6000 * PAGE_BYTES);
    small.kill().unwrap();
    // The holder lets go by itself.
    holding.join().unwrap().unwrap();
    std::io::stdout().flush().unwrap();
}

/// Page states of another guest, or cut short, are refused before anything is done with them; the
/// guest may still be taken over with the right ones.
#[test]
fn a_guest_is_not_taken_over_with_the_wrong_states() {
    use crate::guests::{number_of, observed, own_handshake, region};
    let (memory, uffd) = observed(20);
    let pager = Pager::start(pager_config(2)).unwrap();
    let attempt = |pages: u64, image: u64| {
        let uffd = Userfaultfd::from_fd(rustix::io::dup(&uffd).unwrap()).unwrap();
        let handshake = own_handshake(uffd, vec![region(&memory, 20)]);
        let source = Arc::new(Image::numbered(image));
        let pages = Pages::new(pages).unwrap();
        pager.take_over(handshake, None, source, pages, VmConfig::STANDARD, |_, _| {})
    };
    for (pages, image) in [(19, 20), (20, 19), (1, 1)] {
        let refused = attempt(pages, image).unwrap_err();
        assert_eq!(refused.kind(), dormouse_serve::error::ErrorKind::InvalidInput, "{refused}");
    }
    let vm = attempt(20, 20).unwrap();
    let byte = memory.bytes()[19 * PAGE].load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(byte, number_of(19));
    pager.release(&vm);
}
