//! The line to the guest's init: commands in; their output, exit codes and a counter out.
//!
//! The init's own messages are frames: a record separator (0x1e), one line of text, a newline.
//! Everything outside of frames is what the running command (or the kernel) printed.
//! A frame is one `write` in the guest, which the kernel's tty layer does not split.
//!
//! ```text
//! guest → host    0x1e READY | 0x1e COUNTER n | 0x1e DONE rc=n
//! host → guest    one shell command, one line
//! ```

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// A tty in line mode takes no longer line; the guest would see a cut command.
const COMMAND_BYTES_MAX: usize = 4000;
/// Output beyond this is dropped from its beginning.
const TEXT_BYTES_MAX: usize = 1 << 20;
const RECORD_SEPARATOR: u8 = 0x1e;

/// What a command in the guest left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The exit code; above 128 for a command killed by a signal.
    pub rc: i32,
    /// What it printed on stdout and stderr, as it came.
    pub text: String,
}

impl Output {
    /// What the command printed, which had to succeed.
    pub(super) fn text_of(self, command: &str) -> Result<String> {
        if self.rc != 0 {
            bail!("`{command}` in the guest: exit code {}\n{}", self.rc, self.text);
        }
        Ok(self.text)
    }
}

/// A connected serial line with a thread that reads it, so that the guest never waits for us.
#[derive(Debug)]
pub(super) struct Serial {
    writer: UnixStream,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Guards all that has been read from the line; taken alone.
    state: Mutex<State>,
    changed: Condvar,
}

impl Serial {
    /// Talks to QEMU's `-serial unix:PATH,server=on` over a connected socket.
    pub(super) fn new(writer: UnixStream) -> Result<Serial> {
        let reader = writer.try_clone()?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || read_all(reader, &theirs));
        Ok(Serial { writer, shared })
    }

    /// Waits until the init says that it takes commands.
    pub(super) fn wait_ready(&self, timeout: Duration) -> Result<()> {
        self.wait(timeout, "the guest's init", |state| state.ready.then_some(()))
    }

    /// Runs one command line in the guest.
    pub(super) fn run(&mut self, command: &str, timeout: Duration) -> Result<Output> {
        if command.contains('\n') || command.len() > COMMAND_BYTES_MAX {
            bail!("a guest command is one line of at most {COMMAND_BYTES_MAX} bytes");
        }
        {
            let mut state = self.shared.lock();
            if state.busy {
                bail!("an earlier command timed out in this guest and may still run");
            }
            state.busy = true;
            state.done = None;
            state.text.clear();
        }
        self.writer.write_all(format!("{command}\n").as_bytes())?;
        let output = self.wait(timeout, command, |state| {
            let rc = state.done.take()?;
            let text = String::from_utf8_lossy(&state.text).into_owned();
            Some(Output { rc, text })
        })?;
        self.shared.lock().busy = false;
        Ok(output)
    }

    /// The last counter line that arrived.
    pub(super) fn counter(&self) -> Option<u64> {
        self.shared.lock().counter
    }

    /// Waits for a counter line that has not arrived yet.
    pub(super) fn next_counter(&self, timeout: Duration) -> Result<u64> {
        let seen = self.shared.lock().counters;
        self.wait(timeout, "the guest's counter", |state| {
            state.counter.filter(|_| state.counters > seen)
        })
    }

    /// What the guest printed outside of any command's frames, for error messages.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().text).into_owned()
    }

    fn wait<T>(
        &self,
        timeout: Duration,
        what: &str,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(value) = ready(&mut state) {
                return Ok(value);
            }
            if state.closed {
                bail!("QEMU went away while waiting for {what}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no sign of {what} within {} s", timeout.as_secs());
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A reader that panicked left plain data behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_all(mut reader: UnixStream, shared: &Shared) {
    let mut buffer = [0; 4096];
    loop {
        // An error and the end mean the same: QEMU is gone.
        let count = reader.read(&mut buffer).unwrap_or(0);
        let mut state = shared.lock();
        state.take(&buffer[..count]);
        state.closed = count == 0;
        shared.changed.notify_all();
        if count == 0 {
            return;
        }
    }
}

/// Everything that has arrived, sorted into frames and text.
#[derive(Debug, Default)]
struct State {
    ready: bool,
    busy: bool,
    closed: bool,
    done: Option<i32>,
    counter: Option<u64>,
    counters: u64,
    text: Vec<u8>,
    frame: Option<Vec<u8>>,
}

impl State {
    fn take(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match (byte, &mut self.frame) {
                (RECORD_SEPARATOR, _) => self.frame = Some(Vec::new()),
                (b'\n', Some(frame)) => {
                    let frame = std::mem::take(frame);
                    self.frame = None;
                    self.take_frame(&String::from_utf8_lossy(&frame));
                }
                (_, Some(frame)) => frame.push(byte),
                (_, None) => self.text.push(byte),
            }
        }
        let excess = self.text.len().saturating_sub(TEXT_BYTES_MAX);
        self.text.drain(..excess);
    }

    fn take_frame(&mut self, frame: &str) {
        let frame = frame.trim_end();
        if frame == "READY" {
            self.ready = true;
        } else if let Some(rc) = frame.strip_prefix("DONE rc=") {
            self.done = rc.parse().ok();
        } else if let Some(counter) = frame.strip_prefix("COUNTER ") {
            self.counter = counter.parse().ok();
            self.counters += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_of_the_middle_of_text_however_it_is_cut() {
        let stream = b"\x1eREADY\nhel\x1eCOUNTER 7\nlo\n\x1eDONE rc=3\n";
        for cut in 0..stream.len() {
            let mut state = State::default();
            state.take(&stream[..cut]);
            state.take(&stream[cut..]);
            assert!(state.ready);
            assert_eq!(state.counter, Some(7));
            assert_eq!(state.done, Some(3));
            assert_eq!(state.text, b"hello\n");
        }
    }

    #[test]
    fn the_rest_of_a_frame_that_an_earlier_qemu_began_is_no_frame() {
        let mut state = State::default();
        state.take(b"NTER 12\n\x1eCOUNTER 13\n");
        assert_eq!((state.counter, state.counters), (Some(13), 1));
    }

    #[test]
    fn long_output_keeps_its_end() {
        let mut state = State::default();
        state.take(&vec![b'a'; TEXT_BYTES_MAX]);
        state.take(b"end");
        assert_eq!(state.text.len(), TEXT_BYTES_MAX);
        assert!(state.text.ends_with(b"end"));
    }
}
