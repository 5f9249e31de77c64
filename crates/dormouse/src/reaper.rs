//! Children of a process that lives on: each is waited for when it ends, or the kernel would keep its
//! number. One thread for all.

use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

/// How often children are looked at. One that has ended costs a number until then.
const TICK: Duration = Duration::from_secs(1);

static CHILDREN: OnceLock<Mutex<Sender<Child>>> = OnceLock::new();

/// Lets a child live on, and waits for its end somewhere else. A process that ends before leaves it to
/// another one.
pub(crate) fn let_go(child: Child) {
    let children = CHILDREN.get_or_init(|| {
        let (sender, receiver) = channel();
        let started = thread::Builder::new()
            .name("reaper".to_owned())
            .stack_size(64 << 10)
            .spawn(move || reap(&receiver));
        if let Err(error) = started {
            tracing::warn!(%error, "children that end are not waited for");
        }
        Mutex::new(sender)
    });
    // Nobody takes it where no thread could be had: its number stays taken until we end.
    let _ = children.lock().unwrap_or_else(PoisonError::into_inner).send(child);
}

fn reap(children: &Receiver<Child>) {
    let mut living: Vec<Child> = Vec::new();
    loop {
        let next = match living.is_empty() {
            true => children.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => children.recv_timeout(TICK),
        };
        match next {
            Ok(child) => living.push(child),
            Err(RecvTimeoutError::Timeout) => {}
            // The sender is static.
            Err(RecvTimeoutError::Disconnected) => return,
        }
        living.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::*;

    #[test]
    fn one_that_has_ended_leaves_nothing() {
        let child = Command::new("true").stdin(Stdio::null()).spawn().unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        let_go(child);
        let begun = Instant::now();
        while fs::exists(&stat).unwrap() {
            assert!(begun.elapsed() < Duration::from_secs(20), "it is waited for");
            thread::sleep(Duration::from_millis(20));
        }
    }
}
