//! A connection to QEMU's machine protocol.
//!
//! Commands are numbered, so that an answer that comes after its time is not taken for the next
//! one's; no two connections have the same numbers, as QEMU gives what a client that was killed had asked
//! for to the next one. Events come in between and are kept, [`EVENTS_MAX`] of them, until somebody asks.
//! A monitor has one client at a time; another one's connection waits unanswered until the first is
//! closed.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use dormouse_sys::passing;
use serde_json::{Value, json};

use super::message::{LINE_BYTES_MAX, Message, parse};
use crate::deadline::Deadline;
use crate::error::{Answer, Error, ErrorKind, Result};
use crate::kind::Version;

/// Events that are kept; the oldest are forgotten. A sleep looks for one or two.
const EVENTS_MAX: usize = 256;

/// Bytes taken from the socket at once.
const PIECE_BYTES: usize = 16 << 10;

/// A connection past its greeting.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    /// Bytes after the last whole line.
    pending: Vec<u8>,
    events: VecDeque<(String, Value)>,
    last_id: u64,
    version: Version,
}

impl Qmp {
    /// Takes QEMU's greeting, and says that we have no wishes.
    pub(super) fn greet(stream: UnixStream, deadline: Deadline) -> Result<Qmp> {
        Qmp::greet_from(stream, first_id(), deadline)
    }

    /// The same with numbers from `first_id` on.
    fn greet_from(stream: UnixStream, first_id: u64, deadline: Deadline) -> Result<Qmp> {
        let version = Version::new(0, 0, 0);
        let (pending, events) = (Vec::new(), VecDeque::new());
        let mut qmp = Qmp { stream, pending, events, last_id: first_id - 1, version };
        let greeting = qmp.next_of_ours("QEMU's greeting", deadline).map_err(|error| {
            let is_late = error.kind() == ErrorKind::Timeout;
            let context = "QEMU does not greet; does another client hold its QMP socket?";
            if is_late { Error::with_source(ErrorKind::Timeout, context, error) } else { error }
        })?;
        let Message::Greeting { version: [major, minor, micro] } = greeting else {
            let context = format!("expected QEMU's greeting, got {greeting:?}");
            return Err(Error::new(ErrorKind::Protocol, context));
        };
        qmp.version = Version::new(major, minor, micro);
        qmp.execute("qmp_capabilities", Value::Null, deadline)?;
        Ok(qmp)
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Runs a command, and returns its answer.
    pub(super) fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        deadline: Deadline,
    ) -> Result<Value> {
        self.execute_with(command, arguments, &[], deadline)
    }

    /// Runs a command that takes descriptors.
    pub(super) fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        descriptors: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<Value> {
        self.last_id += 1;
        let mut request = json!({ "execute": command, "id": self.last_id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        let cannot_send = |error| Error::io(format!("cannot send {command} to QEMU"), error);
        self.stream.set_write_timeout(Some(deadline.left(command)?)).map_err(cannot_send)?;
        passing::send(&self.stream, &line, descriptors).map_err(cannot_send)?;
        loop {
            match self.next(command, deadline)? {
                Message::Event { name, data } => self.keep(name, data),
                Message::Return { id, value } if id == Some(self.last_id) => return Ok(value),
                Message::Refusal { id: None, text } => {
                    return Err(Error::refused(Answer::new(command, None, &text)));
                }
                Message::Refusal { id, text } if id == Some(self.last_id) => {
                    return Err(Error::refused(Answer::new(command, None, &text)));
                }
                // The answer to a command that was given up, or to another client's.
                Message::Return { id: Some(_), .. } | Message::Refusal { id: Some(_), .. } => {}
                other => {
                    let context = format!("expected QEMU's answer to {command}, got {other:?}");
                    return Err(Error::new(ErrorKind::Protocol, context));
                }
            }
        }
    }

    /// Forgets the events so far.
    pub(super) fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Waits for an event; those before it are forgotten.
    pub(super) fn wait_event(&mut self, name: &str, deadline: Deadline) -> Result<Value> {
        loop {
            while let Some((kept, data)) = self.events.pop_front() {
                if kept == name {
                    return Ok(data);
                }
            }
            match self.next(name, deadline)? {
                Message::Event { name, data } => self.keep(name, data),
                Message::Return { .. } | Message::Refusal { .. } => {}
                other @ Message::Greeting { .. } => {
                    let context = format!("expected the event {name}, got {other:?}");
                    return Err(Error::new(ErrorKind::Protocol, context));
                }
            }
        }
    }

    fn keep(&mut self, name: String, data: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back((name, data));
    }

    /// The next line that is no answer: nobody has asked yet, or it was another client.
    fn next_of_ours(&mut self, what: &str, deadline: Deadline) -> Result<Message> {
        loop {
            match self.next(what, deadline)? {
                Message::Return { id: Some(_), .. } | Message::Refusal { id: Some(_), .. } => {}
                message => return Ok(message),
            }
        }
    }

    /// The next line. `what` is waited for.
    fn next(&mut self, what: &str, deadline: Deadline) -> Result<Message> {
        let mut looked_at = 0;
        loop {
            let found = self.pending[looked_at..].iter().position(|&byte| byte == b'\n');
            if let Some(end) = found.map(|at| looked_at + at) {
                let message = parse(&self.pending[..end]);
                self.pending.drain(..=end);
                return message;
            }
            looked_at = self.pending.len();
            if looked_at > LINE_BYTES_MAX {
                let context = format!("QEMU said more than {LINE_BYTES_MAX} bytes in one line");
                return Err(Error::new(ErrorKind::Protocol, context));
            }
            self.read_some(what, deadline)?;
        }
    }

    fn read_some(&mut self, what: &str, deadline: Deadline) -> Result<()> {
        let mut piece = [0; PIECE_BYTES];
        loop {
            let left = deadline.left(what)?;
            let read = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut piece));
            match read {
                Ok(0) => {
                    let context = format!("QEMU closed its QMP socket before {what}; it has ended");
                    return Err(Error::new(ErrorKind::Gone, context));
                }
                Ok(count) => {
                    self.pending.extend_from_slice(&piece[..count]);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(deadline.passed(what));
                }
                Err(error) => {
                    return Err(Error::io(format!("waiting for {what} of QEMU"), error));
                }
            }
        }
    }
}

