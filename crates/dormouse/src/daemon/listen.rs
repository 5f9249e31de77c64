//! Where clients come in: unix sockets for this user and root, TCP for whoever shows a certificate.
//!
//! As many connections are had at a time as the budget has, on unix sockets and again on TCP; more wait to
//! be accepted. Each is HTTP/1.1
//! with a bound on its head, its body and every wait for its client. A peer of another user is told so,
//! and nothing that it sends is looked at.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use dormouse_serve::nbd::{TlsConfig, TlsMode};
use dormouse_serve::unix_socket::{self, SocketFile};
use http_body_util::{BodyExt, Limited};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::AddressFamily;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use super::api::answer::Failure;
use super::budget::{HANDSHAKE_TIMEOUT, HEAD_BYTES_MAX, HEAD_TIMEOUT, HEADERS_MAX, STRANGERS_MAX};
use super::metrics::Metrics;
use super::patience::Patient;
use super::systemd::Systemd;
use crate::exit::{Fault, Kind};

/// How long nobody is accepted after it has failed: descriptors may be short for a while.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What is taken of a stranger's body, and for how long.
const STRANGER_BYTES_MAX: usize = 64 << 10;

/// See [`STRANGER_BYTES_MAX`].
const STRANGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Sockets that are listened on, before the runtime has them.
#[derive(Debug, Default)]
pub(crate) struct Doors {
    unix: Vec<std::os::unix::net::UnixListener>,
    tcp: Vec<std::net::TcpListener>,
    tls: Option<TlsConfig>,
    /// Where commands find the first unix socket.
    pub(crate) address: Option<PathBuf>,
    /// Of a socket that we made; its file goes with it.
    file: Option<SocketFile>,
}

/// Our socket on TCP, as whoever keeps it for the next daemon calls it.
const KEPT_TCP: &str = "tcp";

/// The same of a unix socket: a path may be another socket's by then.
fn kept_unix((device, inode): (u64, u64)) -> String {
    format!("unix-{device:x}-{inode:x}")
}

impl Doors {
    /// With the certificates for TCP, if there are any.
    pub(crate) fn new(tls: Option<&Path>) -> Result<Doors> {
        let tls =
            tls.map(|folder| TlsConfig::from_folder(folder, TlsMode::Required)).transpose()?;
        Ok(Doors { tls, ..Doors::default() })
    }

    /// Whether there is a unix socket.
    pub(crate) fn has_unix(&self) -> bool {
        !self.unix.is_empty()
    }

    /// Makes a unix socket, or takes the one that an earlier daemon made and had kept.
    pub(crate) fn make_unix(
        &mut self,
        path: &Path,
        mode: u32,
        systemd: &mut Systemd,
    ) -> Result<()> {
        let path = std::path::absolute(path).context("cannot tell where the socket is")?;
        let there = std::fs::symlink_metadata(&path).ok();
        let kept = there.and_then(|file| systemd.take_kept(&kept_unix((file.dev(), file.ino()))));
        let listener = match kept {
            // Its file stays, as it stayed.
            Some(kept) => std::os::unix::net::UnixListener::from(kept.fd),
            None => self.make_new_unix(&path, systemd)?,
        };
        // It was made with mode 600; there is no moment at which more may connect than shall.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
            .with_context(|| format!("cannot change the mode of {}", path.display()))?;
        listener.set_nonblocking(true)?;
        self.unix.push(listener);
        self.address.get_or_insert(path);
        Ok(())
    }

    fn make_new_unix(
        &mut self,
        path: &Path,
        systemd: &Systemd,
    ) -> Result<std::os::unix::net::UnixListener> {
        let (listener, file) = unix_socket::listen(path)?;
        if systemd.notifier().keep(&kept_unix(file.identity()), listener.as_fd()) {
            // Who connects while there is no daemon waits for the next one.
            file.leave();
        } else {
            self.file = Some(file);
        }
        Ok(listener)
    }

