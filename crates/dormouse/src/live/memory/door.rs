//! Where VMMs come in: one handshake after the other, until one can be served.
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
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::exit::{Fault, Kind};

/// How often a silent connection is asked again, and whether all is over.
const TICK: Duration = Duration::from_millis(20);

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

impl Porter {
    fn work(&self, admit: &dyn Fn(Arrival) -> Result<()>) {
        let mut is_taken = false;
        loop {
            match self.listener.accept() {
                Ok((socket, _)) => is_taken |= self.receive(socket, is_taken, admit),
                Err(_) if self.is_closed() => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept at the memory socket");
                    thread::sleep(AFTER_FAILURE);
                }
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
        match self.says_something(&socket) {
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

    /// Waits for a first byte; false if there is none.
    fn says_something(&self, socket: &UnixStream) -> std::io::Result<bool> {
        let deadline = Instant::now() + Limits::STANDARD.timeout;
        socket.set_read_timeout(Some(TICK))?;
        let mut byte = [0];
        loop {
            match rustix::net::recv(socket, &mut byte, RecvFlags::PEEK) {
                Ok((count, _)) => return Ok(count > 0),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if self.is_closed() || Instant::now() > deadline {
                return Ok(false);
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }
}
