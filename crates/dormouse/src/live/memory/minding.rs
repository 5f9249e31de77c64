//! Holders that end, which nothing that they do makes them: what one had is given to another, so that the
//! next crash of this process finds it. One thread looks after all of them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use dormouse_serve::holder::{Kept, Until};
use dormouse_sys::peer::Peer;

use super::keeping::{Inner, Keeping};
use super::succession::Successor;

/// How often holders are looked at.
const TICK: Duration = Duration::from_millis(500);

static MINDED: OnceLock<Mutex<Sender<Minded>>> = OnceLock::new();

/// What a holder was given.
#[derive(Debug, Default)]
pub(super) struct Given(Mutex<BTreeMap<String, Thing>>);

/// What it has under a name.
#[derive(Debug)]
pub(super) struct Thing {
    pub(super) note: String,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) until: Until,
}

impl Given {
    pub(super) fn add(
        &self,
        name: &str,
        note: &str,
        descriptors: &[BorrowedFd<'_>],
        until: Until,
    ) -> io::Result<()> {
        let copies: io::Result<_> =
            descriptors.iter().map(BorrowedFd::try_clone_to_owned).collect();
        let thing = Thing { note: note.to_owned(), descriptors: copies?, until };
        self.things().insert(name.to_owned(), thing);
        Ok(())
    }

    /// Notes what was taken back, and is still there.
    pub(super) fn add_kept(&self, name: &str, kept: &Kept) -> io::Result<()> {
        let descriptors: Vec<_> = kept.descriptors.iter().map(AsFd::as_fd).collect();
        self.add(name, &kept.note, &descriptors, Until::LastIsReadable)
    }

    /// Forgets all of it: from now on the holder's end means nothing.
    pub(super) fn clear(&self) {
        self.things().clear();
    }

    pub(super) fn things(&self) -> MutexGuard<'_, BTreeMap<String, Thing>> {
        // Things come and go whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A holder that is looked after as long as somebody has its [`Keeping`].
struct Minded {
    keeping: Weak<Inner>,
    successor: Successor,
    holder: Option<Peer>,
}

impl Minded {
    /// Starts another holder where the last one has ended; false if nobody needs one any more.
    fn look(&mut self) -> bool {
        let Some(keeping) = self.keeping.upgrade().map(Keeping::of) else { return false };
        if self.holder.as_ref().is_some_and(|holder| !holder.has_ended().unwrap_or(true)) {
            return true;
        }
        match keeping.holder_or_new(&self.successor) {
            Ok(holder) => self.holder = holder,
            Err(error) => {
                tracing::error!(error = &*error, "what a successor would need is kept by nobody");
            }
        }
        true
    }
}

/// Has another holder started when this one ends.
pub(super) fn mind(keeping: &Keeping, successor: Successor) {
    let minded = MINDED.get_or_init(|| {
        let (sender, receiver) = channel();
        let started =
            thread::Builder::new().name("minding".to_owned()).spawn(move || look_after(&receiver));
        if let Err(error) = started {
            tracing::warn!(%error, "nobody looks after the processes that keep descriptors");
        }
        Mutex::new(sender)
    });
    let one = Minded { keeping: keeping.downgrade(), successor, holder: None };
    // Nobody takes it where no thread could be had.
    let _ = minded.lock().unwrap_or_else(PoisonError::into_inner).send(one);
}

fn look_after(more: &Receiver<Minded>) {
    let mut all: Vec<Minded> = Vec::new();
    loop {
        match more.recv_timeout(TICK) {
            Ok(one) => all.push(one),
            Err(RecvTimeoutError::Timeout) => all.retain_mut(Minded::look),
            // The sender is static.
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
