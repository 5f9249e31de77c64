//! What a VMM's memory cannot do without, kept by a process that does nothing else
//! (`dormouse hold`), so that the serving process may die.
//!
//! It keeps two names. `vm` has the descriptors of the VMM, and ends with it. `server` ends with the
//! server, so that a holder does not stay that was never given a VM.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dormouse_live::pages::Pages;
use dormouse_serve::error::ErrorKind;
use dormouse_serve::holder::{self, Holder, Kept, Until};
use dormouse_serve::uffd::handshake::{Handshake, Region, SocketEnd};
use dormouse_serve::unix_socket;
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::Userfaultfd;
use dormouse_vmm::cloud_hypervisor::offload::PagesOfSlot;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::minding::{self, Given};
use super::succession::{Succession, Successor};
use crate::background::OURSELVES;
use crate::exit::{Fault, Kind};
use crate::reaper;

/// The name under which a VMM's descriptors are kept.
const VM: &str = "vm";

/// The name under which a Cloud Hypervisor's descriptors are kept that asks for pages.
const PAGES: &str = "pages";

/// The name that ends with the server.
pub(super) const SERVER: &str = "server";

/// How long a holder waits for the first thing to keep. It is given at once, if at all.
const FIRST_WITHIN: Duration = Duration::from_secs(30);

/// How long one may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(10);

const NOTE_VERSION: u32 = 1;

/// What is said of a VMM's descriptors: the userfaultfd, the page states, the handshake's socket if
/// its end means something, and the pidfd.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    version: u32,
    regions: Vec<NotedRegion>,
    has_socket: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NotedRegion {
    address: u64,
    size: u64,
    offset: u64,
    page_bytes: u64,
}

/// What a Cloud Hypervisor needs that has not all of its pages.
#[derive(Debug)]
pub(crate) struct KeptPages {
    pub(crate) slots: Vec<PagesOfSlot>,

    /// Those of its requests, and its pidfd.
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// A VMM whose server is gone.
#[derive(Debug)]
pub(crate) struct Orphan {
    pub(crate) handshake: Handshake,
    pub(crate) socket: Option<UnixStream>,
    pub(crate) pages: Pages,

    /// To stop it, should nobody be able to serve it.
    pub(crate) peer: Peer,
}

/// The process that keeps a VMM's descriptors.
#[derive(Clone, Debug)]
pub(crate) struct Keeping(Arc<Inner>);

/// The same, as all copies have it.
#[derive(Debug)]
pub(super) struct Inner {
    holder: Holder,
    path: PathBuf,
    given: Given,
}

impl Keeping {
    /// The one at `path`, if it is there.
    pub(crate) fn at(path: PathBuf) -> Keeping {
        Keeping(Arc::new(Inner { holder: Holder::at(&path), path, given: Given::default() }))
    }

    pub(super) fn of(inner: Arc<Inner>) -> Keeping {
        Keeping(inner)
    }

    pub(super) fn downgrade(&self) -> Weak<Inner> {
        Arc::downgrade(&self.0)
    }

    /// Starts it, and returns when it keeps this process in mind.
    pub(crate) fn start(&self, successor: &Successor) -> Result<()> {
        self.start_process(successor)?;
        self.mind_us()
    }

    /// Has another one started should it end, and given all that this one had.
    pub(crate) fn mind(&self, successor: Successor) {
        minding::mind(self, successor);
    }

    /// The holder's process, or that of a new one that has what the last one had; none if that was nothing.
    pub(super) fn holder_or_new(&self, successor: &Successor) -> Result<Option<Peer>> {
        // Nobody is given anything meanwhile, or forgotten.
        let things = self.0.given.things();
        match self.0.holder.process() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            found => return Ok(Some(found?)),
        }
        if things.is_empty() {
            return Ok(None);
        }
        tracing::warn!(
            socket = %self.0.path.display(),
            "the process that keeps descriptors is gone; another one is started"
        );
        self.start_process(successor)?;
        for (name, thing) in &*things {
            let descriptors: Vec<_> = thing.descriptors.iter().map(AsFd::as_fd).collect();
            self.0.holder.keep(name, &thing.note, &descriptors, thing.until)?;
        }
        Ok(Some(self.0.holder.process()?))
    }

