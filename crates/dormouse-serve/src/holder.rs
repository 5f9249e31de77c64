//! Keeps the descriptors that a guest cannot live without, while the process that serves it does not.
//!
//! A userfaultfd of which the last copy is closed turns a guest's missing memory into zeros; a
//! `/dev/fuse` that is closed turns its disk into errors. So a server gives copies to a *holder*: a
//! process that does nothing else ([`hold`]) and therefore does not crash. The server's successor takes
//! them back ([`Holder::take`]).
//!
//! A request is a line of JSON, with descriptors; the answer is another. One of each for a connection.
//! Whoever can connect can take everything: the socket's folder is the owner's alone.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use dormouse_sys::passing;
use dormouse_sys::peer::Peer;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::unix_socket;

/// The longest request or answer. A table of 4,096 regions takes half of it.
const LINE_BYTES_MAX: usize = 1 << 20;

/// The most names that are kept: 16 descriptors each stay below the usual limit of 1,024.
const NAMES_MAX: usize = 60;

/// Rest after a request that failed: descriptors may be short for a while.
const AFTER_FAILURE: Duration = Duration::from_millis(10);

/// How often one that breaks off is asked again.
const ENDING_ATTEMPTS: u32 = 3;

/// How long a peer may take to say what it wants.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// Keep what comes with it; whatever had the name goes.
    Keep { name: String, note: String, ends_with_last: bool },
    /// Send copies.
    Take { name: String },
    /// Close.
    Drop { name: String },
    /// Tell all names.
    List,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Done,
    Kept { note: String },
    Nothing,
    Names(Vec<String>),
    Failed(String),
}

/// Descriptors with what their owner said of them.
#[derive(Debug)]
pub struct Kept {
    /// What the owner needs to know to use them again.
    pub note: String,

    /// In the order they were given.
    pub descriptors: Vec<OwnedFd>,
}

/// When a holder lets go by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// When it is told, or when one of the descriptors is of no more use: that of a mount fails when it
    /// was unmounted.
    Dropped,

    /// Also when the last descriptor becomes readable: a pidfd does when its process has ended.
    LastIsReadable,
}

/// A holder in another process.
#[derive(Clone, Debug)]
pub struct Holder {
    path: PathBuf,
}

impl Holder {
    /// The one that listens at `path`, if there is one.
    pub fn at(path: impl Into<PathBuf>) -> Holder {
        Holder { path: path.into() }
    }

