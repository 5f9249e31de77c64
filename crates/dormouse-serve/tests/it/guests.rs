//! Guests for tests of the pager: threads of this very process, and small VMMs that know what every
//! byte of their memory must be.

use std::fs;
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use dormouse_live::pages::PAGE_BYTES;
use dormouse_serve::uffd::handshake::{self, Handshake, Layout, Limits, Region, SocketEnd};
use dormouse_serve::uffd::{
    Capture, Content, Effort, End, MemorySource, Pager, PagerConfig, Piece, SourceError, Vm,
    VmConfig,
};
use dormouse_sys::mapping::{Mapping, PageSize};
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{Features, Register, Userfaultfd};
use dormouse_testkit::vmm::{self, Config, SmallVmm};

pub(crate) const PAGE: usize = 4096;

/// Longer than anything takes, also on a loaded machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) fn pager_config(threads: usize) -> PagerConfig {
    PagerConfig { threads, prefetch_threads: 2 }
}

/// What becomes of a request for pages.
type Hook = dyn Fn(u64, Effort) -> Result<(), SourceError> + Send + Sync;

/// An image in memory, with frames of 16 pages: one that was asked for is at hand from then on.
pub(crate) struct Image {
    bytes: Arc<Vec<u8>>,
    at_hand: Vec<AtomicU8>,
    hook: Box<Hook>,
}

const FRAME_PAGES: u64 = 16;

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "an image of {} bytes", self.bytes.len())
    }
}

impl Image {
    pub(crate) fn new(bytes: Vec<u8>) -> Image {
        let frames = (bytes.len() / PAGE).div_ceil(FRAME_PAGES as usize);
        let at_hand = (0..frames).map(|_| AtomicU8::new(0)).collect();
        Image { bytes: Arc::new(bytes), at_hand, hook: Box::new(|_, _| Ok(())) }
    }

    /// What a small VMM expects.
    pub(crate) fn of(config: &Config) -> Image {
        let page_of = vmm::image(config.seed, config.pages());
        Image::new((0..config.pages()).flat_map(page_of).collect())
    }

    /// So many pages, each of one byte that follows from its number.
    pub(crate) fn numbered(pages: u64) -> Image {
        Image::new((0..pages).flat_map(|page| [number_of(page); PAGE]).collect())
    }

    /// Calls `hook` with the first page of each request that may take long.
    pub(crate) fn hooked(
        self,
        hook: impl Fn(u64, Effort) -> Result<(), SourceError> + Send + Sync + 'static,
    ) -> Image {
        Image { hook: Box::new(hook), ..self }
    }
}

/// The byte of a page of [`Image::numbered`]; never 0.
pub(crate) fn number_of(page: u64) -> u8 {
    (page % 251) as u8 + 1
}

impl MemorySource for Image {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn pieces(
        &self,
        range: Range<u64>,
        effort: Effort,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), SourceError> {
        let asked = match effort {
            Effort::AtHand => None,
            Effort::Block(at) => Some(at..at + 1),
            Effort::All => Some(range.clone()),
        };
        if let Some(asked) = asked {
            (self.hook)(asked.start / PAGE_BYTES, effort)?;
            let frame = FRAME_PAGES * PAGE_BYTES;
            for frame in asked.start / frame..asked.end.div_ceil(frame) {
                self.at_hand[frame as usize].store(1, Ordering::Relaxed);
            }
        }
        let mut at = range.start;
        while at < range.end {
            let frame = at / (FRAME_PAGES * PAGE_BYTES);
            let end = range.end.min((frame + 1) * FRAME_PAGES * PAGE_BYTES);
            if self.at_hand[frame as usize].load(Ordering::Relaxed) == 0 {
                at = end;
                continue;
            }
            let is_zero = |at: u64| self.bytes[at as usize..][..PAGE].iter().all(|&byte| byte == 0);
            let zero = is_zero(at);
            let mut stop = at + PAGE_BYTES;
            while stop < end && is_zero(stop) == zero {
                stop += PAGE_BYTES;
            }
            let content = match zero {
                true => Content::Zeros(stop - at),
                false => {
                    let keeper = Arc::clone(&self.bytes);
                    Content::Bytes { keeper, range: at as usize..stop as usize }
                }
            };
            pieces.push(Piece { at, content });
            at = stop;
        }
        Ok(())
    }
}

/// Where threads wait until it is opened.
#[derive(Debug, Default)]
pub(crate) struct Barrier {
    open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicUsize,
}

impl Barrier {
    pub(crate) fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
    }

    pub(crate) fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    /// Waits until so many threads have come.
    pub(crate) fn wait_for(&self, count: usize) {
        wait_until("threads at the barrier", || self.waiting.load(Ordering::SeqCst) >= count);
    }
}

/// Opens a barrier when a test ends, also by failing: threads behind it would wait for ever.
pub(crate) struct OpenAtEnd<'a>(pub(crate) &'a Barrier);

impl Drop for OpenAtEnd<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

pub(crate) fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LONG, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Memory of this process that a pager serves.
pub(crate) struct Local {
    pub(crate) memory: Mapping,
    pub(crate) vm: Arc<Vm>,
    pub(crate) ended: Mutex<Receiver<End>>,
    // Keeps the socket open, as the VMM does.
    pub(crate) _socket: UnixStream,
}

/// What is handed over of a mapping of this process.
pub(crate) fn own_handshake(uffd: Userfaultfd, regions: Vec<Region>) -> Handshake {
    Handshake {
        regions,
        uffd,
        features: Features::EVENT_REMOVE,
        others: Vec::new(),
        peer: Peer::by_pid(std::process::id()).unwrap(),
        socket_end: SocketEnd::VmGone,
    }
}

