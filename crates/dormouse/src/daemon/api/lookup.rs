//! Work for a request that is no job: on a thread of its own, of which there are few.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};

use super::Daemon;
use super::answer::{Answer, Failure};
use crate::daemon::budget::READERS_WAITING_MAX;
use crate::exit::{Fault, Kind};

impl Daemon {
    /// Has `work` done on a thread, and counts how long it waited and took. Too many if so many wait
    /// already.
    pub(crate) async fn look_up<T: Send + 'static>(
        self: &Arc<Daemon>,
        what: &'static str,
        work: impl FnOnce(&Daemon) -> Result<T> + Send + 'static,
    ) -> Answer<T> {
        let asked = Instant::now();
        let Ok(place) = Arc::clone(&self.readers_and_waiting).try_acquire_owned() else {
            self.metrics.refused("lookups");
            let message = format!("{READERS_WAITING_MAX} requests wait already");
            return Err(Failure::too_many(&Fault::new(Kind::Busy, message).into()));
        };
        let turn = Arc::clone(&self.readers).acquire_owned().await;
        let turn = turn.context("nobody closes the queue of look-ups")?;
        let daemon = Arc::clone(self);
        // It is done to its end, though the client may be gone.
        let done = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let result = work(&daemon);
            daemon.metrics.lookup(what, begun - asked, begun.elapsed());
            drop((turn, place));
            result
        });
        let panicked = |_| Fault::new(Kind::Other, "it panicked; the daemon's log has it");
        Ok(done.await.map_err(panicked)??)
    }
}