/// A number from which on nobody else counts: the time, in units that each leave room for 65,536 commands.
fn first_id() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_micros()).unwrap_or(0).max(1);
    let last = LAST.fetch_max(now, Ordering::Relaxed);
    // JSON's integers have 63 bits, and some readers' 53.
    let unique = if last < now { now } else { LAST.fetch_add(1, Ordering::Relaxed) + 1 };
    (unique % (1 << 37)) << 16 | 1
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::time::Duration;

    use super::*;

    const GREETING: &str =
        "{\"QMP\":{\"version\":{\"qemu\":{\"micro\":2,\"minor\":0,\"major\":10}}}}\n";

    /// A `Qmp` whose QEMU has said `lines` after its greeting, and the other end.
    fn scripted(lines: &str) -> (Result<Qmp>, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(GREETING.as_bytes()).unwrap();
        theirs.write_all(b"{\"return\":{},\"id\":1}\n").unwrap();
        theirs.write_all(lines.as_bytes()).unwrap();
        (Qmp::greet_from(ours, 1, soon()), theirs)
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(100))
    }

    #[test]
    fn answers_are_matched_and_events_kept() {
        let (qmp, theirs) = scripted(concat!(
            "{\"event\":\"RESET\"}\n{\"event\":\"STOP\"}\n",
            "{\"return\":\"late\",\"id\":1}\n{\"return\":\"mine\",\"id\":2}\n",
        ));
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.version(), Version::new(10, 0, 2));
        assert_eq!(qmp.execute("stop", Value::Null, soon()).unwrap(), "mine");
        qmp.wait_event("STOP", soon()).unwrap();
        assert_eq!(qmp.wait_event("STOP", soon()).unwrap_err().kind(), ErrorKind::Timeout);
        let mut asked = BufReader::new(theirs).lines().map(|line| line.unwrap());
        assert_eq!(asked.next().unwrap(), "{\"execute\":\"qmp_capabilities\",\"id\":1}");
        assert_eq!(asked.next().unwrap(), "{\"execute\":\"stop\",\"id\":2}");
    }

    /// A client was killed that had asked for something: the next one is given the answer.
    #[test]
    fn answers_to_another_client_are_not_ours() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let stale = "{\"return\":\"another's\",\"id\":1}\n";
        theirs.write_all(stale.as_bytes()).unwrap();
        theirs.write_all(GREETING.as_bytes()).unwrap();
        theirs.write_all(stale.as_bytes()).unwrap();
        let mut asked = BufReader::new(theirs.try_clone().unwrap()).lines();
        let answering = std::thread::spawn(move || {
            let mut ids = Vec::new();
            for value in ["{}", "\"mine\""] {
                let line: Value = serde_json::from_str(&asked.next().unwrap().unwrap()).unwrap();
                let id = line["id"].as_u64().unwrap();
                writeln!(theirs, "{stale}{{\"return\":{value},\"id\":{id}}}").unwrap();
                ids.push(id);
            }
            ids
        });
        let deadline = Deadline::after(Duration::from_secs(10));
        let mut qmp = Qmp::greet(ours, deadline).unwrap();
        assert_eq!(qmp.execute("stop", Value::Null, deadline).unwrap(), "mine");
        let ids = answering.join().unwrap();
        assert!(ids[0] > 1 && ids[1] == ids[0] + 1, "{ids:?}");
        assert_ne!(first_id(), first_id());
    }

    #[test]
    fn every_other_answer_is_an_error_of_its_kind() {
        for (lines, kind) in [
            (
                "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"},\"id\":2}\n",
                ErrorKind::Refused,
            ),
            ("{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"}}\n", ErrorKind::Refused),
            ("{\"return\":{},\"id\":3}\n", ErrorKind::Timeout),
            ("{\"return\":{}}\n", ErrorKind::Protocol),
            ("nonsense\n", ErrorKind::Protocol),
            ("{\"return\":{},\"id\"", ErrorKind::Timeout),
        ] {
            let (qmp, _theirs) = scripted(lines);
            let error = qmp.unwrap().execute("frobnicate", Value::Null, soon()).unwrap_err();
            assert_eq!(error.kind(), kind, "{lines} {error}");
        }
        let (qmp, theirs) = scripted("");
        drop(theirs);
        let error = qmp.unwrap().execute("stop", Value::Null, soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    }

    #[test]
    fn a_held_monitor_and_another_protocol_are_told() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Qmp::greet(ours, soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(error.to_string().contains("another client"), "{error}");
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"{\"event\":\"STOP\"}\n").unwrap();
        assert_eq!(Qmp::greet(ours, soon()).unwrap_err().kind(), ErrorKind::Protocol);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let endless = std::thread::spawn(move || while theirs.write_all(&[b' '; 65536]).is_ok() {});
        let long = Deadline::after(Duration::from_secs(20));
        assert_eq!(Qmp::greet(ours, long).unwrap_err().kind(), ErrorKind::Protocol);
        endless.join().unwrap();
    }
}
