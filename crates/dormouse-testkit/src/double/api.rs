//! A server of HTTP/1.1 over a unix socket as `micro_http`'s: several requests on a connection, a
//! thread each, and one call after the other.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::behaviour::{Action, Behaviour, Rule, cut, hang};

/// Bytes of a head and of a body: Firecracker's are 51,200.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// A call.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
}

/// Its answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Option<String>,
    /// The process ends when it was sent.
    pub(super) ends: bool,
}

impl Reply {
    pub(super) fn empty(status: u16) -> Reply {
        Reply { status, body: None, ends: false }
    }

    pub(super) fn json(value: &serde_json::Value) -> Reply {
        Reply { status: 200, body: Some(value.to_string()), ends: false }
    }
}

/// Who answers.
pub(super) trait Api: Send {
    fn call(&mut self, call: &Call) -> Reply;
    /// The folder that the last state went to.
    fn state_folder(&self) -> Option<PathBuf>;
}

/// Listens and answers for ever.
pub(super) fn serve(socket: &Path, api: impl Api + 'static) -> Result<()> {
    let listener = UnixListener::bind(socket)
        .with_context(|| format!("cannot listen at {}", socket.display()))?;
    let rules = match std::env::var("DORMOUSE_DOUBLE_BEHAVIOUR") {
        Ok(text) => serde_json::from_str(&text).context("not a list of rules")?,
        Err(_) => Vec::new(),
    };
    let behaviour = Arc::new(Mutex::new(Behaviour::new(rules)));
    let api = Arc::new(Mutex::new(api));
    for stream in listener.incoming() {
        let stream = stream?;
        let (behaviour, api) = (Arc::clone(&behaviour), Arc::clone(&api));
        std::thread::Builder::new().name("api".to_owned()).spawn(move || {
            // Who closed its connection is done with us.
            drop(connection(stream, &behaviour, &*api));
        })?;
    }
    Ok(())
}

fn connection<A: Api>(
    mut stream: UnixStream,
    behaviour: &Mutex<Behaviour>,
    api: &Mutex<A>,
) -> Result<()> {
    let mut pending = Vec::new();
    while let Some(call) = next_call(&mut stream, &mut pending)? {
        let name = format!("{} {}", call.method, call.path);
        if name == "PUT /double/behaviour" {
            let rules: Vec<Rule> = serde_json::from_slice(&call.body)?;
            *behaviour.lock().unwrap_or_else(PoisonError::into_inner) = Behaviour::new(rules);
            send(&mut stream, &Reply::empty(204))?;
            continue;
        }
        let action = behaviour.lock().unwrap_or_else(PoisonError::into_inner).of(&name);
        match &action {
            Some(Action::Hang) => hang(),
            Some(Action::Die) => std::process::exit(1),
            Some(Action::Close) => return Ok(()),
            Some(Action::Slow(ms)) => std::thread::sleep(Duration::from_millis(*ms)),
            Some(Action::Refuse(status, body)) => {
                let reply = Reply { status: *status, body: Some(body.clone()), ends: false };
                send(&mut stream, &reply)?;
                continue;
            }
            Some(Action::Garbage) => {
                stream.write_all(b"\x00\x01 this is no HTTP\r\n\r\n")?;
                return Ok(());
            }
            _ => {}
        }
        let mut api = api.lock().unwrap_or_else(PoisonError::into_inner);
        let reply = api.call(&call);
        let folder = api.state_folder();
        drop(api);
        match &action {
            Some(Action::HangAfter) => hang(),
            Some(Action::DieAfter) => std::process::exit(1),
            Some(Action::CutFile(name)) => {
                cut(&folder.context("nothing was saved")?.join(name))?;
            }
            Some(Action::CutAnswer) => {
                let body = reply.body.as_deref().unwrap_or("{}");
                let text = format!(
                    "HTTP/1.1 {} X\r\nContent-Length: {}\r\n\r\n{}",
                    if reply.status == 204 { 200 } else { reply.status },
                    body.len(),
                    &body[..body.len() / 2]
                );
                stream.write_all(text.as_bytes())?;
                return Ok(());
            }
            Some(Action::Chunked) => {
                let body = reply.body.unwrap_or_default();
                let mut text =
                    format!("HTTP/1.1 {} X\r\nTransfer-Encoding: chunked\r\n\r\n", reply.status);
                for piece in body.as_bytes().chunks(7) {
                    text += &format!("{:x}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece));
                }
                text += "0\r\n\r\n";
                stream.write_all(text.as_bytes())?;
                continue;
            }
            _ => {}
        }
        send(&mut stream, &reply)?;
        if reply.ends {
            std::process::exit(i32::from(reply.status >= 300));
        }
    }
    Ok(())
}

fn send(stream: &mut UnixStream, reply: &Reply) -> Result<()> {
    let reason = match reply.status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        _ => "Internal Server Error",
    };
    let mut text = format!(
        "HTTP/1.1 {} {reason} \r\nServer: double\r\nConnection: keep-alive\r\n",
        reply.status
    );
    if reply.status != 204 {
        let body = reply.body.as_deref().unwrap_or_default();
        text += &format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
    } else {
        text += "\r\n";
    }
    stream.write_all(text.as_bytes())?;
    Ok(())
}

fn next_call(stream: &mut UnixStream, pending: &mut Vec<u8>) -> Result<Option<Call>> {
    loop {
        if let Some(call) = parse(pending)? {
            return Ok(Some(call));
        }
        ensure!(pending.len() <= REQUEST_BYTES_MAX, "a request of too many bytes");
        let mut piece = [0; 16 << 10];
        match stream.read(&mut piece)? {
            0 => return Ok(None),
            count => pending.extend_from_slice(&piece[..count]),
        }
    }
}

/// Takes a whole request out of what has come.
fn parse(pending: &mut Vec<u8>) -> Result<Option<Call>> {
    let Some(end) = pending.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = String::from_utf8(pending[..end].to_vec())?;
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (method, path) = (words.next().context("no method")?, words.next().context("no path")?);
    let mut length = 0;
    for line in lines {
        let (name, value) = line.split_once(':').context("not a header")?;
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse()?;
        }
    }
    ensure!(length <= REQUEST_BYTES_MAX, "a body of {length} bytes");
    let all = end + 4 + length;
    if pending.len() < all {
        return Ok(None);
    }
    let call = Call {
        method: method.to_owned(),
        path: path.to_owned(),
        body: pending[end + 4..all].to_vec(),
    };
    pending.drain(..all);
    Ok(Some(call))
}
