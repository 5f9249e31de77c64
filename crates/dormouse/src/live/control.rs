//! The control socket: how other commands reach the process that has a live VM.
//!
//! One request and one answer a connection, each a line of JSON; a commit's answer has lines before it
//! that tell that all is sealed, and that it is stored. The socket has mode 0600 from its
//! first moment on, lies in a folder of mode 0700, and its peers must be of the same user or root.
//! Each connection has a thread, so that neither a silent client nor a long commit keeps others
//! waiting.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dormouse_serve::unix_socket::{self, SocketFile};
use dormouse_sys::passing;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::{EarlyCopy, LiveCommit};
use crate::exit::{Fault, Kind};

/// The longest line that is read.
const LINE_BYTES_MAX: usize = 1 << 20;

/// The most descriptors that come with a request: a guest's memory has one for each slot.
const DESCRIPTORS_MAX: usize = 512;

/// How long a peer may take to say what it wants, and to take the answer.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a thread that waits for a request looks whether all is over.
const TICK: Duration = Duration::from_millis(50);

/// Connections at a time; more are commands that somebody started by mistake.
const CONNECTIONS_MAX: usize = 32;

/// How often who waits for an answer may do something else.
const IDLE_INTERVAL: Duration = Duration::from_millis(100);

/// How often a process that is just ending is asked again.
const ENDING_ATTEMPTS: u32 = 100;

/// How long the end waits for answers under way.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// What may be asked at a control socket.
pub(crate) trait Asked: Serialize + for<'de> Deserialize<'de> + 'static {
    /// What goes with it.
    fn descriptors(&self) -> &[OwnedFd] {
        &[]
    }

    /// What came with it.
    fn take(&mut self, _descriptors: Vec<OwnedFd>) {}
}

impl Asked for Request {
    fn descriptors(&self) -> &[OwnedFd] {
        match self {
            Request::Commit(wanted) => &wanted.descriptors,
            _ => &[],
        }
    }

    fn take(&mut self, descriptors: Vec<OwnedFd>) {
        if let Request::Commit(wanted) = self {
            wanted.descriptors = Arc::new(descriptors);
        }
    }
}

/// What a command asks of the process that has the disks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Figures of all disks and the memory.
    Status,

    /// A commit.
    Commit(Box<LiveCommit>),

    /// Stop a commit that is under way: it fails, and what it sealed belongs to the next one.
    Cancel {
        /// Which one.
        commit: Uuid,
    },

    /// Copy what a guest changed whose VMM still writes its state, for a commit that is about to come.
    Copy(Box<EarlyCopy>),

    /// Forget such a copy.
    DropCopy,

    /// Stop serving, let go of the disks and end.
    Stop,
}

/// The answer: a result, or why there is none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// What came before the end; more follows.
    Told(Value),

    /// What was asked for.
    Done(Value),

    /// A failure: its kind's word, and its causes, outermost first.
    Failed { kind: String, causes: Vec<String> },
}

impl Answer {
    fn of(result: Result<Value>) -> Answer {
        match result {
            Ok(value) => Answer::Done(value),
            Err(error) => Answer::Failed {
                kind: Kind::of(&error).word().to_owned(),
                causes: error.chain().map(ToString::to_string).collect(),
            },
        }
    }
}

/// Tells what came before the end.
pub(crate) type Tell<'a> = &'a mut (dyn FnMut(Value) + Send);

/// Hears what came before the end.
pub(crate) type Hear<'a> = &'a mut dyn FnMut(Value);

