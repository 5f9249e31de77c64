//! A client for HTTP/1.1 over a VMM's unix socket.
//!
//! A connection for each call: what a VMM that hangs still owes is then never taken for the answer
//! to something else. Heads and bodies have bounds, each call a deadline.

pub mod response;

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::deadline::Deadline;
use crate::error::{Answer, Error, ErrorKind, Result};
use crate::socket;
use response::{Decoder, Response};

/// Bytes taken from the socket at once.
const PIECE_BYTES: usize = 16 << 10;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Put,
    Patch,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
        })
    }
}

/// A VMM's API.
#[derive(Debug)]
pub(crate) struct Http {
    socket: PathBuf,
    /// One that is connected already, for the first call.
    first: Option<UnixStream>,
}

impl Http {
    pub(crate) fn new(socket: &Path, first: UnixStream) -> Http {
        Http { socket: socket.to_owned(), first: Some(first) }
    }

    /// A call whose answer is of the kind 2xx; else `Refused`, with status and words.
    pub(crate) fn call(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        deadline: Deadline,
    ) -> Result<Response> {
        let call = format!("{method} {path}");
        let stream = match self.first.take() {
            Some(stream) => stream,
            None => socket::connect(&self.socket, deadline).map_err(gone_if_missing)?,
        };
        let response = exchange(stream, method, path, body, &call, deadline)?;
        if (200..300).contains(&response.status) {
            return Ok(response);
        }
        let text = words(&response.body);
        Err(Error::refused(Answer::new(call, Some(response.status), &text)))
    }

    /// A call whose answer is a JSON value.
    pub(crate) fn json(&mut self, method: Method, path: &str, deadline: Deadline) -> Result<Value> {
        let response = self.call(method, path, None, deadline)?;
        serde_json::from_slice(&response.body).map_err(|error| {
            let text = String::from_utf8_lossy(&response.body);
            let answer = Answer::new(format!("{method} {path}"), Some(response.status), &text);
            let context = format!("the answer to {} is no JSON: {:?}", answer.call, answer.body);
            Error::with_source(ErrorKind::Protocol, context, error).with_answer(answer)
        })
    }
}

/// A socket that was there and is not any more was the VMM's.
fn gone_if_missing(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound => error.into_kind(ErrorKind::Gone),
        _ => error,
    }
}

fn exchange(
    mut stream: UnixStream,
    method: Method,
    path: &str,
    body: Option<&Value>,
    call: &str,
    deadline: Deadline,
) -> Result<Response> {
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    match body {
        Some(body) => {
            let body = body.to_string();
            request += &format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
        }
        None => request += "\r\n",
    }
    let failed = |error| Error::io(format!("cannot send {call}"), error);
    stream.set_write_timeout(Some(deadline.left(call)?)).map_err(failed)?;
    let sent = stream.write_all(request.as_bytes());
    // Who is gone may have said why; that is heard first.
    if let Err(error) = sent
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        return Err(failed(error));
    }
    let mut decoder = Decoder::new();
    let mut piece = [0; PIECE_BYTES];
    loop {
        let left = deadline.left(call)?;
        let read = stream.set_read_timeout(Some(left)).and_then(|()| stream.read(&mut piece));
        match read {
            Ok(0) => {
                return decoder.end().and_then(|response| {
                    response.ok_or_else(|| {
                        let context = format!("the VMM is gone without an answer to {call}");
                        Error::new(ErrorKind::Gone, context)
                    })
                });
            }
            Ok(count) => {
                if let Some(response) = decoder.push(&piece[..count])? {
                    return Ok(response);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(deadline.passed(call));
            }
            Err(error) => {
                return Err(Error::io(format!("waiting for the answer to {call}"), error));
            }
        }
    }
}

/// What an error's body says: Firecracker's `fault_message`, Cloud Hypervisor's chain of causes, or
/// the text itself.
fn words(body: &[u8]) -> String {
    let text = || String::from_utf8_lossy(body).into_owned();
    match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(fields)) => match fields.get("fault_message") {
            Some(Value::String(message)) => message.clone(),
            _ => text(),
        },
        Ok(Value::Array(chain)) if chain.iter().all(Value::is_string) => {
            let chain: Vec<&str> = chain.iter().filter_map(Value::as_str).collect();
            chain.join(": ")
        }
        _ => text(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_each_vmm_are_found() {
        for (body, expected) in [
            (r#"{"fault_message":"no"}"#, "no"),
            (r#"{"error":"no"}"#, r#"{"error":"no"}"#),
            (
                r#"["Error from API","The VM is not created"]"#,
                "Error from API: The VM is not created",
            ),
            ("[1]", "[1]"),
            ("plain", "plain"),
            ("", ""),
        ] {
            assert_eq!(words(body.as_bytes()), expected);
        }
    }
}
