//! A mount outlives the process that serves it: killed under load, its successor goes on, and no
//! request fails, hangs or is lost.
//!
//! The servers are this test's own program, started again; the test holds the descriptors.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use dormouse_serve::fuse::{Handover, Mount, Tree};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::fuse_tree::{FileDevice, Files, OPTIONS, Place};
use crate::memory::Memory;

const IMAGE_BLOCKS: usize = 4096;
const DISK_BLOCKS: u64 = 1024;
const WRITERS: u64 = 3;

/// Where a server finds the test's socket and its own files.
const VARIABLE: &str = "DORMOUSE_TEST_TAKEOVER";

fn image() -> Vec<u8> {
    Memory::pattern(IMAGE_BLOCKS * 4096)
}

fn send(stream: &UnixStream, handover: &Handover) {
    let fds = [handover.device.as_fd(), handover.state.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(stream, &[IoSlice::new(b"d")], &mut ancillary, SendFlags::empty()).unwrap();
}

fn receive(stream: &UnixStream) -> Handover {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .unwrap();
    let mut fds: Vec<OwnedFd> = ancillary
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        })
        .collect();
    assert_eq!(fds.len(), 2);
    let state = fds.pop().unwrap();
    Handover { device: fds.pop().unwrap(), state }
}

/// Not a test of its own: the server that the test below starts, does nothing without it.
#[test]
fn server_of_the_test_below() {
    let Some(socket) = env::var_os(VARIABLE).map(PathBuf::from) else { return };
    let files = Arc::new(Files::default());
    let mut memory = Memory::new(image());
    memory.read_only = true;
    files.images.lock().unwrap().push(("memory".to_owned(), Arc::new(memory)));
    let disk = OpenOptions::new().read(true).write(true).open(socket.with_file_name("disk"));
    files.disks.lock().unwrap().push(("root".to_owned(), Arc::new(FileDevice(disk.unwrap()))));
    let stream = UnixStream::connect(&socket).unwrap();
    let mut what = [0];
    (&stream).read_exact(&mut what).unwrap();
    let tree = Arc::clone(&files) as Arc<dyn Tree>;
    let mount = match what[0] {
        b'm' => Mount::new(tree, &socket.with_file_name("mnt"), &OPTIONS).unwrap(),
        _ => Mount::resume(tree, receive(&stream), &OPTIONS).unwrap(),
    };
    send(&stream, &mount.handover().unwrap());
    mount.wait().unwrap();
}

struct Server {
    child: Child,
    stream: UnixStream,
}

