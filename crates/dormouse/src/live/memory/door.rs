//! Where VMMs come in: one handshake after the other, until one can be served. Whoever is silent keeps
//! nobody waiting.
//!
//! A VMM that handed over its memory and is not served would wait for its first page for ever. So
//! whoever said anything and is turned away is stopped.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_live::pages::{PAGE_BYTES, Pages};
use dormouse_serve::error::Error as ServeError;
use dormouse_serve::uffd::handshake::{self, Handshake, Layout, Limits, check};
use dormouse_serve::unix_socket::{self, SocketFile};
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::Features;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::exit::{Fault, Kind};

/// How long whoever stands in the door when it closes has to say something.
const LAST_WORDS: Duration = Duration::from_millis(20);

/// Connections that may be silent at a time; each is a descriptor, and more wait to be accepted.
const SILENT_MAX: usize = 64;

/// Rest after a failure to accept: descriptors may be short for a while.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// A VMM with the memory that it handed over, which fits the image.
pub(crate) struct Arrival {
    pub(crate) handshake: Handshake,
    pub(crate) socket: UnixStream,
    image_bytes: u64,
}

impl Arrival {
    /// States for its pages.
    pub(crate) fn pages(&self) -> Result<Pages> {
        Ok(Pages::new(self.image_bytes.div_ceil(PAGE_BYTES).max(1))?)
    }
}

/// A socket for one VMM.
pub(crate) struct Door {
    listener: Arc<UnixListener>,
    file: Option<SocketFile>,
    image_bytes: u64,
    is_closed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    /// Listens. Whoever connects waits until the door is opened.
    pub(crate) fn listen(socket: &Path, image_bytes: u64) -> Result<Door> {
        let (listener, file) = unix_socket::listen(socket)?;
        let (listener, is_closed) = (Arc::new(listener), Arc::default());
        Ok(Door { listener, file: Some(file), image_bytes, is_closed, thread: None })
    }

    /// Lets VMMs in until `admit` takes one. Those that it refuses are stopped.
    pub(crate) fn open(
        &mut self,
        admit: impl Fn(Arrival) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let (listener, is_closed) = (Arc::clone(&self.listener), Arc::clone(&self.is_closed));
        let porter = Porter { listener, is_closed, image_bytes: self.image_bytes };
        let thread = thread::Builder::new()
            .name("door".to_owned())
            .spawn(move || porter.work(&admit))
            .context("cannot start a thread")?;
        self.thread = Some(thread);
        Ok(())
    }

    /// Nobody can connect any more; those who wait at the door are turned away.
    pub(crate) fn close(&mut self) {
        if self.is_closed.swap(true, Ordering::SeqCst) {
            return;
        }
        drop(self.file.take());
        // `accept` returns those who wait, and then an error.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        match self.thread.take() {
            // Closed by whom it let in.
            Some(thread) if thread.thread().id() == thread::current().id() => {}
            Some(thread) => {
                // A panic was reported by its hook.
                let _ = thread.join();
            }
            None => {
                let (listener, is_closed) =
                    (Arc::clone(&self.listener), Arc::clone(&self.is_closed));
                let image_bytes = self.image_bytes;
                Porter { listener, is_closed, image_bytes }.work(&|_| Ok(()));
            }
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.close();
    }
}

/// The thread at the door.
struct Porter {
    listener: Arc<UnixListener>,
    is_closed: Arc<AtomicBool>,
    image_bytes: u64,
}

/// Somebody who came in and said nothing yet.
struct Silent {
    socket: UnixStream,
    deadline: Instant,
}

/// What there is to do at the door.
struct Stir {
    /// Somebody wants in, or the door was closed.
    is_knocked: bool,

    /// Who of the silent spoke, or left.
    spoke: Vec<bool>,
}

