//! Pipes to and from QEMU whose waiting ends when it is told to, so that a QEMU that hangs leaves no
//! thread behind.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::error::{Error, Result};

/// What a pipe holds, where the kernel lets us.
const PIPE_BYTES: usize = 1 << 20;

/// Between two looks whether to go on.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Says to a thread that waits at a pipe that it need not any more.
#[derive(Debug, Default)]
pub(super) struct Cancel(AtomicBool);

impl Cancel {
    pub(super) fn now(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A pipe: the end to read from, the end to write to.
pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let made = pipe_with(PipeFlags::CLOEXEC);
    let (read, write) = made.map_err(|error| Error::io("cannot make a pipe", error.into()))?;
    // A smaller one is slower, and does.
    let _ = fcntl_setpipe_size(&read, PIPE_BYTES);
    Ok((read, write))
}

/// Reads what QEMU writes to the other end.
pub(super) fn take(pipe: OwnedFd, cancel: &Cancel) -> Taking<'_> {
    Taking { pipe: PipeReader::from(pipe), cancel }
}

/// Writes what QEMU reads at the other end.
pub(super) fn feed(pipe: OwnedFd, cancel: &Cancel) -> Feeding<'_> {
    Feeding { pipe: PipeWriter::from(pipe), cancel, is_blocking: true }
}

#[derive(Debug)]
pub(super) struct Taking<'a> {
    pipe: PipeReader,
    cancel: &'a Cancel,
}

impl Read for Taking<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        wait(&self.pipe, PollFlags::IN, self.cancel)?;
        self.pipe.read(buffer)
    }
}

#[derive(Debug)]
pub(super) struct Feeding<'a> {
    pipe: PipeWriter,
    cancel: &'a Cancel,
    is_blocking: bool,
}

impl Write for Feeding<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A pipe with room for some bytes would block on more. (The other end is not affected.)
        if self.is_blocking {
            fcntl_setfl(&self.pipe, fcntl_getfl(&self.pipe)? | OFlags::NONBLOCK)?;
            self.is_blocking = false;
        }
        loop {
            wait(&self.pipe, PollFlags::OUT, self.cancel)?;
            match self.pipe.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wait(pipe: impl AsFd, flags: PollFlags, cancel: &Cancel) -> io::Result<()> {
    loop {
        let mut poll = [PollFd::new(&pipe, flags)];
        match rustix::event::poll(&mut poll, Some(&LOOK)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        if cancel.0.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "given up"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_when_told() {
        let cancel = Cancel::default();
        let (read, write) = pipe().unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| take(read, &cancel).read(&mut [0; 8]));
            cancel.now();
            assert_eq!(waits.join().unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        });
        drop(write);
        let cancel = Cancel::default();
        let (read, write) = pipe().unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| feed(write, &cancel).write_all(&vec![7; PIPE_BYTES + 1]));
            std::thread::sleep(std::time::Duration::from_millis(30));
            cancel.now();
            assert_eq!(waits.join().unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        });
        drop(read);
    }
}