    /// Has descriptors kept under a name.
    pub(crate) fn give(
        &self,
        name: &str,
        note: &str,
        descriptors: &[BorrowedFd<'_>],
        until: Until,
    ) -> Result<()> {
        self.0.given.add(name, note, descriptors, until).context("cannot copy a descriptor")?;
        Ok(self.0.holder.keep(name, note, descriptors, until)?)
    }

    /// What is kept under a name; none where nothing is, or nobody keeps anything.
    pub(crate) fn take_back(&self, name: &str) -> Result<Option<Kept>> {
        match self.0.holder.take(name) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            kept => Ok(kept?),
        }
    }

    /// Has what is kept under a name forgotten; the holder may end.
    pub(crate) fn forget(&self, name: &str) -> Result<()> {
        self.0.given.clear();
        match self.0.holder.drop(name) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn start_process(&self, successor: &Successor) -> Result<()> {
        let path = std::path::absolute(&self.0.path).context("cannot tell where the store is")?;
        let mut command = Command::new(OURSELVES);
        command.arg0("dormouse").args(["hold".as_ref(), "--socket".as_ref(), path.as_os_str()]);
        if let Some(log) = &successor.log {
            command.arg("--log").arg(log);
        }
        let mut child = command
            .arg("--")
            .args(&successor.arguments)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the process that keeps descriptors")?;
        // It lets go of standard error when it listens.
        let said = match child.stderr.take() {
            None => String::new(),
            Some(stderr) => read_until_end(stderr, START_TIMEOUT).or_else(|error| {
                child.kill().and_then(|()| child.wait()).context("cannot stop the holder")?;
                Err(error).context("the process that keeps descriptors does not start")
            })?,
        };
        if !said.is_empty() {
            child.wait().context("cannot wait for the holder")?;
            let message = format!("the process that keeps descriptors failed: {}", said.trim());
            return Err(Fault::new(Kind::Other, message).into());
        }
        reaper::let_go(child);
        Ok(())
    }

    /// Has it note that this process serves.
    pub(crate) fn mind_us(&self) -> Result<()> {
        let us = Peer::by_pid(std::process::id()).context("cannot look at this process")?;
        self.give(SERVER, "", &[us.pidfd().as_fd()], Until::LastIsReadable)
    }

    /// Has it forget that this process serves: it ends, if there is no VMM any more.
    pub(crate) fn forget_us(&self) -> Result<()> {
        self.forget(SERVER)
    }

    /// Has what a VMM handed over kept. Before a page of it is served.
    pub(crate) fn keep(
        &self,
        handshake: &Handshake,
        socket: &UnixStream,
        pages: &Pages,
    ) -> Result<()> {
        let has_socket = handshake.socket_end == SocketEnd::VmGone;
        let regions = handshake.regions.iter().map(|region| NotedRegion {
            address: region.address,
            size: region.size,
            offset: region.offset,
            page_bytes: region.page_bytes,
        });
        let note = Note { version: NOTE_VERSION, regions: regions.collect(), has_socket };
        let mut kept: Vec<BorrowedFd<'_>> = vec![handshake.uffd.as_fd(), pages.fd().as_fd()];
        kept.extend(has_socket.then(|| socket.as_fd()));
        kept.push(handshake.peer.pidfd().as_fd());
        let note = serde_json::to_string(&note)?;
        self.give(VM, &note, &kept, Until::LastIsReadable)
    }

    /// Has the connection kept on which a Cloud Hypervisor asks for pages, and what belongs to it; the
    /// last descriptor is its pidfd. Before a page is served.
    pub(crate) fn keep_pages(&self, slots: &[PagesOfSlot], descriptors: &[OwnedFd]) -> Result<()> {
        let kept: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let note = serde_json::to_string(slots)?;
        self.give(PAGES, &note, &kept, Until::LastIsReadable)
    }

    /// What is kept of one; none if it has all pages, or is gone.
    pub(crate) fn take_pages(&self) -> Result<Option<KeptPages>> {
        let Some(kept) = self.take_back(PAGES)? else { return Ok(None) };
        self.0.given.add_kept(PAGES, &kept).context("cannot copy a descriptor")?;
        let Kept { note, descriptors } = kept;
        let slots = serde_json::from_str(&note).context("the holder's note is not one of ours")?;
        Ok(Some(KeptPages { slots, descriptors }))
    }

    /// Has all of that forgotten, and that this process serves.
    pub(crate) fn forget_pages(&self) -> Result<()> {
        self.forget(PAGES)?;
        self.forget_us()
    }

    /// What is kept of a VMM; none if it is gone, and the holder with it.
    pub(crate) fn take(&self) -> Result<Option<Orphan>> {
        if !has_vm(&self.0.path)? {
            return Ok(None);
        }
        let Some(kept) = self.0.holder.take(VM)? else { return Ok(None) };
        self.0.given.add_kept(VM, &kept).context("cannot copy a descriptor")?;
        orphan(kept)
    }
}

/// All that comes out of a pipe until it is closed.
fn read_until_end(mut pipe: ChildStderr, timeout: Duration) -> Result<String> {
    let deadline = Instant::now() + timeout;
    let mut said = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).context("a timeout of centuries")?;
        match poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&left)) {
            Ok(0) => bail!("it said nothing for {timeout:?}"),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error).context("cannot listen to the holder"),
        }
        let mut piece = [0; 1024];
        match pipe.read(&mut piece).context("cannot listen to the holder")? {
            0 => return Ok(String::from_utf8_lossy(&said).into_owned()),
            count => said.extend_from_slice(&piece[..count]),
        }
    }
}

