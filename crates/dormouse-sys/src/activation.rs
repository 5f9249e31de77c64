//! Descriptors that whoever started this process left open for it, as systemd does (`sd_listen_fds(3)`).
//!
//! They begin at 3; `LISTEN_FDS` says how many, `LISTEN_PID` for which process, `LISTEN_FDNAMES` what
//! they are called.

use std::env;
use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// The first one (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// More are a mistake.
const DESCRIPTORS_MAX: RawFd = 64;

/// The variables of the protocol.
const VARIABLES: [&str; 3] = ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// A descriptor that was passed, with its name; empty where it has none.
#[derive(Debug)]
pub struct Passed {
    /// What whoever started us calls it.
    pub name: String,

    /// The descriptor, closed in programs that this process starts.
    pub fd: OwnedFd,
}

/// Takes what was passed; once, and nothing from then on. To be called before the process has opened
/// anything: numbers from 3 on that are not passed may be anybody's.
///
/// `InvalidInput` where the variables make no sense, `EBADF` where a number is not open.
pub fn take() -> io::Result<Vec<Passed>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let text = |name: &str| env::var(name).ok();
    let (Some(pid), Some(count)) = (text("LISTEN_PID"), text("LISTEN_FDS")) else {
        return Ok(Vec::new());
    };
    if pid.parse() != Ok(std::process::id()) || TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
    let count: RawFd =
        count.parse().ok().filter(|count| (0..=DESCRIPTORS_MAX).contains(count)).ok_or_else(
            || bad(format!("LISTEN_FDS is {count:?}, expected 0 to {DESCRIPTORS_MAX}")),
        )?;
    let names = text("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut passed = Vec::new();
    for number in FIRST..FIRST + count {
        // SAFETY: the number is only asked about here, and the kernel says whether it is open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        let flags = fcntl_getfd(borrowed)?;
        if flags.contains(FdFlags::CLOEXEC) {
            // Whatever is passed has survived an exec: this one was opened by us.
            return Err(bad(format!("descriptor {number} was not passed")));
        }
        fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)?;
        // SAFETY: it is open, it came through our exec, so that no part of this program owns it, and
        // it is taken once.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        passed.push(Passed { name: names.next().unwrap_or_default().to_owned(), fd });
    }
    Ok(passed)
}

/// Takes the protocol's variables, and `more`, out of the environment, so that programs which are
/// started do not believe that they are meant. Only while this is the process's only thread: otherwise
/// false, and they stay.
pub fn forget_variables(more: &[&str]) -> bool {
    let threads = fs::read_dir("/proc/self/task").map_or(usize::MAX, Iterator::count);
    if threads != 1 {
        return false;
    }
    for name in VARIABLES.iter().chain(more) {
        // SAFETY: no other thread is there that could read or write the environment.
        unsafe { env::remove_var(name) };
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_that_was_not_passed_to_this_process() {
        assert!(take().unwrap().is_empty());
        assert!(!forget_variables(&[]), "the harness has threads");
    }
}
