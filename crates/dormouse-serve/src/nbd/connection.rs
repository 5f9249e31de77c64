//! A connection after its handshake: reading requests, giving up the lead, sending replies.

use std::fmt;
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::Instant;

use super::bulk::Bulk;
use super::export::{Export, Exports};
use super::handshake::{Agreed, Offer, ReplyForm, negotiate};
use super::input::Input;
use super::limits::{COMPANY_REQUESTS, FIRST_BUFFER_BYTES, GATHER_BYTES, Limits, TRANSFER_BYTES};
use super::meta::Selected;
use super::protocol::command;
use super::pulse::{Pulse, Watch, lock};
use super::reply::{Answered, Replies, SHORT_REPLY_MAX};
use super::request::{Facts, Header, Refusal, Request};
use super::serve::Segment;
use super::transport::Transport;
use crate::device::{DeviceResult, Durability};
use crate::error::{Error, Result};

/// Stack of a worker; devices decompress on it.
const STACK_BYTES: usize = 1 << 20;

/// Serves one client over two halves of any stream, from the greeting to the end.
///
/// For streams that are no sockets: an inherited pair of pipes, a test. There is no limit of time,
/// and nothing can end a half that blocks.
///
/// # Errors
///
/// Where the exports' names do not do, or the client broke the protocol.
pub fn serve_stream(
    exports: Vec<Export>,
    limits: &Limits,
    reader: impl Read + Send + 'static,
    writer: impl Write + Send + 'static,
) -> Result<()> {
    let exports = Exports::new(exports, None)?;
    let offer = Offer { exports: &exports, tls: None, stopping: &AtomicBool::new(false) };
    let pulse = Pulse::new(None, None, Arc::<Watch>::default());
    let transport = Transport::new(Box::new(reader), Box::new(writer));
    serve(transport, &offer, limits, &pulse)
}

/// Serves one client; returns when all its requests are answered and nothing more will come.
pub(crate) fn serve(
    transport: Transport,
    offer: &Offer<'_>,
    limits: &Limits,
    pulse: &Pulse,
) -> Result<()> {
    match negotiate(transport, offer)? {
        Some((transport, agreed)) => transmit(transport, &agreed, offer.stopping, limits, pulse),
        None => Ok(()),
    }
}

/// Serves one client that is past its handshake.
pub(crate) fn transmit(
    transport: Transport,
    agreed: &Agreed,
    stopping: &AtomicBool,
    limits: &Limits,
    pulse: &Pulse,
) -> Result<()> {
    pulse.begin_transmission();
    let connections = &agreed.export.counters().connections;
    connections.fetch_add(1, Ordering::Relaxed);
    let result = Connection::new(transport, agreed, stopping, limits, pulse).run();
    agreed.export.counters().connections.fetch_sub(1, Ordering::Relaxed);
    result
}

/// What the workers of a connection share.
pub(crate) struct Connection<'a> {
    pub(crate) export: &'a Export,
    pub(crate) form: ReplyForm,
    pub(crate) contexts: &'a [Selected],
    pub(crate) limits: &'a Limits,
    pub(crate) pulse: &'a Pulse,
    pub(crate) bulk: Bulk,

    /// How long the device took lately for what is served inline.
    pub(crate) typical_ns: AtomicU64,

    /// Counts down the requests since one last came while another was under way; 0 says that the
    /// peer sends one at a time.
    pub(crate) company: AtomicU32,

    /// Who holds it leads. Nobody sends while leading: a peer that does not read would keep
    /// everybody from reading.
    input: Mutex<Input>,

    /// Held while replies are sent, so that they are whole.
    output: Mutex<Box<dyn Write + Send>>,

    /// For replies that must be in one piece and exceed a worker's buffer. Taken before `output`.
    large: Mutex<Vec<u8>>,
    stopping: &'a AtomicBool,
    failure: Mutex<Option<Error>>,
}

/// What a thread of a connection has for itself.
pub(crate) struct Worker {
    pub(crate) replies: Replies,
    pub(crate) payload: Vec<u8>,
    pub(crate) segments: Vec<Segment>,

    /// Requests whose last replies are among `replies`.
    pub(crate) unsent: usize,
}

/// What became of reading a request.
enum Step {
    Serve(Request),
    Answered,
    End,
}