/// Whether a holder at `path` keeps a VMM that lives. An error is no answer: it may.
pub(super) fn has_vm(path: &Path) -> Result<bool> {
    match Holder::at(path).names() {
        Ok(names) => Ok(names.iter().any(|name| name == VM)),
        // Where nobody listens nothing is kept.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A VMM from what is kept of it; none if it has ended since.
fn orphan(kept: Kept) -> Result<Option<Orphan>> {
    let Kept { note, descriptors } = kept;
    let note: Note = serde_json::from_str(&note).context("the holder's note is not one of ours")?;
    if note.version != NOTE_VERSION {
        let message =
            format!("a VMM kept in version {}; this build knows {NOTE_VERSION}", note.version);
        return Err(Fault::new(Kind::Unsupported, message).into());
    }
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next().context("the holder keeps too few descriptors");
    let uffd = Userfaultfd::from_fd(next()?).context("cannot use the VMM's page faults")?;
    let pages = Pages::adopt(next()?)?;
    let socket = if note.has_socket { Some(UnixStream::from(next()?)) } else { None };
    let pidfd: OwnedFd = next()?;
    let copy = pidfd.try_clone().context("cannot copy a descriptor")?;
    let peer = match (Peer::from_pidfd(pidfd), Peer::from_pidfd(copy)) {
        (Ok(one), Ok(two)) => Some((one, two)),
        (Err(error), _) | (_, Err(error)) if has_ended(&error) => None,
        (Err(error), _) | (_, Err(error)) => {
            return Err(error).context("cannot look at the VMM's process");
        }
    };
    let Some((peer, spare)) = peer else { return Ok(None) };
    if peer.has_ended().context("cannot look at the VMM's process")? {
        return Ok(None);
    }
    let features = uffd
        .features()
        .context("cannot tell the features of a userfaultfd")?
        .context("a userfaultfd that nobody has set up")?;
    let regions = note.regions.iter().map(|region| Region {
        address: region.address,
        size: region.size,
        offset: region.offset,
        page_bytes: region.page_bytes,
    });
    let socket_end = if note.has_socket { SocketEnd::VmGone } else { SocketEnd::Nothing };
    let handshake = Handshake {
        regions: regions.collect(),
        uffd,
        features,
        others: Vec::new(),
        peer,
        socket_end,
    };
    Ok(Some(Orphan { handshake, socket, pages, peer: spare }))
}

fn has_ended(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
        || error.kind() == io::ErrorKind::NotFound
}

/// Keeps descriptors at `path` for whoever asks, in a session of its own, until none is left, and runs
/// `successor` when the server ends before.
pub(crate) fn hold(path: &Path, successor: Successor) -> Result<()> {
    // The first of a session already, if it was started by hand.
    let _ = rustix::process::setsid();
    let (listener, _file) = unix_socket::listen(path)?;
    let null = OpenOptions::new().write(true).open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdout(&null).context("cannot let go of standard output")?;
    rustix::stdio::dup2_stderr(&null).context("cannot let go of standard error")?;
    let mut succession = Succession::new(Holder::at(path), successor);
    let mut on_end = |name: &str| {
        if name == SERVER {
            succession.begin();
        }
    };
    Ok(holder::hold(&listener, FIRST_WITHIN, &mut on_end)?)
}
