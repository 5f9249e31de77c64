//! The pulse of a connection: who leads, how much is under way, and the watchdog that looks after
//! leaders who are kept by a slow request.
//!
//! Lock order: [`Watch::members`], then a connection's crew. Neither is held over I/O.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::stall::Stall;
use super::transport::Socket;

/// How often the watchdog looks while requests come in; so long, at most twice, a slow request
/// keeps others waiting.
const TICK: Duration = Duration::from_millis(1);

/// How often it looks while only handshakes are under way.
const HANDSHAKE_TICK: Duration = Duration::from_millis(50);

/// Ticks without a request after which the watchdog sleeps until it is woken.
const QUIET_TICKS_MAX: u32 = 500;

/// What a connection's threads and the server share.
#[derive(Debug)]
pub(crate) struct Pulse {
    /// Counts requests read.
    beat: AtomicU64,

    /// Whether a thread is reading from the peer.
    leading: AtomicBool,

    /// Requests read and not answered yet.
    in_flight: AtomicUsize,

    /// Set once: nothing more is read.
    closing: AtomicBool,

    /// Guards who stands by. Taken after nothing else of the connection.
    crew: Mutex<Crew>,
    call: Condvar,

    /// When the handshake must be over; none once it is.
    deadline: Mutex<Option<Instant>>,
    socket: Option<Arc<Socket>>,

    /// While replies are sent.
    sending: Stall,

    /// While the rest of a request is waited for; there from the handshake's end on.
    receiving: OnceLock<Arc<Stall>>,
    watch: Arc<Watch>,
}

#[derive(Debug, Default)]
struct Crew {
    standing_by: usize,
    called: usize,
}

impl Pulse {
    pub(crate) fn new(
        socket: Option<Arc<Socket>>,
        deadline: Option<Instant>,
        watch: Arc<Watch>,
    ) -> Pulse {
        Pulse {
            beat: AtomicU64::new(0),
            leading: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            crew: Mutex::default(),
            call: Condvar::new(),
            deadline: Mutex::new(deadline),
            socket,
            sending: Stall::default(),
            receiving: OnceLock::new(),
            watch,
        }
    }

    /// The handshake is over.
    pub(crate) fn begin_transmission(&self) {
        *lock(&self.deadline) = None;
    }

    /// Requests come from where this tells of waits.
    pub(crate) fn watch_input(&self, stall: &Arc<Stall>) {
        // A connection has one input; a second call would be for the same one.
        let _ = self.receiving.set(Arc::clone(stall));
    }

    pub(crate) fn sending(&self) -> &Stall {
        &self.sending
    }

    /// How long the peer has neither taken a reply nor gone on with a request that it began.
    fn stalled_for(&self) -> Option<Duration> {
        self.sending.lasts().max(self.receiving.get().and_then(|stall| stall.lasts()))
    }

    pub(crate) fn set_leading(&self, leading: bool) {
        // Pairs with `stand_by`, which reads it under the crew's lock.
        self.leading.store(leading, Ordering::SeqCst);
    }

    /// A request was read.
    pub(crate) fn request_read(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.beat.fetch_add(1, Ordering::Relaxed);
        self.watch.wake();
    }

    /// The replies to so many requests were sent.
    pub(crate) fn requests_answered(&self, count: usize) {
        if count > 0 {
            self.in_flight.fetch_sub(count, Ordering::Relaxed);
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Nothing more is read; those who stand by go home, the others when they are done.
    pub(crate) fn close(&self) {
        let crew = lock(&self.crew);
        self.closing.store(true, Ordering::SeqCst);
        drop(crew);
        self.call.notify_all();
    }

    /// Ends the socket under everybody.
    pub(crate) fn hang_up(&self) {
        if let Some(socket) = &self.socket {
            socket.close();
        }
    }

    pub(crate) fn stop_reading(&self) {
        if let Some(socket) = &self.socket {
            socket.stop_reading();
        }
    }

    /// Whether the peer has sent something that was not read yet. True where that is unknown.
    pub(crate) fn has_input(&self) -> bool {
        self.socket.as_ref().is_none_or(|socket| socket.has_input())
    }

    /// Asks somebody who stands by to lead. Those who are at work come by themselves.
    pub(crate) fn call_another(&self) {
        let mut crew = lock(&self.crew);
        if crew.standing_by > crew.called {
            crew.called += 1;
            drop(crew);
            self.call.notify_one();
        }
    }

    /// Waits to be called; false when the connection is over.
    pub(crate) fn stand_by(&self) -> bool {
        let mut crew = lock(&self.crew);
        if self.is_closing() {
            return false;
        }
        if !self.leading.load(Ordering::SeqCst) {
            // The lead was given up between our try and now, perhaps with a call that missed us.
            return true;
        }
        crew.standing_by += 1;
        while crew.called == 0 && !self.is_closing() {
            crew = self.call.wait(crew).unwrap_or_else(PoisonError::into_inner);
        }
        crew.standing_by -= 1;
        crew.called = crew.called.saturating_sub(1);
        !self.is_closing()
    }
}

/// Looks after all connections of a server from one thread.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    asleep: AtomicBool,
    members: Mutex<Members>,
    alarm: Condvar,
}

#[derive(Debug, Default)]
struct Members {
    list: Vec<(Arc<Pulse>, u64)>,
    over: bool,
}

impl Watch {
    pub(crate) fn join(&self, pulse: Arc<Pulse>) {
        lock(&self.members).list.push((pulse, 0));
        self.alarm.notify_all();
    }

