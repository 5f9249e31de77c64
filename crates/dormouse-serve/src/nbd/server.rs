//! The server: listeners, a thread for each connection, figures, and an orderly end.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::connection::{serve, transmit};
use super::export::{Export, Exports};
use super::handshake::{Agreed, Offer, ReplyForm};
use super::limits::Limits;
use super::pulse::{Pulse, Watch, lock};
use super::stats::ServerStats;
use super::tls::TlsConfig;
use super::transport::{Socket, Transport};
use crate::error::{Error, ErrorKind, Result};
use crate::unix_socket::{self, SocketFile};

/// How often a stopping server looks whether its connections are done.
const DRAIN_TICK: Duration = Duration::from_millis(1);

/// How long a client waits at the door while another one is shown out.
const MAKE_ROOM_TIME: Duration = Duration::from_secs(1);

/// What a server serves and where, before it starts.
#[derive(Debug)]
pub struct ServerBuilder {
    limits: Limits,
    exports: Vec<Export>,
    default: Option<String>,
    places: Vec<Place>,
}

#[derive(Debug)]
enum Place {
    Unix(PathBuf),
    Tcp(SocketAddr, Option<TlsConfig>),
}

impl ServerBuilder {
    /// Serves one more export.
    #[must_use]
    pub fn export(mut self, export: Export) -> ServerBuilder {
        self.exports.push(export);
        self
    }

    /// Makes an export what clients get that ask for the empty name. Without this the only one is;
    /// of several, none.
    #[must_use]
    pub fn default_export(mut self, name: impl Into<String>) -> ServerBuilder {
        self.default = Some(name.into());
        self
    }

    /// Listens on a unix socket, which only this user may connect to. A socket that is there and
    /// that nobody listens on is replaced; the socket is removed when the server stops.
    #[must_use]
    pub fn listen_unix(mut self, path: impl Into<PathBuf>) -> ServerBuilder {
        self.places.push(Place::Unix(path.into()));
        self
    }

    /// Listens on a TCP address; without TLS whoever reaches it reads and writes. The protocol's
    /// port is 10809; port 0 takes a free one, which [`Server::tcp_addresses`] tells.
    #[must_use]
    pub fn listen_tcp(mut self, address: SocketAddr, tls: Option<TlsConfig>) -> ServerBuilder {
        self.places.push(Place::Tcp(address, tls));
        self
    }

