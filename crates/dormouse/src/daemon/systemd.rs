//! What systemd is told, and what it gives: `sd_notify(3)`, the watchdog, sockets, and a place to keep
//! descriptors for the next daemon (`FDSTORE`, `systemd.service(5)`).
//!
//! A notification is a datagram with lines of `KEY=VALUE` to the socket that `NOTIFY_SOCKET` names; a
//! name that begins with `@` is in the abstract namespace.

use std::env;
use std::os::fd::BorrowedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_sys::activation::{self, Passed};
use dormouse_sys::passing;

/// What systemd said in the environment.
#[derive(Debug)]
pub(crate) struct Systemd {
    /// Sockets to listen on, others' and our own.
    passed: Vec<Passed>,

    notifier: Notifier,
    watchdog: Option<Duration>,
}

/// Tells systemd what the daemon is at; nobody where it was started by somebody else.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notifier {
    address: Option<SocketAddr>,
}

impl Systemd {
    /// Reads the environment and cleans it for the programs that are started. To be called first.
    pub(crate) fn meet() -> Result<Systemd> {
        let passed = activation::take().context("cannot use the sockets that were passed")?;
        let address = match env::var("NOTIFY_SOCKET") {
            Ok(name) => {
                let address = match name.strip_prefix('@') {
                    Some(name) => SocketAddr::from_abstract_name(name),
                    None => SocketAddr::from_pathname(&name),
                };
                Some(address.with_context(|| format!("NOTIFY_SOCKET is {name:?}"))?)
            }
            Err(_) => None,
        };
        let number = |name: &str| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let is_for_us =
            number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|micros| *micros > 0 && is_for_us);
        if !activation::forget_variables(&["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"]) {
            tracing::debug!("systemd's variables stay in the environment");
        }
        let notifier = Notifier { address };
        Ok(Systemd { passed, notifier, watchdog: watchdog.map(Duration::from_micros) })
    }

    /// Whom to tell.
    pub(crate) fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// How often to tell that all is well: twice as often as is asked for.
    pub(crate) fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|within| within / 2)
    }
}

impl Notifier {
    /// Tells `lines`. Who does not listen misses nothing that a VM needs.
    pub(crate) fn tell(&self, lines: &str) {
        let Some(address) = &self.address else { return };
        let sent = UnixDatagram::unbound()
            .and_then(|socket| socket.send_to_addr(lines.as_bytes(), address));
        if let Err(error) = sent {
            tracing::warn!(%error, "cannot notify systemd");
        }
    }
}

/// What the names of descriptors begin with that are kept.
const KEPT: &str = "dormouse-";

impl Systemd {
    /// Takes a descriptor that an earlier daemon had kept under `name`.
    pub(crate) fn take_kept(&mut self, name: &str) -> Option<Passed> {
        let name = format!("{KEPT}{name}");
        let at = self.passed.iter().position(|passed| passed.name == name)?;
        Some(self.passed.swap_remove(at))
    }

    /// Takes the sockets that others listen on for us.
    pub(crate) fn take_passed(&mut self) -> Vec<Passed> {
        self.passed.extract_if(.., |passed| !passed.name.starts_with(KEPT)).collect()
    }

    /// Forgets all that was kept and nobody has taken.
    pub(crate) fn forget_kept(&mut self) {
        for passed in self.passed.drain(..) {
            if let Some(name) = passed.name.strip_prefix(KEPT) {
                self.notifier.forget(name);
            }
        }
    }
}

impl Notifier {
    /// Has what is kept under a name forgotten.
    pub(crate) fn forget(&self, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={KEPT}{name}"));
    }

    /// Has a descriptor kept for the next daemon, under a name; whether there is anybody who might.
    pub(crate) fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> bool {
        let Some(address) = &self.address else { return false };
        let lines = format!("FDSTORE=1\nFDNAME={KEPT}{name}");
        let sent = UnixDatagram::unbound().and_then(|socket| {
            socket.connect_addr(address)?;
            passing::send(&socket, lines.as_bytes(), &[fd])
        });
        if let Err(error) = &sent {
            tracing::warn!(name, %error, "systemd cannot keep a socket");
        }
        sent.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_arrives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier { address: Some(SocketAddr::from_pathname(&path).unwrap()) };
        notifier.tell("READY=1\nSTATUS=well");
        let mut bytes = [0; 64];
        let count = socket.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"READY=1\nSTATUS=well");
        Notifier::default().tell("READY=1");
    }
}
