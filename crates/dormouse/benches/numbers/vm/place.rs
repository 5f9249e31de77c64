//! A store with a daemon, and plain HTTP to it and to doubles.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dormouse_store::store::{Config, Store};
use dormouse_testkit::double::{Program, ask};
use serde_json::{Value as Json, json};

use crate::scratch::Scratch;

/// How long a daemon may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A store with a daemon; its VMs and its data plane end with it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) dir: PathBuf,
    daemon: Child,
}

impl Place {
    /// An empty one.
    pub(super) fn new(scratch: &Scratch, name: &str) -> Result<Place> {
        drop(scratch.store(name)?);
        let dir = scratch.path(name).canonicalize()?;
        let daemon = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .arg("--store")
            .arg(&dir)
            .args(["-q", "daemon"])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start a daemon")?;
        let mut place = Place { dir, daemon };
        let begun = Instant::now();
        while !place.dir.join("live/.daemon/address").exists() {
            if let Some(status) = place.daemon.try_wait()? {
                bail!("the daemon ended with {status}");
            }
            ensure!(begun.elapsed() < START_TIMEOUT, "the daemon does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(place)
    }

    /// The store, beside the daemon.
    pub(super) fn store(&self) -> Result<Store> {
        Ok(Store::open(&self.dir, Config::STANDARD)?)
    }

    pub(super) fn folder(&self, live: &str) -> PathBuf {
        self.dir.join("live").join(live)
    }

    /// Asks the daemon for work and waits for its end; how long that took, and the answer.
    pub(super) fn timed(&self, method: &str, path: &str, body: &Json) -> Result<(f64, Json)> {
        let path = format!("{path}?wait=durable");
        let begun = Instant::now();
        let text = exchange(&self.dir.join("live/.daemon/api"), method, &path, &body.to_string())?;
        let took = begun.elapsed().as_secs_f64();
        Ok((took, serde_json::from_str(&text).with_context(|| format!("{path}: {text:?}"))?))
    }

    pub(super) fn post(&self, path: &str, body: &Json) -> Result<Json> {
        Ok(self.timed("POST", path, body)?.1)
    }

    pub(super) fn kill(&self, live: &str) -> Result<()> {
        self.timed("DELETE", &format!("/v1/vms/{live}"), &json!({})).map(drop)
    }

    /// What the daemon tells of itself.
    pub(super) fn metric(&self, name: &str) -> Result<f64> {
        let text = exchange(&self.dir.join("live/.daemon/api"), "GET", "/metrics", "")?;
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        let value = line.and_then(|line| line.split(' ').nth(1)).context("no such metric")?;
        Ok(value.parse()?)
    }

    /// Asks a double.
    pub(super) fn double(
        &self,
        live: &str,
        method: &str,
        what: &str,
        body: &str,
    ) -> Result<String> {
        let api = self.folder(live).join("vmm/api");
        body_of(&ask(&api, method, &format!("/double/{what}"), body)?)
    }

    /// What a double of Firecracker with so much memory is.
    pub(super) fn double_guest(&self, memory_mib: u64) -> Result<Json> {
        let program = Program::firecracker("1.13.1").install(&self.dir)?;
        Ok(json!({
            "launch": {
                "vmm": "firecracker",
                "program": program,
                "config": {
                    "machine-config": { "vcpu_count": 1, "mem_size_mib": memory_mib },
                    "boot-source": { "kernel_image_path": "/vmlinux" },
                    "drives": [{
                        "drive_id": "root", "path_on_host": "{disk:root}", "is_root_device": true,
                        "is_read_only": false, "io_engine": "Async",
                    }],
                },
            },
            "disks": [{ "id": "root", "size": 64 << 20 }],
        }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What cannot be ended is told by whoever cannot remove the folder.
        let names = fs::read_dir(self.dir.join("live")).into_iter().flatten().flatten();
        for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
            if !name.starts_with('.') {
                let _ = self.kill(&name);
            }
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let mount = self.dir.join("live/.plane/files");
        let _ = Command::new("umount").arg(mount).stderr(Stdio::null()).status();
    }
}

/// A request and the body of its answer, which must be no failure.
fn exchange(socket: &Path, method: &str, path: &str, body: &str) -> Result<String> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("no {}", socket.display()))?;
    let len = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {len}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    body_of(&answer).with_context(|| format!("{method} {path}"))
}

fn body_of(answer: &str) -> Result<String> {
    ensure!(answer.starts_with("HTTP/1.1 20"), "{answer:?}");
    let (head, body) = answer.split_once("\r\n\r\n").context("no body")?;
    ensure!(!head.contains("chunked"), "an answer in chunks");
    Ok(body.to_owned())
}