    /// Listens on TCP.
    pub(crate) fn make_tcp(
        &mut self,
        address: std::net::SocketAddr,
        systemd: &mut Systemd,
    ) -> Result<()> {
        let kept = systemd.take_kept(KEPT_TCP).map(|kept| std::net::TcpListener::from(kept.fd));
        let is_wanted = |kept: &std::net::TcpListener| {
            kept.local_addr().is_ok_and(|at| {
                at.ip() == address.ip() && (address.port() == 0 || at.port() == address.port())
            })
        };
        let listener = match kept.filter(is_wanted) {
            Some(kept) => kept,
            None => {
                let listener = std::net::TcpListener::bind(address)
                    .with_context(|| format!("cannot listen on {address}"))?;
                systemd.notifier().forget(KEPT_TCP);
                systemd.notifier().keep(KEPT_TCP, listener.as_fd());
                listener
            }
        };
        let bound = listener.local_addr().context("a listener has an address")?;
        tracing::info!(address = %bound, "listening");
        self.add_tcp(listener)
    }

    fn add_tcp(&mut self, listener: std::net::TcpListener) -> Result<()> {
        if self.tls.is_none() {
            let message = "TCP wants --tls DIR: nobody is let in without a certificate";
            return Err(Fault::usage(message).into());
        }
        listener.set_nonblocking(true)?;
        self.tcp.push(listener);
        Ok(())
    }

    /// Takes the socket's file away, so that commands do their work themselves; not where somebody keeps
    /// the socket.
    pub(crate) fn remove_file(&mut self) {
        drop(self.file.take());
    }

    /// Takes a socket that somebody else listens on for us.
    pub(crate) fn add_passed(&mut self, name: &str, fd: OwnedFd) -> Result<()> {
        let unusable = |why: &str| {
            let message = format!("the socket {name:?} that was passed {why}");
            anyhow::Error::from(Fault::usage(message))
        };
        if !rustix::net::sockopt::socket_acceptconn(&fd).unwrap_or(false) {
            return Err(unusable("is not listened on; it must be a stream with Accept=no"));
        }
        match rustix::net::sockopt::socket_domain(&fd)? {
            AddressFamily::UNIX => {
                let listener = std::os::unix::net::UnixListener::from(fd);
                listener.set_nonblocking(true)?;
                let address = listener.local_addr()?;
                let Some(path) = address.as_pathname() else {
                    return Err(unusable("has no path, and no command would find it"));
                };
                self.address.get_or_insert(path.to_owned());
                self.unix.push(listener);
                Ok(())
            }
            AddressFamily::INET | AddressFamily::INET6 => {
                self.add_tcp(std::net::TcpListener::from(fd))
            }
            _ => Err(unusable("is neither a unix socket nor TCP")),
        }
    }
}

/// What all connections share.
#[derive(Clone, Debug)]
pub(crate) struct Reception {
    router: Router,
    strangers_router: Router,
    metrics: Arc<Metrics>,
    connections: Arc<Semaphore>,
    /// Places of their own: who has shown no certificate yet keeps nobody of this host waiting.
    tcp_connections: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    connections_max: u32,
    /// True when connections are to end.
    stop: watch::Sender<bool>,
    /// True when nobody is let in any more.
    closed: watch::Sender<bool>,
}

impl Reception {
    /// For a router.
    pub(crate) fn new(router: Router, connections: usize, metrics: Arc<Metrics>) -> Reception {
        Reception {
            router,
            strangers_router: Router::new().fallback(stranger),
            metrics,
            connections: Arc::new(Semaphore::new(connections)),
            tcp_connections: Arc::new(Semaphore::new(connections)),
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
            connections_max: u32::try_from(connections).unwrap_or(u32::MAX),
            stop: watch::Sender::new(false),
            closed: watch::Sender::new(false),
        }
    }

    /// Lets clients in from now on.
    pub(crate) fn open(&self, doors: &mut Doors) -> Result<()> {
        for listener in doors.unix.drain(..) {
            tokio::spawn(self.clone().accept_unix(UnixListener::from_std(listener)?));
        }
        if let Some(tls) = &doors.tls {
            let mut config = (*tls.server_config()).clone();
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            let acceptor = TlsAcceptor::from(Arc::new(config));
            for listener in doors.tcp.drain(..) {
                let listener = TcpListener::from_std(listener)?;
                tokio::spawn(self.clone().accept_tcp(listener, acceptor.clone()));
            }
        }
        Ok(())
    }

