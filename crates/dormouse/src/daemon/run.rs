//! A daemon's life: it takes its place, mends what a crash left, answers, and ends in order.
//!
//! At SIGTERM or SIGINT it lets nobody in any more, so that commands do their work themselves; ends jobs
//! that wait; gives those that run their time, then tells them to stop, which undoes them; and leaves
//! every VM as it is. A second signal takes the time away. What a kill leaves half-made is mended by the
//! next one.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};

use super::api::{Daemon, router};
use super::budget::Budget;
use super::listen::{Doors, Reception};
use super::place::{Place, store_mark};
use super::systemd::{Notifier, Systemd};
use crate::app::App;
use crate::cli::daemon::DaemonArgs;
use crate::vm::House;
use crate::vm::repair::repair_all;

/// How long jobs may take to undo what they were told to stop.
const UNDO_TIMEOUT: Duration = Duration::from_secs(60);

/// How long connections may take to end that have their answers.
const CONNECTIONS_TIMEOUT: Duration = Duration::from_secs(3);

/// How often systemd is told that the end takes longer.
const EXTEND_INTERVAL: Duration = Duration::from_secs(5);

/// Lives until a signal.
pub(crate) fn run(app: &App, args: &DaemonArgs) -> Result<()> {
    // Before anything is opened and any thread is there.
    let mut systemd = Systemd::meet()?;
    let budget = Budget::of(args);
    let descriptors = budget.reserve_descriptors()?;
    let house = House::new(app.open()?, &app.store_dir)?;
    let mark = store_mark(&house.dir).context("cannot look at the store")?;
    let place = Place::take(&house.dir)?;
    for (live, done) in repair_all(&house)? {
        tracing::info!(%live, ?done, "a VM was left in the middle of something");
    }
    let vms = house.list()?.len();
    let mut doors = Doors::new(args.tls.as_deref())?;
    for passed in systemd.take_passed() {
        doors.add_passed(&passed.name, passed.fd)?;
    }
    if args.socket.is_some() || !doors.has_unix() {
        let path = args.socket.clone().unwrap_or_else(|| place.socket());
        doors.make_unix(&path, args.socket_mode, &mut systemd)?;
    }
    if let Some(address) = args.tcp {
        doors.make_tcp(address, &mut systemd)?;
    }
    systemd.forget_kept();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(budget.workers)
        .max_blocking_threads(budget.blocking_threads())
        .thread_name("daemon")
        .enable_all()
        .build()
        .context("cannot start the daemon's threads")?;
    let daemon = Arc::new(Daemon::new(house, budget, mark, doors.address.clone()));
    tracing::info!(
        store = %daemon.house.dir.display(),
        socket = doors.address.as_ref().map(|path| path.display().to_string()),
        vms,
        descriptors,
        threads = budget.threads(),
        "the daemon answers"
    );
    let grace = Duration::from_secs(u64::from(args.grace));
    let ended = runtime.block_on(live(daemon, doors, &place, &systemd, grace));
    // A job that cannot be stopped goes down with the process, as in a crash.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

async fn live(
    daemon: Arc<Daemon>,
    mut doors: Doors,
    place: &Place,
    systemd: &Systemd,
    grace: Duration,
) -> Result<()> {
    let mut signals = Signals::new()?;
    let notifier = systemd.notifier();
    let reception = Reception::new(
        router(Arc::clone(&daemon)),
        daemon.budget.connections,
        Arc::clone(&daemon.metrics),
    );
    reception.open(&mut doors)?;
    if let Some(address) = &doors.address {
        place.publish(address)?;
    }
    notifier.tell("READY=1\nSTATUS=answers");
    if let Some(interval) = systemd.watchdog_interval() {
        tokio::spawn(watchdog(notifier.clone(), interval));
    }
    signals.next().await;
    tracing::info!("the daemon ends; VMs run on");
    notifier.tell("STOPPING=1\nSTATUS=waits for jobs");
    place.withdraw();
    reception.close();
    doors.remove_file();
    daemon.jobs.close();
    end_jobs(&daemon, &mut signals, &notifier, grace).await;
    if timeout(CONNECTIONS_TIMEOUT, reception.end()).await.is_err() {
        tracing::warn!("clients that did not take their answers are left");
    }
    Ok(())
}

async fn end_jobs(daemon: &Daemon, signals: &mut Signals, notifier: &Notifier, grace: Duration) {
    let begun = Instant::now();
    let is_over = tokio::select! {
        () = daemon.jobs.ended() => true,
        () = extend(notifier) => false,
        () = sleep(grace) => false,
        () = signals.next() => false,
    };
    if is_over {
        return;
    }
    let after_seconds = begun.elapsed().as_secs_f64();
    tracing::warn!(after_seconds, "jobs are told to stop");
    daemon.jobs.cancel_all();
    tokio::select! {
        () = daemon.jobs.ended() => {}
        () = extend(notifier) => {}
        () = sleep(UNDO_TIMEOUT) => {
            tracing::error!("jobs that do not end are left to the next daemon");
        }
    }
}

/// Tells systemd again and again that it takes a while; never returns.
async fn extend(notifier: &Notifier) {
    loop {
        let micros = (EXTEND_INTERVAL * 3).as_micros();
        notifier.tell(&format!("EXTEND_TIMEOUT_USEC={micros}"));
        sleep(EXTEND_INTERVAL).await;
    }
}

async fn watchdog(notifier: Notifier, interval: Duration) {
    loop {
        notifier.tell("WATCHDOG=1");
        sleep(interval).await;
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Signals> {
        let get = |kind| signal(kind).context("cannot handle signals");
        Ok(Signals {
            terminate: get(SignalKind::terminate())?,
            interrupt: get(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