impl Porter {
    fn work(&self, admit: &dyn Fn(Arrival) -> Result<()>) {
        let mut is_taken = false;
        let mut silent: Vec<Silent> = Vec::new();
        while !self.is_closed() {
            let stir = match wait(&self.listener, &silent) {
                Ok(stir) => stir,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot wait at the memory socket");
                    thread::sleep(AFTER_FAILURE);
                    continue;
                }
            };
            let (now, mut spoke) = (Instant::now(), stir.spoke.into_iter());
            for one in std::mem::take(&mut silent) {
                if spoke.next() == Some(true) || one.deadline <= now {
                    is_taken |= self.receive(one.socket, is_taken, admit);
                } else {
                    silent.push(one);
                }
            }
            if stir.is_knocked {
                silent.extend(self.let_in());
            }
        }
        // Those who wait, and then an error.
        silent.extend(std::iter::from_fn(|| self.let_in()));
        if !silent.is_empty() {
            thread::sleep(LAST_WORDS);
        }
        for one in silent {
            self.receive(one.socket, is_taken, admit);
        }
    }

    /// Accepts a connection; none where that fails.
    fn let_in(&self) -> Option<Silent> {
        match self.listener.accept() {
            Ok((socket, _)) => {
                Some(Silent { socket, deadline: Instant::now() + Limits::STANDARD.timeout })
            }
            Err(error) => {
                if !self.is_closed() {
                    tracing::warn!(%error, "cannot accept at the memory socket");
                    thread::sleep(AFTER_FAILURE);
                }
                None
            }
        }
    }

    /// Whether it was admitted.
    fn receive(
        &self,
        socket: UnixStream,
        is_taken: bool,
        admit: &dyn Fn(Arrival) -> Result<()>,
    ) -> bool {
        match says_something(&socket) {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!("somebody connected to the memory socket and said nothing");
                return false;
            }
            Err(error) => {
                tracing::warn!(%error, "a connection to the memory socket failed");
                return false;
            }
        }
        // Now, as it may not be known any more when it is needed.
        let peer = Peer::of(&socket);
        let admitted = if is_taken {
            Err(Fault::new(Kind::Busy, "another VMM is served already").into())
        } else if self.is_closed() {
            Err(Fault::new(Kind::Cancelled, "the server ends").into())
        } else {
            self.shake_hands(socket).and_then(admit)
        };
        let Err(error) = admitted else { return true };
        let (pid, killed) = match &peer {
            Ok(peer) => (peer.pid(), peer.kill()),
            // Nobody is there any more.
            Err(_) => (0, Ok(())),
        };
        tracing::error!(pid, error = &*error, "the VMM is refused, and stopped");
        if let Err(error) = killed {
            tracing::error!(pid, %error, "and cannot be stopped");
        }
        false
    }

    fn shake_hands(&self, socket: UnixStream) -> Result<Arrival> {
        let handshake = handshake::receive(&socket, Limits::STANDARD)?;
        check(&handshake.regions, self.image_bytes, Layout::Running).map_err(ServeError::from)?;
        if handshake.features.0 & Features::EVENT_REMOVE.0 == 0 {
            tracing::warn!(
                pid = handshake.peer.pid(),
                "this VMM does not tell which pages it gives back: its guest must have no balloon"
            );
        }
        Ok(Arrival { handshake, socket, image_bytes: self.image_bytes })
    }

    fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }
}

/// Waits until somebody knocks, speaks or was silent for too long. That the door was closed is a knock,
/// however many are silent.
fn wait(listener: &UnixListener, silent: &[Silent]) -> rustix::io::Result<Stir> {
    let wanted = if silent.len() < SILENT_MAX { PollFlags::IN } else { PollFlags::empty() };
    let mut all = vec![PollFd::new(listener, wanted)];
    all.extend(silent.iter().map(|one| PollFd::new(&one.socket, PollFlags::IN)));
    let next = silent.iter().map(|one| one.deadline).min();
    let left = next.map(|next| next.saturating_duration_since(Instant::now()));
    // None where it has no end: such a deadline is not set.
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    poll(&mut all, left.as_ref())?;
    let mut stirred = all.iter().map(|one| !one.revents().is_empty());
    let is_knocked = stirred.next() == Some(true);
    Ok(Stir { is_knocked, spoke: stirred.collect() })
}

/// Whether there is a first byte.
fn says_something(socket: &UnixStream) -> rustix::io::Result<bool> {
    loop {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(socket, &mut [0], flags) {
            Ok((count, _)) => return Ok(count > 0),
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