    /// Lets nobody in any more; who is in stays.
    pub(crate) fn close(&self) {
        self.closed.send_replace(true);
    }

    /// Ends connections when they have their answers, and returns when all have ended.
    pub(crate) async fn end(&self) {
        self.stop.send_replace(true);
        // It is never closed, so all that fails is to wait.
        let _ = self.connections.acquire_many(self.connections_max).await;
        let _ = self.tcp_connections.acquire_many(self.connections_max).await;
    }

    /// A place for a connection, once there is one; none when all is over.
    async fn place(&self, places: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        let mut closed = self.closed.subscribe();
        tokio::select! {
            place = Arc::clone(places).acquire_owned() => place.ok(),
            _ = closed.wait_for(|closed| *closed) => None,
        }
    }

    async fn accept_unix(self, listener: UnixListener) {
        let mut closed = self.closed.subscribe();
        while let Some(place) = self.place(&self.connections).await {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = closed.wait_for(|closed| *closed) => return,
            };
            match accepted {
                Ok((stream, _)) => self.admit(stream, place),
                Err(error) => pause(&error).await,
            }
        }
    }

    fn admit(&self, stream: UnixStream, place: OwnedSemaphorePermit) {
        let peer = match stream.peer_cred() {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(%error, "a peer that cannot be known");
                return;
            }
        };
        if peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw() {
            tokio::spawn(self.clone().converse(self.router.clone(), stream, place));
            return;
        }
        self.metrics.refused("stranger");
        tracing::warn!(uid = peer.uid(), pid = peer.pid(), "a peer of another user");
        // They take no place from those who may come in.
        drop(place);
        if let Ok(place) = Arc::clone(&self.strangers).try_acquire_owned() {
            tokio::spawn(self.clone().converse(self.strangers_router.clone(), stream, place));
        }
    }

    async fn accept_tcp(self, listener: TcpListener, acceptor: TlsAcceptor) {
        let mut closed = self.closed.subscribe();
        while let Some(place) = self.place(&self.tcp_connections).await {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = closed.wait_for(|closed| *closed) => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    pause(&error).await;
                    continue;
                }
            };
            let (reception, acceptor) = (self.clone(), acceptor.clone());
            tokio::spawn(async move {
                let handshake = acceptor.accept(stream);
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                    Ok(Ok(stream)) => {
                        let router = reception.router.clone();
                        reception.converse(router, stream, place).await;
                    }
                    Ok(Err(error)) => {
                        reception.metrics.refused("handshake");
                        tracing::warn!(%peer, %error, "a TLS handshake failed");
                    }
                    Err(_) => {
                        reception.metrics.refused("handshake");
                        tracing::warn!(%peer, "a TLS handshake took too long");
                    }
                }
            });
        }
    }

    async fn converse<S>(self, router: Router, stream: S, place: OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut stop = self.stop.subscribe();
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX);
        let stream = TokioIo::new(Patient::new(stream));
        let mut connection = pin!(http.serve_connection(stream, TowerToHyperService::new(router)));
        let told = async move { stop.wait_for(|stop| *stop).await.is_ok() };
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            _ = told => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended");
        }
        drop(place);
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

/// Tells who is not let in. A little of what it sends is taken first, and not looked at: who is still
/// sending would find the connection broken and no answer.
async fn stranger(request: Request) -> Response {
    let body = Limited::new(request.into_body(), STRANGER_BYTES_MAX);
    // However that ends, the answer is the same.
    let _ = tokio::time::timeout(STRANGER_TIMEOUT, body.collect()).await;
    let message = "this daemon answers its own user and root alone".to_owned();
    let failure = Failure::with_status(StatusCode::FORBIDDEN, Kind::Refused, message);
    ([("connection", "close")], failure).into_response()
}
