//! A registry of images that does what it is told: answers, lies, breaks off, never ends.
//!
//! It speaks just enough of HTTP/1.1 for one request a connection. What is asked is kept, so that a
//! test can see what was told to whom.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// The longest line of a request.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// The longest body of a request.
const BODY_BYTES_MAX: usize = 64 << 10;

/// What was asked.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// `GET` and the like.
    pub method: String,

    /// The path with its query.
    pub path: String,

    /// Headers, with names in small letters.
    pub headers: HashMap<String, String>,

    /// The body.
    pub body: String,
}

impl Request {
    /// A header's value, empty if it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Where a `Range` begins.
    pub fn range_start(&self) -> usize {
        let range = self.header("range").strip_prefix("bytes=");
        let first = range.and_then(|range| range.split('-').next());
        first.and_then(|first| first.parse().ok()).unwrap_or(0)
    }
}

/// What is sent after the headers.
#[derive(Clone, Debug)]
pub enum Body {
    /// All of it.
    Whole(Vec<u8>),

    /// The length of all of it is announced, and only so many bytes come.
    Cut(Vec<u8>, usize),

    /// These bytes again and again, until the other side has had enough.
    Endless(Vec<u8>),
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,

    /// Headers beside those about the body's length.
    pub headers: Vec<(String, String)>,

    /// The body.
    pub body: Body,
}

impl Answer {
    /// An answer with a body.
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Answer {
        Answer { status, headers: Vec::new(), body: Body::Whole(body.into()) }
    }

    /// The same with one more header.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Answer {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// The part of a body that a request wants.
    pub fn part_of(bytes: &[u8], request: &Request) -> Answer {
        let from = request.range_start().min(bytes.len());
        if from == 0 {
            return Answer::new(200, bytes);
        }
        let range = format!("bytes {from}-{}/{}", bytes.len().saturating_sub(1), bytes.len());
        Answer::new(206, &bytes[from..]).with("Content-Range", range)
    }
}

/// A registry on this machine, until it is dropped.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Request>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Registry {
    /// Serves what `answer` says.
    pub fn serve(
        answer: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> io::Result<Registry> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let is_over = Arc::new(AtomicBool::new(false));
        let (answer, kept, over) = (Arc::new(answer), Arc::clone(&asked), Arc::clone(&is_over));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (answer, kept) = (Arc::clone(&answer), Arc::clone(&kept));
                thread::spawn(move || {
                    // A client that goes away is what some tests want.
                    let _ = talk(&stream, &*answer, &kept);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        Ok(Registry { address, asked, is_over, thread: Some(thread) })
    }

    /// Host and port.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// All that was asked so far.
    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts; it may have ended.
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn talk(
    stream: &TcpStream,
    answer: &dyn Fn(&Request) -> Answer,
    asked: &Mutex<Vec<Request>>,
) -> io::Result<()> {
    let mut input = BufReader::new(stream);
    let request = read_request(&mut input)?;
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
    send(stream, &answer(&request))
}

fn read_request(input: &mut impl BufRead) -> io::Result<Request> {
    let mut line = || -> io::Result<String> {
        let mut line = String::new();
        input.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    };
    let first = line()?;
    let mut words = first.split(' ').map(str::to_owned);
    let method = words.next().unwrap_or_default();
    let path = words.next().unwrap_or_default();
    let mut headers = HashMap::new();
    loop {
        let line = line()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok());
    let mut body = vec![0; length.unwrap_or(0).min(BODY_BYTES_MAX)];
    input.read_exact(&mut body)?;
    let body = String::from_utf8_lossy(&body).into_owned();
    Ok(Request { method, path, headers, body })
}

fn send(mut stream: &TcpStream, answer: &Answer) -> io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Answer\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    match &answer.body {
        Body::Whole(bytes) | Body::Cut(bytes, _) => {
            head.push_str(&format!("Content-Length: {}\r\n", bytes.len()));
        }
        // Without a length the body goes on until the connection ends.
        Body::Endless(_) => {}
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    match &answer.body {
        Body::Whole(bytes) => stream.write_all(bytes),
        Body::Cut(bytes, len) => stream.write_all(&bytes[..*len]),
        Body::Endless(bytes) => loop {
            stream.write_all(bytes)?;
        },
    }
}
