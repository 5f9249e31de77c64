//! An orchestrator in a page: wakes a pool of VMs from one snapshot, and puts one back to sleep.
//!
//! ```text
//! cargo run --example orchestrator -- SOCKET SNAPSHOT NAME...
//! ```
//!
//! Plain HTTP over the daemon's unix socket; every answer is waited for.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The daemon.
struct Daemon {
    socket: String,
}

impl Daemon {
    /// What an answer has, or an error with what the daemon says of it.
    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
        let body = body.map_or_else(String::new, |body| body.to_string());
        let mut stream = UnixStream::connect(&self.socket).context("no daemon listens there")?;
        // With HTTP/1.0 the answer's body ends with the connection.
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nhost: dormouse\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer without an end")?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
        let value: Value = serde_json::from_str(body)?;
        match status.context("an answer without a status")? {
            200..400 => Ok(value),
            _ => bail!("{method} {path}: {}", value["error"]["message"]),
        }
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().context("give the daemon's socket")?;
    let snapshot = args.next().context("give a snapshot")?;
    let names: Vec<String> = args.collect();
    let first = names.first().context("give names for the VMs")?;
    let daemon = Daemon { socket };

    let path = format!("/v1/snapshots/{snapshot}/fork?wait=durable");
    let forked = daemon.ask("POST", &path, Some(json!({ "names": names })))?;
    for vm in forked["forks"].as_array().into_iter().flatten() {
        println!("{}: awake after {} s, pid {}", vm["name"], vm["seconds"]["total"], vm["pid"]);
    }

    // The first sleeps as a snapshot of its own name, and goes on.
    let sleep = json!({ "as": first, "keep_running": true });
    let slept = daemon.ask("POST", &format!("/v1/vms/{first}/sleep?wait=durable"), Some(sleep))?;
    println!("{first}: {} after {} s of freeze", slept["snapshot"], slept["frozen_seconds"]);

    for name in &names {
        daemon.ask("DELETE", &format!("/v1/vms/{name}?wait=durable"), None)?;
    }
    let left = daemon.ask("GET", "/v1/vms", None)?;
    println!("left: {}", left["vms"].as_array().map_or(0, Vec::len));
    Ok(())
}
