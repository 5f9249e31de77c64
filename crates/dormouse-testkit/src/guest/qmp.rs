//! A client for QEMU's machine protocol: JSON lines over a unix socket.
//!
//! Source: `docs/interop/qmp-spec.rst` in QEMU.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// No command we send takes longer; migrations are polled.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// A migration without the shared RAM takes 30 ms, one with private RAM some seconds.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(120);
const MIGRATION_POLL: Duration = Duration::from_millis(2);

/// A connection to one QEMU, past the capabilities handshake.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Greets the QEMU at the other end of a socket connected to its `-qmp unix:PATH,server=on`.
    pub fn new(stream: UnixStream) -> Result<Qmp> {
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let mut qmp = Qmp { reader: BufReader::new(stream) };
        let greeting = qmp.read_line()?;
        if greeting.get("QMP").is_none() {
            bail!("expected QEMU's greeting, got {greeting}");
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs one command and returns its `return` value; events that arrive meanwhile are dropped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        self.reader
            .get_mut()
            .write_all(&line)
            .with_context(|| format!("cannot send {command} to QEMU"))?;
        loop {
            let mut answer = self.read_line().with_context(|| format!("no answer to {command}"))?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command}: {}", error["desc"]);
            }
        }
    }

    /// Waits until the migration under way, in or out, is complete.
    pub fn wait_for_migration(&mut self) -> Result<()> {
        let deadline = Instant::now() + MIGRATION_TIMEOUT;
        loop {
            let answer = self.execute("query-migrate", Value::Null)?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("the migration failed: {answer}"),
                _ if Instant::now() > deadline => bail!("the migration hangs: {answer}"),
                _ => std::thread::sleep(MIGRATION_POLL),
            }
        }
    }

    fn read_line(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => bail!("QEMU closed the QMP socket"),
            Ok(_) => {
                serde_json::from_str(&line).with_context(|| format!("QEMU sent no JSON: {line:?}"))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("QEMU said nothing for {} s", ANSWER_TIMEOUT.as_secs())
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `Qmp` whose QEMU has already said `lines`, and the other end, to see what was asked.
    fn scripted(lines: &str) -> (Qmp, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(lines.as_bytes()).unwrap();
        let reader = BufReader::new(ours);
        (Qmp { reader }, theirs)
    }

    #[test]
    fn events_before_an_answer_are_dropped() {
        let (mut qmp, theirs) =
            scripted("{\"event\":\"STOP\"}\n{\"return\":{\"status\":\"paused\"}}\n");
        let answer = qmp.execute("query-status", Value::Null).unwrap();
        assert_eq!(answer["status"], "paused");
        let mut asked = String::new();
        BufReader::new(theirs).read_line(&mut asked).unwrap();
        assert_eq!(asked, "{\"execute\":\"query-status\"}\n");
    }

    #[test]
    fn a_refusal_is_an_error_with_qemus_words() {
        let (mut qmp, _theirs) = scripted("{\"error\":{\"class\":\"X\",\"desc\":\"no such\"}}\n");
        let error = qmp.execute("frobnicate", Value::Null).unwrap_err();
        assert!(error.to_string().contains("no such"), "{error}");
    }

    #[test]
    fn a_closed_socket_is_an_error() {
        let (mut qmp, theirs) = scripted("");
        drop(theirs);
        assert!(qmp.execute("stop", Value::Null).is_err());
    }
}