    pub(crate) fn leave(&self, pulse: &Arc<Pulse>) {
        lock(&self.members).list.retain(|(member, _)| !Arc::ptr_eq(member, pulse));
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.members).list.len()
    }

    /// Hangs up on the connection that has stalled longest, if one has for `time`.
    pub(crate) fn drop_stalled(&self, time: Duration) -> bool {
        let members = lock(&self.members);
        let stalled = members
            .list
            .iter()
            .filter_map(|(member, _)| Some((member.stalled_for()?, member)))
            .filter(|(stalled, _)| *stalled >= time)
            .max_by_key(|(stalled, _)| *stalled);
        let Some((stalled, member)) = stalled else { return false };
        tracing::warn!(?stalled, "a client that stalled makes room for another one");
        member.hang_up();
        true
    }

    pub(crate) fn for_each(&self, mut visit: impl FnMut(&Pulse)) {
        for (member, _) in &lock(&self.members).list {
            visit(member);
        }
    }

    /// Ends [`run`](Watch::run).
    pub(crate) fn end(&self) {
        lock(&self.members).over = true;
        self.alarm.notify_all();
    }

    fn wake(&self) {
        if self.asleep.load(Ordering::Relaxed) {
            // With the lock, so that it does not come between the watchdog's decision and its sleep.
            drop(lock(&self.members));
            self.alarm.notify_all();
        }
    }

    /// The watchdog's thread.
    pub(crate) fn run(&self) {
        let mut quiet_ticks = 0;
        let mut members = lock(&self.members);
        while !members.over {
            let mut handshakes = false;
            let mut busy = false;
            for (member, seen) in &mut members.list {
                let beat = member.beat.load(Ordering::Relaxed);
                busy |= beat != *seen;
                let stuck = beat == *seen && member.in_flight() > 0;
                *seen = beat;
                if stuck && !member.leading.load(Ordering::SeqCst) {
                    member.call_another();
                    busy = true;
                }
                handshakes |= member.check_deadline();
            }
            quiet_ticks = if busy { 0 } else { quiet_ticks + 1 };
            let nap = match (quiet_ticks > QUIET_TICKS_MAX, handshakes) {
                (false, _) => Some(TICK),
                (true, true) => Some(HANDSHAKE_TICK),
                (true, false) => None,
            };
            members = match nap {
                Some(nap) if nap == TICK => {
                    self.alarm.wait_timeout(members, nap).unwrap_or_else(PoisonError::into_inner).0
                }
                nap => {
                    self.asleep.store(true, Ordering::Relaxed);
                    let day = Duration::from_secs(24 * 60 * 60);
                    let (members, timeout) = self
                        .alarm
                        .wait_timeout(members, nap.unwrap_or(day))
                        .unwrap_or_else(PoisonError::into_inner);
                    self.asleep.store(false, Ordering::Relaxed);
                    if !timeout.timed_out() {
                        quiet_ticks = 0;
                    }
                    members
                }
            };
        }
    }
}

impl Pulse {
    /// Whether the handshake is under way; hangs up when it took too long.
    fn check_deadline(&self) -> bool {
        let mut deadline = lock(&self.deadline);
        match *deadline {
            None => false,
            Some(time) if time > Instant::now() => true,
            Some(_) => {
                tracing::info!("a client took too long for its handshake");
                *deadline = None;
                self.hang_up();
                false
            }
        }
    }
}

/// A lock whose holders leave what it guards in order even when they panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_call_finds_who_stands_by_and_a_close_sends_all_home() {
        let pulse = Arc::new(Pulse::new(None, None, Arc::default()));
        pulse.set_leading(true);
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let pulse = Arc::clone(&pulse);
                thread::spawn(move || pulse.stand_by())
            })
            .collect();
        while lock(&pulse.crew).standing_by < 3 {
            thread::yield_now();
        }
        pulse.call_another();
        while lock(&pulse.crew).standing_by > 2 {
            thread::yield_now();
        }
        pulse.close();
        let called = waiting.into_iter().map(|thread| thread.join().unwrap());
        assert!(called.filter(|&called| called).count() <= 1);
        assert!(!pulse.stand_by());
    }

    #[test]
    fn nobody_stands_by_while_nobody_leads() {
        let pulse = Pulse::new(None, None, Arc::default());
        assert!(pulse.stand_by());
    }
}