impl Server {
    fn start(place: &Place, listener: &UnixListener) -> Server {
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "takeover::server_of_the_test_below", "--nocapture"])
            .env(VARIABLE, place.beside("socket"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Server { child, stream }
    }

    fn mount(&self) -> Handover {
        rustix::io::write(&self.stream, b"m").unwrap();
        receive(&self.stream)
    }

    fn resume(&self, handover: &Handover) {
        rustix::io::write(&self.stream, b"r").unwrap();
        send(&self.stream, handover);
        // It answers when it serves; what it sends are copies of what we have.
        drop(receive(&self.stream));
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everybody who uses the mount, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
    tids: Arc<Mutex<Vec<i32>>>,
}

impl Load {
    fn start(mnt: &Path) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let tids = Arc::<Mutex<Vec<i32>>>::default();
        let mut threads = Vec::new();
        let mut spawn = |mut round: Box<dyn FnMut(u64) + Send>| {
            let (stop, done, tids) = (Arc::clone(&stop), Arc::clone(&done), Arc::clone(&tids));
            threads.push(thread::spawn(move || {
                tids.lock().unwrap().push(rustix::thread::gettid().as_raw_nonzero().get());
                let mut number = 1;
                while !stop.load(Ordering::SeqCst) {
                    round(number);
                    number += 1;
                    done.fetch_add(1, Ordering::SeqCst);
                }
            }));
        };
        for writer in 0..WRITERS {
            let file =
                OpenOptions::new().read(true).write(true).open(mnt.join("disks/root")).unwrap();
            let mut last = vec![0; usize::try_from(DISK_BLOCKS).unwrap()];
            spawn(Box::new(move |number| {
                // Each has blocks of its own, which it reads back before it writes them.
                let at = number.wrapping_mul(0x9e37_79b9) % (DISK_BLOCKS / WRITERS);
                let block = (at * WRITERS + writer) * 4096;
                let known = &mut last[usize::try_from(at).unwrap()];
                let mut read = [0; 4096];
                file.read_exact_at(&mut read, block).unwrap();
                assert_eq!(u64::from_le_bytes(*read.first_chunk().unwrap()), *known);
                assert!(read.chunks(8).all(|word| word == &read[..8]), "a torn block");
                let bytes: Vec<u8> = number.to_le_bytes().repeat(512);
                file.write_all_at(&bytes, block).unwrap();
                *known = number;
                if number % 16 == 0 {
                    file.sync_data().unwrap();
                }
            }));
        }
        let file = File::open(mnt.join("images/memory")).unwrap();
        let expected = image();
        spawn(Box::new(move |number| {
            let at = number.wrapping_mul(0x9e37_79b9) % (IMAGE_BLOCKS as u64) * 4096;
            let mut block = [0; 4096];
            file.read_exact_at(&mut block, at).unwrap();
            let at = usize::try_from(at).unwrap();
            assert!(block == expected[at..at + 4096]);
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }));
        let mnt = mnt.to_owned();
        spawn(Box::new(move |_| {
            assert_eq!(fs::read_dir(mnt.join("images")).unwrap().count(), 1);
            let file = File::open(mnt.join("images/memory")).unwrap();
            assert_eq!(file.metadata().unwrap().len(), IMAGE_BLOCKS as u64 * 4096);
        }));
        Load { stop, done, threads, tids }
    }

    /// Waits until so much more was done.
    fn goes_on(&self) {
        let target = self.done.load(Ordering::SeqCst) + 500;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.done.load(Ordering::SeqCst) < target {
            assert!(Instant::now() < deadline, "requests hang");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until all wait for the server that is gone. Whoever was answered before and has not counted
    /// it, on a busy machine, is running or about to.
    fn stands_still(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let before = self.waits();
            if before.iter().all(Option::is_some) && before == self.waits() {
                return;
            }
            assert!(Instant::now() < deadline, "somebody answers who is gone");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// How often each thread had given up the processor when it did so for what goes on now; none for
    /// one that runs.
    fn waits(&self) -> Vec<Option<u64>> {
        let tids = self.tids.lock().unwrap();
        assert_eq!(tids.len(), self.threads.len());
        let look = |tid: &i32| {
            let text = fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.trim().to_owned()
            };
            let is_waiting = field("State:").starts_with(['S', 'D']);
            is_waiting.then(|| field("voluntary_ctxt_switches:").parse().unwrap())
        };
        tids.iter().map(look).collect()
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

#[test]
fn a_killed_server_is_taken_over_and_nothing_fails() {
    let place = Place::new();
    let disk = File::create(place.beside("disk")).unwrap();
    disk.set_len(DISK_BLOCKS * 4096).unwrap();
    let listener = UnixListener::bind(place.beside("socket")).unwrap();
    // All are started before a file is open here: a new process closes its copies of those files
    // before it becomes another program, and that waits for the server that it is to be.
    let mut server = Server::start(&place, &listener);
    let successors: Vec<Server> = (0..3).map(|_| Server::start(&place, &listener)).collect();
    let handover = server.mount();
    let load = Load::start(place.path());
    for successor in successors {
        load.goes_on();
        server.kill();
        // Requests wait now, those that were read and those that were not.
        load.stands_still();
        server = successor;
        server.resume(&handover);
    }
    load.goes_on();
    load.end();
    // Unmounting ends the successor as it would have ended the first one.
    rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    drop(handover);
    assert!(server.child.wait().unwrap().success());
}

/// Without anybody who holds the descriptor, a killed server's mount is dead, and cleared away.
#[test]
fn without_a_holder_a_killed_server_leaves_a_dead_mount() {
    let place = Place::new();
    File::create(place.beside("disk")).unwrap().set_len(4096).unwrap();
    let listener = UnixListener::bind(place.beside("socket")).unwrap();
    let mut server = Server::start(&place, &listener);
    drop(server.mount());
    let file = File::open(place.path().join("images/memory")).unwrap();
    server.kill();
    let error = file.read_exact_at(&mut [0; 4096], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOTCONN.raw_os_error()));
    assert!(dormouse_serve::fuse::clear_stale(place.path()).unwrap());
    assert!(fs::read_dir(place.path()).unwrap().next().is_none());
}