/// Answers a request; called from several threads at once.
pub(crate) type Answerer<R> = Arc<dyn Fn(R, Tell<'_>) -> Result<Value> + Send + Sync>;

/// A control socket that is answered on. Dropping it removes the file and waits for what is being
/// answered.
pub(crate) struct Control {
    listener: Arc<UnixListener>,
    file: Option<SocketFile>,
    connections: Arc<Connections>,
    thread: Option<JoinHandle<()>>,
}

/// How many connections there are, and whether more are welcome.
#[derive(Debug, Default)]
struct Connections {
    count: Mutex<usize>,
    left: Condvar,
    is_over: AtomicBool,
}

impl Connections {
    fn count(&self) -> MutexGuard<'_, usize> {
        // A number is whole, whoever panicked.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of the connections; it leaves when this is dropped.
struct Guest(Arc<Connections>);

impl Guest {
    fn admit(connections: &Arc<Connections>) -> Option<Guest> {
        let mut count = connections.count();
        if *count >= CONNECTIONS_MAX {
            return None;
        }
        *count += 1;
        Some(Guest(Arc::clone(connections)))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.left.notify_all();
    }
}

impl Control {
    /// Listens at `path`; each request is answered by `answerer`.
    pub(crate) fn start<R>(path: &Path, answerer: Answerer<R>) -> Result<Control>
    where
        R: Asked,
    {
        let (listener, file) = unix_socket::listen(path)?;
        let listener = Arc::new(listener);
        let connections = Arc::<Connections>::default();
        let thread = {
            let (listener, connections) = (Arc::clone(&listener), Arc::clone(&connections));
            thread::Builder::new()
                .name("control".to_owned())
                .spawn(move || accept(&listener, &connections, &answerer))
                .context("cannot start the control socket")?
        };
        Ok(Control { listener, file: Some(file), connections, thread: Some(thread) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.connections.is_over.store(true, Ordering::SeqCst);
        drop(self.file.take());
        // `accept` returns with an error. A socket that cannot be shut down has no more to accept.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by its hook.
            let _ = thread.join();
        }
        let count = self.connections.count();
        let waited =
            self.connections.left.wait_timeout_while(count, END_TIMEOUT, |count| *count > 0);
        if waited.is_ok_and(|(count, _)| *count > 0) {
            tracing::warn!("requests at the control socket were not answered");
        }
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("file", &self.file).finish_non_exhaustive()
    }
}

fn accept<R>(listener: &UnixListener, connections: &Arc<Connections>, answerer: &Answerer<R>)
where
    R: Asked,
{
    while !connections.is_over.load(Ordering::SeqCst) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) if connections.is_over.load(Ordering::SeqCst) => return,
            Err(error) => {
                // Descriptors may be short for a while; the clients wait in the backlog.
                tracing::warn!(%error, "cannot accept at the control socket");
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let Some(guest) = Guest::admit(connections) else {
            let message = format!("{CONNECTIONS_MAX} commands are waiting for an answer already");
            let busy = Answer::of(Err(Fault::new(Kind::Busy, message).into()));
            // Who does not take it is told by the closed connection.
            let _ = stream.set_nonblocking(true).map(|()| say(&stream, &busy));
            continue;
        };
        let answerer = Arc::clone(answerer);
        let started = thread::Builder::new().name("control-answer".to_owned()).spawn(move || {
            if let Err(error) = answer(&stream, &guest.0.is_over, &answerer) {
                tracing::debug!(%error, "a control connection failed");
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "cannot answer at the control socket");
        }
    }
}

fn answer<R>(stream: &UnixStream, is_over: &AtomicBool, answerer: &Answerer<R>) -> Result<()>
where
    R: Asked,
{
    let peer = rustix::net::sockopt::socket_peercred(stream)?.uid;
    if !peer.is_root() && peer != rustix::process::geteuid() {
        bail!("a peer of user {}", peer.as_raw());
    }
    stream.set_write_timeout(Some(PEER_TIMEOUT))?;
    let (line, descriptors) = read_request(stream, is_over)?;
    let result = serde_json::from_slice(&line)
        .map_err(|error| Fault::usage(format!("a request that is not understood: {error}")).into())
        .and_then(|mut request: R| {
            request.take(descriptors);
            // Who does not listen any more will not hear the end either; the work is done all the same.
            let mut listens = true;
            answerer(request, &mut |value| {
                listens = listens && say(stream, &Answer::Told(value)).is_ok();
            })
        });
    say(stream, &Answer::of(result))
}

/// The line up to its end, within the time a peer has for all of it.
fn read_request(stream: &UnixStream, is_over: &AtomicBool) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let deadline = Instant::now() + PEER_TIMEOUT;
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    let mut buffer = [0; 4096];
    stream.set_read_timeout(Some(TICK))?;
    loop {
        if Instant::now() > deadline || is_over.load(Ordering::SeqCst) {
            bail!("a peer took too long to say what it wants");
        }
        let count = match passing::receive(stream, &mut buffer, &mut descriptors) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            count => count?,
        };
        if count == 0 {
            bail!("a peer left without a request");
        }
        line.extend_from_slice(&buffer[..count]);
        if line.contains(&b'\n') {
            return Ok((line, descriptors));
        }
        if descriptors.len() > DESCRIPTORS_MAX {
            bail!("a request with more than {DESCRIPTORS_MAX} descriptors");
        }
        if line.len() > LINE_BYTES_MAX {
            bail!("a request of more than {LINE_BYTES_MAX} bytes");
        }
    }
}

fn say(mut stream: &UnixStream, message: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string(message)?;
    text.push('\n');
    Ok(stream.write_all(text.as_bytes())?)
}

/// Says a request; descriptors go with pieces of the line, as a message takes only so many.
fn say_request(stream: &UnixStream, request: &impl Asked) -> Result<()> {
    let descriptors = request.descriptors();
    if descriptors.is_empty() {
        return say(stream, request);
    }
    let mut text = serde_json::to_string(request)?.into_bytes();
    text.push(b'\n');
    let mut rest = &text[..];
    let groups: Vec<_> = descriptors.chunks(passing::DESCRIPTORS_MAX).collect();
    for (number, group) in groups.iter().enumerate() {
        let is_last = number + 1 == groups.len();
        let (piece, left) = rest.split_at(if is_last { rest.len() } else { 1 });
        let group: Vec<BorrowedFd<'_>> = group.iter().map(AsFd::as_fd).collect();
        passing::send(stream, piece, &group)?;
        rest = left;
    }
    Ok(())
}

/// Asks the process that answers there, such as the one that has a live VM's disks; `None` if there is
/// no such process.
pub(crate) fn ask(path: &Path, request: &impl Asked) -> Result<Option<Value>> {
    ask_and_hear(path, request, &mut |_| {}, &mut || {})
}

/// The same, of one that answers within this time or not at all.
pub(crate) fn ask_within(
    path: &Path,
    request: &impl Asked,
    timeout: Duration,
) -> Result<Option<Value>> {
    let Some(stream) = unix_socket::connect(path)? else { return Ok(None) };
    stream.set_read_timeout(Some(timeout))?;
    value_of(exchange(&stream, request, &mut |_| {}, None)?)
}

/// The same as [`ask`]; `hear` is given what comes before the end, and `idle` is called again and again
/// while nothing comes.
pub(crate) fn ask_and_hear(
    path: &Path,
    request: &impl Asked,
    hear: Hear<'_>,
    idle: &mut dyn FnMut(),
) -> Result<Option<Value>> {
    let mut attempts = 0;
    let answer = loop {
        let Some(stream) = unix_socket::connect(path)? else { return Ok(None) };
        stream.set_read_timeout(Some(IDLE_INTERVAL))?;
        match exchange(&stream, request, hear, Some(idle)) {
            Ok(answer) => break answer,
            // The process is letting go of the disks, and has not read the request: a socket that is
            // closed with something unread is reset.
            Err(error) if is_closed(&error) && attempts < ENDING_ATTEMPTS => {
                attempts += 1;
                thread::sleep(TICK);
            }
            Err(error) => return Err(error),
        }
    };
    value_of(answer)
}

fn value_of(answer: Answer) -> Result<Option<Value>> {
    match answer {
        Answer::Done(value) | Answer::Told(value) => Ok(Some(value)),
        Answer::Failed { kind, causes } => {
            let mut causes = causes.into_iter().rev();
            let first = causes.next().unwrap_or_else(|| "it failed and did not say why".to_owned());
            let fault = anyhow::Error::from(Fault::new(Kind::from_word(&kind), first));
            Err(causes.fold(fault, |error, context| error.context(context)))
        }
    }
}

/// Says a request and waits for the answer. Where there is an `idle`, the stream's timeout is how often it
/// is called; else it is the end.
fn exchange(
    stream: &UnixStream,
    request: &impl Asked,
    hear: Hear<'_>,
    mut idle: Option<&mut dyn FnMut()>,
) -> Result<Answer> {
    say_request(stream, request)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        // A timeout in the middle of a line leaves what came of it.
        while let Err(error) =
            reader.by_ref().take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line)
        {
            match &mut idle {
                Some(idle) if error.kind() == io::ErrorKind::WouldBlock => idle(),
                _ => return Err(error.into()),
            }
        }
        if line.is_empty() {
            bail!(
                "the process that has the disk ended before it answered; what it was asked for may \
                 have been done"
            );
        }
        let answer = serde_json::from_slice(&line);
        match answer.context("the process that has the disk did not answer")? {
            Answer::Told(value) => hear(value),
            answer => return Ok(answer),
        }
    }
}