    /// Has copies of descriptors kept under a name.
    pub fn keep(
        &self,
        name: &str,
        note: &str,
        descriptors: &[BorrowedFd<'_>],
        until: Until,
    ) -> Result<()> {
        let ends_with_last = until == Until::LastIsReadable;
        let (name, note) = (name.to_owned(), note.to_owned());
        match self.ask(&Request::Keep { name, note, ends_with_last }, descriptors)? {
            (Answer::Done, _) => Ok(()),
            (answer, _) => Err(self.odd(answer)),
        }
    }

    /// Copies of what is kept under a name. The holder goes on keeping it.
    pub fn take(&self, name: &str) -> Result<Option<Kept>> {
        match self.ask(&Request::Take { name: name.to_owned() }, &[])? {
            (Answer::Kept { note }, descriptors) => Ok(Some(Kept { note, descriptors })),
            (Answer::Nothing, _) => Ok(None),
            (answer, _) => Err(self.odd(answer)),
        }
    }

    /// Has what is kept under a name closed. A holder that keeps nothing more ends.
    pub fn drop(&self, name: &str) -> Result<()> {
        match self.ask(&Request::Drop { name: name.to_owned() }, &[])? {
            (Answer::Done | Answer::Nothing, _) => Ok(()),
            (answer, _) => Err(self.odd(answer)),
        }
    }

    /// Its process.
    pub fn process(&self) -> Result<Peer> {
        let stream = self.connect()?;
        let peer = Peer::of(&stream).map_err(|error| self.cannot(error))?;
        let answered = exchange(&stream, &Request::List, &[]).map_err(|error| self.cannot(error));
        match answered? {
            (Answer::Names(_), _) => Ok(peer),
            (answer, _) => Err(self.odd(answer)),
        }
    }

    /// The names under which something is kept.
    pub fn names(&self) -> Result<Vec<String>> {
        match self.ask(&Request::List, &[])? {
            (Answer::Names(names), _) => Ok(names),
            (answer, _) => Err(self.odd(answer)),
        }
    }

    fn ask(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>)> {
        let mut attempts = 0;
        loop {
            match exchange(&self.connect()?, request, descriptors) {
                // It may just be ending, and is not there the next time. To ask twice is to ask once.
                Err(error) if !hangs(&error) && attempts < ENDING_ATTEMPTS => {
                    attempts += 1;
                    thread::sleep(AFTER_FAILURE);
                }
                answered => return answered.map_err(|error| self.cannot(error)),
            }
        }
    }

    fn connect(&self) -> Result<UnixStream> {
        let none = || self.cannot(io::ErrorKind::NotFound.into());
        unix_socket::connect(&self.path)?.ok_or_else(none)
    }

    fn cannot(&self, error: io::Error) -> Error {
        Error::io(format!("cannot ask {}", self.path.display()), error)
    }

    fn odd(&self, answer: Answer) -> Error {
        let message = match answer {
            Answer::Failed(why) => format!("{}: {why}", self.path.display()),
            _ => format!("{} gave an answer to another question", self.path.display()),
        };
        Error::new(ErrorKind::Protocol, message)
    }
}

fn exchange(
    stream: &UnixStream,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<(Answer, Vec<OwnedFd>)> {
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    send_line(stream, request, descriptors)?;
    receive_line(stream)
}

/// Whether somebody is there who does not answer.
fn hangs(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Keeps descriptors for whoever connects, until nothing is kept any more. The socket's folder must
/// be its owner's alone ([`unix_socket::listen`]).
///
/// `first_within` is how long it waits for something to keep. `on_end` is told each name that ended by
/// itself while others are kept; nobody is served until it returns.
pub fn hold(
    listener: &UnixListener,
    first_within: Duration,
    on_end: &mut dyn FnMut(&str),
) -> Result<()> {
    let cannot = |error: io::Error| Error::io("cannot keep descriptors", error);
    let mut kept: BTreeMap<String, (Kept, Until)> = BTreeMap::new();
    let mut has_kept = false;
    loop {
        let timeout = (!has_kept).then_some(first_within);
        let ended = wait(listener, &kept, timeout).map_err(cannot)?;
        match ended {
            Waited::TimedOut => return Ok(()),
            Waited::Ended(name) => {
                kept.remove(&name);
                if !kept.is_empty() {
                    on_end(&name);
                }
            }
            Waited::Asked => {
                // Whatever becomes of one that asks, what is kept stays.
                let served = listener.accept().and_then(|(stream, _)| serve(&stream, &mut kept));
                if let Err(error) = served {
                    tracing::warn!(%error, "a request to keep descriptors failed");
                    thread::sleep(AFTER_FAILURE);
                }
                has_kept |= !kept.is_empty();
            }
        }
        if has_kept && kept.is_empty() {
            return Ok(());
        }
    }
}

/// What a holder was woken by.
enum Waited {
    Asked,
    Ended(String),
    TimedOut,
}

fn wait(
    listener: &UnixListener,
    kept: &BTreeMap<String, (Kept, Until)>,
    timeout: Option<Duration>,
) -> io::Result<Waited> {
    let mut polled = vec![PollFd::new(listener, PollFlags::IN)];
    let mut names = Vec::new();
    for (name, (kept, until)) in kept {
        let last = kept.descriptors.len().saturating_sub(1);
        let (watched, wanted) = match until {
            Until::LastIsReadable => (&kept.descriptors[last..], PollFlags::IN),
            // Failures are told without being asked for.
            Until::Dropped => (&kept.descriptors[..], PollFlags::empty()),
        };
        polled.extend(watched.iter().map(|fd| PollFd::new(fd, wanted)));
        names.extend(watched.iter().map(|_| name));
    }
    let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
    loop {
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(0) => return Ok(Waited::TimedOut),
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let has_ended = polled[1..].iter().position(|polled| !polled.revents().is_empty());
    Ok(match has_ended {
        Some(number) => Waited::Ended(names[number].clone()),
        None => Waited::Asked,
    })
}

fn serve(stream: &UnixStream, kept: &mut BTreeMap<String, (Kept, Until)>) -> io::Result<()> {
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    stream.set_write_timeout(Some(PEER_TIMEOUT))?;
    let (request, descriptors) = receive_line(stream)?;
    let none: &[BorrowedFd<'_>] = &[];
    match request {
        Request::Keep { name, note, ends_with_last } => {
            if kept.len() >= NAMES_MAX && !kept.contains_key(&name) {
                let why = format!("{NAMES_MAX} names are kept already");
                return send_line(stream, &Answer::Failed(why), none);
            }
            let until = if ends_with_last { Until::LastIsReadable } else { Until::Dropped };
            kept.insert(name, (Kept { note, descriptors }, until));
            send_line(stream, &Answer::Done, none)
        }
        Request::Take { name } => match kept.get(&name) {
            Some((kept, _)) => {
                let descriptors: Vec<_> = kept.descriptors.iter().map(AsFd::as_fd).collect();
                send_line(stream, &Answer::Kept { note: kept.note.clone() }, &descriptors)
            }
            None => send_line(stream, &Answer::Nothing, none),
        },
        Request::Drop { name } => {
            let answer = if kept.remove(&name).is_some() { Answer::Done } else { Answer::Nothing };
            send_line(stream, &answer, none)
        }
        Request::List => send_line(stream, &Answer::Names(kept.keys().cloned().collect()), none),
    }
}

fn send_line(
    stream: &UnixStream,
    value: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    passing::send(stream, &line, descriptors)
}

fn receive_line<T: for<'a> Deserialize<'a>>(stream: &UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    let mut piece = [0; 4096];
    while line.last() != Some(&b'\n') {
        let count = passing::receive(stream, &mut piece, &mut descriptors)?;
        line.extend_from_slice(&piece[..count]);
        let is_too_long = line.len() > LINE_BYTES_MAX;
        if count == 0 || is_too_long || descriptors.len() > passing::DESCRIPTORS_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok((serde_json::from_slice(&line)?, descriptors))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::process::Command;
    use std::time::Instant;

    use super::*;

    fn holder() -> (tempfile::TempDir, Holder, thread::JoinHandle<Result<()>>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("holder");
        let (listener, file) = unix_socket::listen(&path).unwrap();
        let holding = thread::spawn(move || {
            let _file = file;
            hold(&listener, Duration::from_secs(10), &mut |_| {})
        });
        (folder, Holder::at(path), holding)
    }

    fn file_with(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn what_is_kept_outlives_its_owner() {
        let (_folder, holder, holding) = holder();
        let file = file_with("kept");
        holder.keep("one", "a note", &[file.as_fd()], Until::Dropped).unwrap();
        drop(file);
        assert_eq!(holder.names().unwrap(), ["one"]);
        for _ in 0..2 {
            let mut kept = holder.take("one").unwrap().unwrap();
            assert_eq!(kept.note, "a note");
            let mut file = File::from(kept.descriptors.remove(0));
            let mut text = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, "kept");
        }
        assert!(holder.take("two").unwrap().is_none());
        holder.drop("two").unwrap();
        holder.drop("one").unwrap();
        holding.join().unwrap().unwrap();
        assert!(holder.names().is_err(), "it has ended");
    }

    #[test]
    fn what_belongs_to_a_process_ends_with_it() {
        let (_folder, holder, holding) = holder();
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let peer = Peer::by_pid(child.id()).unwrap();
        holder.keep("vm", "", &[peer.pidfd().as_fd()], Until::LastIsReadable).unwrap();
        holder.take("vm").unwrap().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        holding.join().unwrap().unwrap();
    }

    #[test]
    fn an_end_is_told_while_something_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("holder");
        let (listener, _file) = unix_socket::listen(&path).unwrap();
        let (teller, told) = std::sync::mpsc::channel();
        let holding = thread::spawn(move || {
            let mut tell = |name: &str| teller.send(name.to_owned()).unwrap();
            hold(&listener, Duration::from_secs(10), &mut tell)
        });
        let holder = Holder::at(path);
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let peer = Peer::by_pid(child.id()).unwrap();
        let file = file_with("kept");
        holder.keep("device", "", &[file.as_fd()], Until::Dropped).unwrap();
        holder.keep("server", "", &[peer.pidfd().as_fd()], Until::LastIsReadable).unwrap();
        child.kill().unwrap();
        assert_eq!(told.recv().unwrap(), "server");
        child.wait().unwrap();
        assert_eq!(holder.names().unwrap(), ["device"]);
        holder.drop("device").unwrap();
        holding.join().unwrap().unwrap();
        assert!(told.recv().is_err(), "what is dropped has not ended by itself");
    }

    #[test]
    fn what_is_of_no_more_use_is_not_kept() {
        let (_folder, holder, holding) = holder();
        let (reader, writer) = std::io::pipe().unwrap();
        let file = file_with("kept");
        holder.keep("mount", "", &[file.as_fd(), writer.as_fd()], Until::Dropped).unwrap();
        assert_eq!(holder.names().unwrap(), ["mount"]);
        drop(reader);
        holding.join().unwrap().unwrap();
    }

    #[test]
    fn nonsense_harms_nobody() {
        let (_folder, holder, holding) = holder();
        let file = file_with("kept");
        holder.keep("one", "", &[file.as_fd()], Until::Dropped).unwrap();
        for line in [&b"{}\n"[..], b"x", b"{\"take\":{\"name\":1}}\n"] {
            let mut stream = UnixStream::connect(&holder.path).unwrap();
            stream.write_all(line).unwrap();
        }
        assert_eq!(holder.names().unwrap(), ["one"]);
        holder.drop("one").unwrap();
        holding.join().unwrap().unwrap();
    }

    /// It is waited for once: nobody is to wait four times as long for one that hangs.
    #[test]
    fn one_that_hangs_is_asked_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("holder");
        let (listener, _file) = unix_socket::listen(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let begun = Instant::now();
        assert!(Holder::at(path).names().is_err());
        assert!(begun.elapsed() >= PEER_TIMEOUT && listener.accept().is_ok());
        assert!(listener.accept().is_err(), "it was asked again");
    }
}