impl Worker {
    pub(crate) fn new(form: ReplyForm) -> Worker {
        Worker { replies: Replies::new(form), payload: Vec::new(), segments: Vec::new(), unsent: 0 }
    }

    /// The payload's place; grows where it has never been as large as this.
    fn payload(&mut self, count: usize) -> &mut [u8] {
        if self.payload.len() < count {
            let first = count <= FIRST_BUFFER_BYTES;
            self.payload.resize(if first { FIRST_BUFFER_BYTES } else { TRANSFER_BYTES }, 0);
        }
        &mut self.payload[..count]
    }
}

/// The right to read from the peer.
struct Lead<'a> {
    input: MutexGuard<'a, Input>,
    pulse: &'a Pulse,
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        // Before the lock goes: whoever fails to take it afterwards finds a leader or leads.
        self.pulse.set_leading(false);
    }
}

impl<'a> Connection<'a> {
    fn new(
        transport: Transport,
        agreed: &'a Agreed,
        stopping: &'a AtomicBool,
        limits: &'a Limits,
        pulse: &'a Pulse,
    ) -> Connection<'a> {
        pulse.watch_input(transport.input.stall());
        Connection {
            export: &agreed.export,
            form: agreed.form,
            contexts: &agreed.contexts,
            limits,
            pulse,
            bulk: Bulk::new(limits.bulk_requests),
            typical_ns: AtomicU64::new(0),
            company: AtomicU32::new(0),
            input: Mutex::new(transport.input),
            output: Mutex::new(transport.output),
            large: Mutex::default(),
            stopping,
            failure: Mutex::default(),
        }
    }

    fn run(self) -> Result<()> {
        let workers = self.limits.workers.clamp(1, 64);
        let connection = &self;
        thread::scope(|scope| {
            let builder = || thread::Builder::new().stack_size(STACK_BYTES);
            let mut started = Ok(());
            if workers > 1 {
                let work = || {
                    connection.guarded(Connection::work_in_bulk);
                    connection.bulk.abandon();
                };
                started = builder().name("nbd-bulk".to_owned()).spawn_scoped(scope, work).map(drop);
            }
            let mut crew = Vec::with_capacity(workers);
            for _ in 1..workers {
                let work = || connection.guarded(Connection::work);
                let name = "nbd-worker".to_owned();
                started = started.and_then(|()| {
                    builder().name(name).spawn_scoped(scope, work).map(|thread| crew.push(thread))
                });
            }
            match started {
                Ok(()) => connection.guarded(Connection::work),
                Err(error) => {
                    connection.fail(Error::io("cannot start a worker", error));
                    connection.pulse.close();
                }
            }
            // The bulk thread ends when nobody can give it more.
            for thread in crew {
                // `guarded` catches panics; there is none to pass on.
                let _ = thread.join();
            }
            connection.bulk.close();
        });
        match self.failure.into_inner() {
            Ok(Some(failure)) => Err(failure),
            _ => Ok(()),
        }
    }

    /// Runs a thread's work so that its failure, or a device's panic, ends the whole connection.
    fn guarded(&self, work: impl Fn(&Self, &mut Worker) -> Result<()>) {
        let result = catch_unwind(AssertUnwindSafe(|| work(self, &mut Worker::new(self.form))));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.fail(error),
            Err(_) => {
                self.fail(Error::protocol("a worker panicked"));
                self.pulse.hang_up();
            }
        }
        self.pulse.close();
    }

    fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
    }

    fn work(&self, worker: &mut Worker) -> Result<()> {
        loop {
            let Some(mut lead) = self.try_lead() else {
                self.send(worker)?;
                if !self.pulse.stand_by() {
                    return Ok(());
                }
                continue;
            };
            let filled = worker.replies.filled();
            if filled > 0 && (filled >= GATHER_BYTES || !self.has_next(&lead.input)) {
                drop(lead);
                self.send(worker)?;
                continue;
            }
            let step = self.receive(&mut lead.input, worker);
            if !matches!(step, Ok(Step::Serve(_) | Step::Answered)) {
                self.pulse.close();
            }
            drop(lead);
            match step {
                Ok(Step::Serve(request)) => self.serve(&request, worker)?,
                Ok(Step::Answered) => {}
                Ok(Step::End) => return self.send(worker),
                Err(error) => {
                    self.send(worker)?;
                    return Err(error);
                }
            }
        }
    }

    fn try_lead(&self) -> Option<Lead<'_>> {
        let input = match self.input.try_lock() {
            Ok(input) => input,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        self.pulse.set_leading(true);
        let lead = Lead { input, pulse: self.pulse };
        (!self.pulse.is_closing()).then_some(lead)
    }

    /// Whether a whole request, payload included, can be taken without waiting for the peer.
    fn has_next(&self, input: &Input) -> bool {
        let Some((header, rest)) = input.buffered().split_at_checked(self.form.request_bytes())
        else {
            return false;
        };
        let payload = Header::parse(header, self.form)
            .and_then(|header| header.payload_bytes(self.form))
            // What cannot be parsed fails without waiting.
            .unwrap_or(0);
        payload <= rest.len() as u64
    }

    fn receive(&self, input: &mut Input, worker: &mut Worker) -> Result<Step> {
        let receiving = |error| Error::io("cannot read a request", error);
        let Some(header) = input.take(self.form.request_bytes()).map_err(receiving)? else {
            return Ok(Step::End);
        };
        let header = Header::parse(header, self.form)?;
        if header.command == command::DISC {
            return Ok(Step::End);
        }
        let payload_bytes = header.payload_bytes(self.form)?;
        self.pulse.request_read();
        let device = self.export.device();
        let facts = Facts {
            form: self.form,
            size_bytes: device.size_bytes(),
            read_only: device.is_read_only(),
            has_contexts: !self.contexts.is_empty(),
            stopping: self.stopping.load(Ordering::Relaxed),
        };
        let (mut unread, arrived) = (payload_bytes, input.arrived());
        let checked = match header.command {
            // One that is longer names a context twice and is refused as any payload would be.
            command::BLOCK_STATUS if (1..=self.narrowing_bytes_max()).contains(&payload_bytes) => {
                // A few contexts.
                let payload = worker.payload(usize::try_from(payload_bytes).unwrap_or(0));
                input.read_exact(payload).map_err(receiving)?;
                unread = 0;
                header.narrowed(payload, self.contexts).and_then(|(header, contexts)| {
                    Ok(header.check(&facts, arrived)?.about(contexts))
                })
            }
            _ => header.check(&facts, arrived),
        };
        match checked {
            Ok(request) => {
                if unread > TRANSFER_BYTES as u64 {
                    return self.stream_write(&request, input, worker);
                }
                // At most TRANSFER_BYTES, which is a usize.
                let payload = worker.payload(usize::try_from(unread).unwrap_or(0));
                input.read_exact(payload).map_err(receiving)?;
                self.see_company(self.has_next(input) || self.pulse.in_flight() > 1);
                Ok(Step::Serve(request))
            }
            Err(refusal) => {
                input.discard(unread).map_err(receiving)?;
                self.export.counters().refused.fetch_add(1, Ordering::Relaxed);
                let to = Answered { cookie: header.cookie, offset: header.offset };
                self.make_room(SHORT_REPLY_MAX, worker)?;
                worker.replies.error(to, refusal, None);
                worker.unsent += 1;
                Ok(Step::Answered)
            }
        }
    }

    /// Bytes of a BLOCK_STATUS's payload that names each selected context.
    fn narrowing_bytes_max(&self) -> u64 {
        8 + 4 * self.contexts.len() as u64
    }

    /// Remembers whether a request came while another was under way.
    pub(crate) fn see_company(&self, seen: bool) {
        let before = self.company.load(Ordering::Relaxed);
        // Concurrent workers may overwrite each other's count; it is an estimate.
        match (seen, before) {
            (true, COMPANY_REQUESTS) | (false, 0) => {}
            (true, _) => self.company.store(COMPANY_REQUESTS, Ordering::Relaxed),
            (false, _) => self.company.store(before - 1, Ordering::Relaxed),
        }
    }

    /// Writes a payload that exceeds a worker's buffer while it comes in.
    fn stream_write(
        &self,
        request: &Request,
        input: &mut Input,
        worker: &mut Worker,
    ) -> Result<Step> {
        let device = self.export.device();
        let begun = Instant::now();
        let mut result: DeviceResult<()> = Ok(());
        let mut at = request.offset;
        while at < request.range().end {
            let length = (request.range().end - at).min(TRANSFER_BYTES as u64);
            // At most TRANSFER_BYTES, which is a usize.
            let piece = worker.payload(usize::try_from(length).unwrap_or(0));
            input.read_exact(piece).map_err(|error| Error::io("cannot read a payload", error))?;
            if result.is_ok() {
                result = device.write_at(piece, at, Durability::Later);
            }
            at += length;
        }
        if result.is_ok() && request.durability == Durability::Now {
            result = device.flush();
        }
        self.finish(request, result, begun, worker)?;
        Ok(Step::Answered)
    }

    /// Makes sure that so many bytes of replies fit.
    pub(crate) fn make_room(&self, count: usize, worker: &mut Worker) -> Result<()> {
        if !worker.replies.has_room(count) {
            self.send(worker)?;
            worker.replies.reserve(count);
        }
        Ok(())
    }

    /// Sends what a worker has gathered.
    pub(crate) fn send(&self, worker: &mut Worker) -> Result<()> {
        self.send_with(worker, &[])
    }

    /// Sends what a worker has gathered, and `data` after it.
    fn send_with(&self, worker: &mut Worker, data: &[u8]) -> Result<()> {
        if worker.replies.filled() == 0 {
            return Ok(());
        }
        let mut output = lock(&self.output);
        let stall = self.pulse.sending();
        stall.begin();
        let sent = output.write_all(worker.replies.bytes()).and_then(|()| output.write_all(data));
        stall.end();
        drop(output);
        worker.replies.clear();
        self.pulse.requests_answered(std::mem::take(&mut worker.unsent));
        sent.map_err(|error| {
            // A leader may be waiting for a peer that is not there any more.
            self.pulse.close();
            self.pulse.hang_up();
            Error::io("cannot send a reply", error)
        })
    }

    /// Reads a range in one piece, however large, and sends it as the reply.
    pub(crate) fn send_large(&self, request: &Request, worker: &mut Worker) -> Result<()> {
        let begun = Instant::now();
        let mut large = lock(&self.large);
        // PAYLOAD_BYTES_MAX at most. The first such request of a connection allocates.
        let length = usize::try_from(request.length).unwrap_or(0);
        if large.len() < length {
            large.resize(length, 0);
        }
        let result = self.export.device().read_at(&mut large[..length], request.offset);
        if result.is_err() {
            return self.finish(request, result, begun, worker);
        }
        self.count(request, false, begun);
        self.send(worker)?;
        worker.replies.reserve(SHORT_REPLY_MAX);
        worker.replies.data_header(request.into(), request.offset, length, true);
        worker.unsent += 1;
        self.send_with(worker, &large[..length])
    }

    /// Counts a request and answers it with success or the device's error.
    pub(crate) fn finish(
        &self,
        request: &Request,
        result: DeviceResult<()>,
        begun: Instant,
        worker: &mut Worker,
    ) -> Result<()> {
        self.count(request, result.is_err(), begun);
        self.make_room(SHORT_REPLY_MAX, worker)?;
        match result {
            Ok(()) => worker.replies.done(request.into()),
            Err(error) => {
                let refusal = self.refusal_of(request, error);
                worker.replies.error(request.into(), refusal, None);
            }
        }
        worker.unsent += 1;
        Ok(())
    }

    /// Logs a device's error; the client gets its number.
    pub(crate) fn refusal_of(&self, request: &Request, error: super::DeviceError) -> Refusal {
        let kind = error.kind();
        if kind != super::DeviceErrorKind::NotSupported {
            tracing::warn!(
                export = self.export.name(),
                request = ?request.kind,
                offset = request.offset,
                length = request.length,
                error = &error as &dyn std::error::Error,
                "a request failed"
            );
        }
        kind.into()
    }

    pub(crate) fn count(&self, request: &Request, failed: bool, begun: Instant) {
        let waiting = begun.saturating_duration_since(request.arrived);
        let serving = begun.elapsed();
        self.export.counters().count(request.kind, request.length, failed, waiting, serving);
    }
}

impl fmt::Debug for Connection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("export", &self.export)
            .field("form", &self.form)
            .finish_non_exhaustive()
    }
}
