//! Asking what a double, or any server of HTTP on a unix socket, answers with one short answer.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Makes a request, and returns the whole answer, its head included. A process that ends meanwhile may
/// not have read it.
pub fn ask(api: &Path, method: &str, path: &str, body: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(api)?;
    let len = body.len();
    let request = format!("{method} {path} HTTP/1.1\r\nContent-Length: {len}\r\n\r\n{body}");
    stream.write_all(request.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