/// Whether nobody listens any more at the other end of a connection.
fn is_closed(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| {
        matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc;

    use super::*;
    use crate::live::Scope;

    /// A commit takes long and another client says nothing; status is answered meanwhile.
    #[test]
    fn nobody_waits_for_somebody_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let (go, gate) = mpsc::channel::<()>();
        let gate = Mutex::new(gate);
        let control = Control::start(
            &path,
            Arc::new(move |request: Request, _: Tell<'_>| match request {
                Request::Status => Ok(Value::from("well")),
                Request::Stop => {
                    gate.lock().unwrap().recv().unwrap();
                    Ok(Value::from("stopped"))
                }
                _ => Err(Fault::new(Kind::Conflict, "another").into()),
            }),
        )
        .unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let _silent = unix_socket::connect(&path).unwrap().unwrap();
        thread::scope(|scope| {
            let slow = scope.spawn(|| ask(&path, &Request::Stop).unwrap().unwrap());
            for _ in 0..3 {
                assert_eq!(ask(&path, &Request::Status).unwrap().unwrap(), "well");
            }
            assert!(!slow.is_finished());
            go.send(()).unwrap();
            assert_eq!(slow.join().unwrap(), "stopped");
        });
        let stream = unix_socket::connect(&path).unwrap().unwrap();
        (&stream).write_all(b"{\"dance\":null}\n").unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        assert!(line.contains("\"kind\":\"usage\""), "{line}");
        let commit = LiveCommit::new(Scope::Disks, "vm".parse().unwrap());
        let error = ask(&path, &Request::Commit(Box::new(commit))).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Conflict);
        drop(control);
        assert!(!path.exists());
        assert!(ask(&path, &Request::Status).unwrap().is_none());
    }
}
