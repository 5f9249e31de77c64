//! Nothing is allocated for a request: counted over the whole way from a socket to a live disk and
//! its base, for every command, in a process where nobody else allocates.

use std::alloc::System;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use dormouse_image::block::HoleMeaning;
use dormouse_live::base::Base;
use dormouse_live::files::RealFolder;
use dormouse_live::overlay::{NewOverlay, Overlay, OverlayConfig};
use dormouse_serve::nbd::{Export, Limits, Server};
use dormouse_store::commit::{CommitRequest, NewImage};
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, Stats, StatsAlloc};

use super::OverlayDevice;
use crate::live::base::ImageBase;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Set in the process that counts.
const ALONE: &str = "DORMOUSE_TEST_ALONE";

const NAME: &str = "live::device::allocations::nothing_is_allocated_for_a_request";

const BASE_BYTES: usize = 8 << 20;
const DISK_BYTES: u64 = 16 << 20;
const ROUNDS: u64 = 500;
const TRIES: usize = 5;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;

#[test]
fn nothing_is_allocated_for_a_request() {
    if std::env::var_os(ALONE).is_none() {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", NAME, "--test-threads=1", "--nocapture"]).env(ALONE, "1");
        let output = child.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "{said}{errors}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let disk = Arc::new(live_disk(dir.path()));
    let server = Server::builder(Limits::STANDARD)
        .export(Export::new("disk", Arc::new(OverlayDevice::new(Arc::clone(&disk)))))
        .listen_unix(&socket)
        .start()
        .unwrap();
    let mut client = Client::connect(&socket);
    let cases: [(&str, u16, u16, u64, u32); 14] = [
        ("reads of the base", READ, 0, 0, 4096),
        ("reads across blocks of the base", READ, 0, 1000, 20_000),
        ("large reads of the base", READ, 0, 0, 1 << 20),
        ("reads of holes", READ, 0, 12 << 20, 256 << 10),
        ("writes", WRITE, 0, 1 << 20, 4096),
        ("writes of parts", WRITE, 0, (1 << 20) + 100, 700),
        ("large writes", WRITE, 0, 2 << 20, 512 << 10),
        ("writes with FUA", WRITE, FUA, 1 << 20, 4096),
        ("reads of what was written", READ, 0, 1 << 20, 64 << 10),
        ("flushes", FLUSH, 0, 0, 0),
        ("trims", TRIM, 0, 3 << 20, 64 << 10),
        ("zeroes", ZEROES, NO_HOLE, 4 << 20, 64 << 10),
        ("prefetching", CACHE, 0, 0, 512 << 10),
        ("block status", STATUS, 0, 0, 16 << 20),
    ];
    let mut told = Vec::new();
    for (what, command, flags, offset, length) in cases {
        let mut run = |rounds| {
            for round in 0..rounds {
                client.ask(command, flags, offset, length, round);
            }
        };
        // Buffers and caches grow to what this needs. A thread that first serves it late allocates its
        // own then, so that one round of nothing is asked for; what each request allocates is in all.
        let mut counted = (0..TRIES).map(|_| {
            run(20);
            let region = Region::new(ALLOCATOR);
            run(ROUNDS);
            region.change()
        });
        let is_none = |change: &Stats| change.allocations + change.reallocations == 0;
        if !counted.any(|change| is_none(&change)) {
            told.push(what);
        }
    }
    assert!(told.is_empty(), "allocated in each {ROUNDS} requests: {told:?}");
    server.stop().unwrap();
}

/// A disk over an image of a store; half of it is longer than the image.
pub(super) fn live_disk(dir: &Path) -> Overlay {
    let store = Store::init(&dir.join("store"), Config::STANDARD).unwrap();
    let id = ImageName::Disk("root".parse().unwrap());
    // Blocks that differ and can be compressed.
    let bytes: Vec<u8> =
        (0..BASE_BYTES).map(|at| ((at / 4096) % 251 + at % 3).to_le_bytes()[0]).collect();
    let mut request = CommitRequest::new("vm".parse().unwrap());
    request.images.push(NewImage {
        image: id.clone(),
        source: Source::Bytes(bytes.into()),
        holes: HoleMeaning::Zero,
    });
    store.commit(request, Job::quiet()).unwrap();
    let snapshot = store.snapshot(&"vm@1".parse().unwrap()).unwrap();
    let base: Arc<dyn Base> = Arc::new(ImageBase::new(snapshot.image(&id).unwrap()));
    let files = dir.join("live");
    std::fs::create_dir(&files).unwrap();
    let new = NewOverlay { size_bytes: DISK_BYTES, base, base_label: String::new() };
    Overlay::create(Arc::new(RealFolder::new(files)), new, OverlayConfig::STANDARD).unwrap()
}

/// A client with structured replies that allocates nothing for a request either.
struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    fn connect(socket: &Path) -> Client {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        let context = b"base:allocation";
        let meta = [&[0, 0, 0, 4][..], b"disk", &[0, 0, 0, 1, 0, 0, 0, 15], context].concat();
        for (option, data) in [(8, &[][..]), (10, &meta[..]), (7, b"\0\0\0\x04disk\0\0")] {
            let mut bytes = b"IHAVEOPT".to_vec();
            bytes.extend(u32::to_be_bytes(option));
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(data);
            stream.write_all(&bytes).unwrap();
            loop {
                let mut head = [0; 20];
                stream.read_exact(&mut head).unwrap();
                let mut rest = vec![0; u32_at(&head, 16)];
                stream.read_exact(&mut rest).unwrap();
                assert_eq!(head[12] >> 7, 0, "option {option} is refused");
                if head[12..16] == [0, 0, 0, 1] {
                    break;
                }
            }
        }
        Client { stream, buffer: vec![0; 2 << 20] }
    }

    /// Sends a request and takes all of its reply, which must be no error.
    fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32, round: u64) {
        let mut header = [0; 28];
        header[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
        header[4..6].copy_from_slice(&flags.to_be_bytes());
        header[6..8].copy_from_slice(&command.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..].copy_from_slice(&length.to_be_bytes());
        self.stream.write_all(&header).unwrap();
        if command == WRITE {
            let data = &mut self.buffer[..usize::try_from(length).unwrap()];
            data.fill(round.to_le_bytes()[0] | 1);
            self.stream.write_all(data).unwrap();
        }
        loop {
            let mut head = [0; 20];
            self.stream.read_exact(&mut head[..16]).unwrap();
            if head[..4] == 0x6744_6698_u32.to_be_bytes() {
                assert_eq!(head[4..8], [0; 4], "an error");
                return;
            }
            self.stream.read_exact(&mut head[16..]).unwrap();
            assert_eq!(head[6] >> 7, 0, "an error");
            self.stream.read_exact(&mut self.buffer[..u32_at(&head, 16)]).unwrap();
            if head[5] & 1 == 1 {
                return;
            }
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    let bytes = bytes[at..].first_chunk().unwrap();
    usize::try_from(u32::from_be_bytes(*bytes)).unwrap()
}