pub(crate) fn region(memory: &Mapping, pages: u64) -> Region {
    let address = memory.addresses().start;
    Region { address, size: pages * PAGE_BYTES, offset: 0, page_bytes: PAGE_BYTES }
}

/// Memory of so many pages, observed as a VMM does.
pub(crate) fn observed(pages: u64) -> (Mapping, Userfaultfd) {
    let memory = Mapping::anonymous(pages as usize * PAGE, PageSize::Small).unwrap();
    let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
    uffd.register(&memory.addresses(), Register::Missing).unwrap();
    (memory, uffd)
}

impl Local {
    pub(crate) fn wake(pager: &Pager, image: Image, config: VmConfig) -> Local {
        let pages = image.size_bytes() / PAGE_BYTES;
        let (memory, uffd) = observed(pages);
        let handshake = own_handshake(uffd, vec![region(&memory, pages)]);
        Local::serve(pager, memory, handshake, Arc::new(image), config)
    }

    pub(crate) fn serve(
        pager: &Pager,
        memory: Mapping,
        handshake: Handshake,
        image: Arc<Image>,
        config: VmConfig,
    ) -> Local {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (tell, ended) = channel();
        let tell = move |_: &Vm, end| tell.send(end).unwrap_or_default();
        let vm = pager.serve(handshake, ours, image, config, tell).unwrap();
        Local { memory, vm, ended: Mutex::new(ended), _socket: theirs }
    }

    pub(crate) fn byte(&self, page: u64) -> &AtomicU8 {
        &self.memory.bytes()[page as usize * PAGE]
    }

    pub(crate) fn read(&self, page: u64) -> u8 {
        self.byte(page).load(Ordering::Relaxed)
    }

    pub(crate) fn write(&self, page: u64, byte: u8) {
        self.byte(page).store(byte, Ordering::Relaxed);
    }

    pub(crate) fn give_back(&self, pages: Range<u64>) {
        let bytes = pages.start as usize * PAGE..pages.end as usize * PAGE;
        self.memory.give_back(bytes).unwrap();
    }

    pub(crate) fn end(&self) -> End {
        self.ended.lock().unwrap().recv_timeout(LONG).expect("the end is told")
    }
}

/// A process that does nothing, for a peer that may be stopped. Ended when dropped.
pub(crate) struct Sleeper(pub(crate) Child);

impl Sleeper {
    pub(crate) fn start() -> Sleeper {
        Sleeper(Command::new("sleep").arg("1000").spawn().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A socket at which small VMMs hand over their memory to a pager of this process.
pub(crate) struct Host {
    pub(crate) pager: Pager,
    listener: UnixListener,
    pub(crate) folder: tempfile::TempDir,
}

/// A small VMM that is served.
pub(crate) struct Guest {
    pub(crate) small: SmallVmm,
    pub(crate) vm: Arc<Vm>,
    pub(crate) ended: Mutex<Receiver<End>>,
}

impl Host {
    pub(crate) fn start(threads: usize) -> Host {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("memory")).unwrap();
        Host { pager: Pager::start(pager_config(threads)).unwrap(), listener, folder }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("memory")
    }

    pub(crate) fn wake(&self, config: &Config, image: Image, vm_config: VmConfig) -> Guest {
        let small = SmallVmm::spawn(config).unwrap();
        let (stream, _) = self.listener.accept().unwrap();
        let handshake = handshake::receive(&stream, Limits { timeout: LONG }).unwrap();
        let (tell, ended) = channel();
        let tell = move |_: &Vm, end| tell.send(end).unwrap_or_default();
        let vm = self.pager.serve(handshake, stream, Arc::new(image), vm_config, tell).unwrap();
        Guest { small, vm, ended: Mutex::new(ended) }
    }

    /// The same with a table that fits the image.
    pub(crate) fn wake_checked(&self, config: &Config, vm_config: VmConfig) -> Guest {
        let guest = self.wake(config, Image::of(config), vm_config);
        let regions: Vec<_> = guest.vm.regions().copied().collect();
        handshake::check(&regions, config.image_bytes(), Layout::Running).unwrap();
        guest
    }
}

impl Guest {
    pub(crate) fn end(&self) -> End {
        self.ended.lock().unwrap().recv_timeout(LONG).expect("the end is told")
    }

    /// What memory must be, as the VMM itself knows. It is paused or idle.
    pub(crate) fn expected(&mut self, folder: &Path) -> Vec<u8> {
        let path = folder.join("expected");
        self.small.write_expected(&path).unwrap();
        fs::read(path).unwrap()
    }
}

/// Applies what a capture has to an image of the guest's memory.
pub(crate) fn apply(capture: &Capture, image: &mut [u8]) -> dormouse_serve::error::Result<()> {
    let changes = capture.changes();
    for page in &changes.zero {
        image[page as usize * PAGE..][..PAGE].fill(0);
    }
    let dirty: Vec<u32> = changes.dirty.iter().collect();
    for run in dirty.chunk_by(|one, two| one + 1 == *two) {
        let bytes = &mut image[run[0] as usize * PAGE..][..run.len() * PAGE];
        capture.read(u64::from(run[0]), bytes)?;
    }
    Ok(())
}

/// The first page in which two images differ.
pub(crate) fn first_difference(one: &[u8], two: &[u8]) -> Option<usize> {
    assert_eq!(one.len(), two.len());
    one.chunks(PAGE).zip(two.chunks(PAGE)).position(|(one, two)| one != two)
}

impl Local {
    /// How it ended, if it has.
    pub(crate) fn end_if_any(&self) -> Option<End> {
        self.ended.lock().unwrap().try_recv().ok()
    }
}