    /// Listens, and serves from now on; without a place to listen at, only those who are
    /// [attached](Server::attach).
    ///
    /// # Errors
    ///
    /// Where names do not do, a place is taken or cannot be listened on.
    pub fn start(self) -> Result<Server> {
        let shared = Arc::new(Shared {
            exports: Exports::new(self.exports, self.default.as_deref())?,
            limits: self.limits,
            stopping: AtomicBool::new(false),
            watch: Arc::default(),
            accepted: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        let mut listeners = Vec::with_capacity(self.places.len());
        let mut tcp_addresses = Vec::new();
        for place in self.places {
            let listener = Listener::open(place)?;
            if let Door::Tcp(listener, _) = &listener.door {
                let address = listener
                    .local_addr()
                    .map_err(|error| Error::io("cannot tell what is listened on", error))?;
                tcp_addresses.push(address);
            }
            listeners.push(Arc::new(listener));
        }
        // From here on dropping the server ends what was started.
        let server = Server { shared, tcp_addresses, running: Mutex::new(Running::default()) };
        let mut running = lock(&server.running);
        let watch = Arc::clone(&server.shared.watch);
        running.threads.push(start("nbd-watch", move || watch.run())?);
        for listener in listeners {
            let shared = Arc::clone(&server.shared);
            let accepting = Arc::clone(&listener);
            running.listeners.push(listener);
            running.threads.push(start("nbd-accept", move || accepting.accept(&shared))?);
        }
        drop(running);
        Ok(server)
    }
}

/// A server that runs until it is stopped or dropped.
pub struct Server {
    shared: Arc<Shared>,
    tcp_addresses: Vec<SocketAddr>,

    /// Guards what has to be ended; held while ending, so that two who stop both wait.
    running: Mutex<Running>,
}

#[derive(Debug, Default)]
struct Running {
    listeners: Vec<Arc<Listener>>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// A server within `limits`.
    pub fn builder(limits: Limits) -> ServerBuilder {
        ServerBuilder { limits, exports: Vec::new(), default: None, places: Vec::new() }
    }

    /// The TCP addresses that are listened on, in the order they were given.
    pub fn tcp_addresses(&self) -> &[SocketAddr] {
        &self.tcp_addresses
    }

    /// Serves `socket` as a connection to `export` that is past its handshake, with simple replies:
    /// the other end is for the kernel's driver, which begins with requests. Gives the transmission
    /// flags, which a handshake would have told.
    ///
    /// # Errors
    ///
    /// Where there is no such export, or too many connections.
    pub fn attach(&self, export: &str, socket: UnixStream) -> Result<u16> {
        let Some(export) = self.shared.exports.find(export).map(Arc::clone) else {
            let message = format!("there is no export {export:?}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        };
        let flags = export.transmission_flags(ReplyForm::Simple);
        let agreed = Agreed { export, form: ReplyForm::Simple, contexts: Vec::new() };
        if !self.shared.admit(Socket::Unix(socket), Opening::Agreed(agreed)) {
            return Err(Error::new(ErrorKind::Io, "the server takes no more connections"));
        }
        Ok(flags)
    }

    /// Figures up to now.
    pub fn stats(&self) -> ServerStats {
        let shared = &self.shared;
        ServerStats {
            exports: shared.exports.list().iter().map(|export| export.stats()).collect(),
            connections: shared.watch.len() as u64,
            accepted: shared.accepted.load(Ordering::Relaxed),
            turned_away: shared.turned_away.load(Ordering::Relaxed),
            failed: shared.failed.load(Ordering::Relaxed),
        }
    }

    /// Stops: nobody is accepted any more and the sockets' files are gone; requests under way are
    /// answered, later ones with ESHUTDOWN; then connections are closed. Connections that are not
    /// done after [`Limits::drain_ms`] are closed as they are. To stop twice is no error.
    ///
    /// # Errors
    ///
    /// Where connections are still waiting for their devices after as long again; their threads
    /// go on doing so.
    pub fn stop(&self) -> Result<()> {
        let mut running = lock(&self.running);
        self.shared.stopping.store(true, Ordering::Relaxed);
        for listener in &running.listeners {
            listener.close();
        }
        running.listeners.clear();
        let drained = self.shared.drain();
        self.shared.watch.end();
        for thread in running.threads.drain(..) {
            // A panic was reported by its hook; what it guarded is over.
            let _ = thread.join();
        }
        drained
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "a server did not stop");
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("exports", &self.shared.exports).finish_non_exhaustive()
    }
}

/// What listeners and connections share.
#[derive(Debug)]
struct Shared {
    exports: Exports,
    limits: Limits,
    stopping: AtomicBool,
    watch: Arc<Watch>,
    accepted: AtomicU64,
    turned_away: AtomicU64,
    failed: AtomicU64,
}

impl Shared {
    /// Begins to serve a client, or turns it away; false if it did not begin.
    fn admit(self: &Arc<Self>, socket: Socket, opening: Opening) -> bool {
        if !self.has_room() {
            self.turned_away.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(limit = self.limits.connections, "too many connections");
            return false;
        }
        self.accepted.fetch_add(1, Ordering::Relaxed);
        socket.tune();
        let socket = Arc::new(socket);
        let deadline = Some(Instant::now() + self.limits.handshake_time());
        let pulse =
            Arc::new(Pulse::new(Some(Arc::clone(&socket)), deadline, Arc::clone(&self.watch)));
        self.watch.join(Arc::clone(&pulse));
        let shared = Arc::clone(self);
        let member = Arc::clone(&pulse);
        let started = start("nbd-connection", move || {
            shared.serve(&socket, &opening, &member);
            shared.watch.leave(&member);
        });
        if let Err(error) = &started {
            self.failed.fetch_add(1, Ordering::Relaxed);
            self.watch.leave(&pulse);
            tracing::error!(error = error as &dyn std::error::Error, "cannot serve a client");
        }
        started.is_ok()
    }

    /// Whether one more connection may be, perhaps instead of one that stalled.
    fn has_room(&self) -> bool {
        let is_free = || self.watch.len() < self.limits.connections;
        if is_free() || !self.watch.drop_stalled(self.limits.stall_time()) {
            return is_free();
        }
        // Its threads were waiting for the peer and end now, unless the device keeps one.
        let begun = Instant::now();
        while !is_free() && begun.elapsed() < MAKE_ROOM_TIME {
            thread::sleep(DRAIN_TICK);
        }
        is_free()
    }

    fn serve(&self, socket: &Arc<Socket>, opening: &Opening, pulse: &Pulse) {
        let transport = Transport::of_socket(socket);
        let served = match opening {
            Opening::Handshake(tls) => {
                let tls = tls.as_ref();
                let offer = Offer { exports: &self.exports, tls, stopping: &self.stopping };
                serve(transport, &offer, &self.limits, pulse)
            }
            Opening::Agreed(agreed) => {
                transmit(transport, agreed, &self.stopping, &self.limits, pulse)
            }
        };
        if let Err(error) = served {
            self.failed.fetch_add(1, Ordering::Relaxed);
            tracing::info!(error = &error as &dyn std::error::Error, "a connection failed");
        }
        socket.close();
    }

    /// Waits for all connections to end.
    fn drain(&self) -> Result<()> {
        let begun = Instant::now();
        let patience = self.limits.drain_time();
        while self.watch.len() > 0 {
            let waited = begun.elapsed();
            if waited > 2 * patience {
                let message =
                    format!("{} connections still wait for their devices", self.watch.len());
                return Err(Error::new(ErrorKind::Io, message));
            }
            self.watch.for_each(|pulse| {
                if waited > patience {
                    pulse.hang_up();
                } else if pulse.in_flight() == 0 {
                    pulse.stop_reading();
                }
            });
            thread::sleep(DRAIN_TICK);
        }
        Ok(())
    }
}

/// How a connection begins.
#[derive(Debug)]
enum Opening {
    Handshake(Option<TlsConfig>),
    Agreed(Agreed),
}

#[derive(Debug)]
struct Listener {
    door: Door,
    closed: AtomicBool,

    /// Gone when closed.
    file: Mutex<Option<SocketFile>>,
}

#[derive(Debug)]
enum Door {
    Unix(UnixListener),
    Tcp(TcpListener, Option<TlsConfig>),
}

impl Listener {
    fn open(place: Place) -> Result<Listener> {
        let (door, file) = match place {
            Place::Unix(path) => {
                let (listener, file) = unix_socket::listen(&path)?;
                (Door::Unix(listener), Some(file))
            }
            Place::Tcp(address, tls) => {
                let listener = TcpListener::bind(address)
                    .map_err(|error| Error::io(format!("cannot listen on {address}"), error))?;
                (Door::Tcp(listener, tls), None)
            }
        };
        Ok(Listener { door, closed: AtomicBool::new(false), file: Mutex::new(file) })
    }

    fn accept(&self, shared: &Arc<Shared>) {
        while !self.closed.load(Ordering::SeqCst) {
            let accepted = match &self.door {
                Door::Unix(listener) => {
                    listener.accept().map(|(stream, _)| (Socket::Unix(stream), None))
                }
                Door::Tcp(listener, tls) => {
                    listener.accept().map(|(stream, _)| (Socket::Tcp(stream), tls.as_ref()))
                }
            };
            match accepted {
                Ok((socket, tls)) => {
                    shared.admit(socket, Opening::Handshake(tls.cloned()));
                }
                Err(_) if self.closed.load(Ordering::SeqCst) => {}
                Err(error) => {
                    // Descriptors may be short for a while; the clients wait in the backlog.
                    tracing::warn!(%error, "cannot accept");
                    thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // `accept` returns with an error.
        let shut = match &self.door {
            Door::Unix(listener) => shut_down(listener),
            Door::Tcp(listener, _) => shut_down(listener),
        };
        if let Err(error) = shut {
            tracing::warn!(%error, "cannot close a listener");
        }
        drop(lock(&self.file).take());
    }
}

fn shut_down(listener: impl AsFd) -> io::Result<()> {
    Ok(rustix::net::shutdown(listener, rustix::net::Shutdown::Both)?)
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|error| Error::io("cannot start a thread", error))
}
