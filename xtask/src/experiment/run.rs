//! One guest's life on a live disk of a new store, paused and committed after each phase.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use dormouse_testkit::guest::{Assets, Config, Disk, Guest};
use serde_json::Value;

use super::image::Image;
use super::layout::{Layout, Part};
use super::plan::{Cell, Mount, Pace, Phase};
use super::results::{Base, Measure, Run};
use crate::command::output_of;

const BLOCK_BYTES: u64 = 4096;
const BASE: &str = "base";
const LIVE: &str = "box";
const SNAPSHOT: &str = "vm";
const SOCKET: &str = "nbd";

/// What all runs share.
#[derive(Debug)]
pub(super) struct Runner<'a> {
    pub(super) dormouse: PathBuf,
    pub(super) assets: &'a Assets,
    /// When the guests' clocks start.
    pub(super) clock: String,
    pub(super) pace: Pace,
}

impl Runner<'_> {
    /// Commits an image to a store of its own.
    pub(super) fn base(&self, image: &Image, dir: &Path) -> Result<Base> {
        let store = Store::new(&self.dormouse, dir)?;
        let committed = store.commit_base(image)?;
        Ok(Base {
            lazy_groups: image.layout.lazy_groups,
            nonzero_bytes: integer(&committed["figures"], "nonzero_bytes")?,
            stored_bytes: integer(&committed["figures"], "stored_bytes")?,
        })
    }

    /// Runs one cell; `progress` gets a line for each phase.
    pub(super) fn run(
        &self,
        cell: Cell,
        image: &Image,
        dir: &Path,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Run> {
        let store = Store::new(&self.dormouse, dir)?;
        store.commit_base(image)?;
        store.json(&["disk", "create", LIVE, "--from", &format!("{BASE}:root")])?;
        let server = Server::start(&store)?;
        let config = Config {
            disk: Disk::Nbd { socket: dir.join(SOCKET), export: LIVE.to_owned() },
            root_options: cell.mount.options().to_owned(),
            clock: self.clock.clone(),
            ..Config::in_dir(dir)
        };
        let mut guest = Guest::boot(self.assets, &config)?;
        let mounted = guest.check("awk '$2 == \"/\" { print $4 }' /proc/mounts")?.trim().to_owned();
        let is_mounted = |option: &str| mounted.split(',').any(|there| there == option);
        ensure!(
            cell.mount == Mount::Default || cell.mount.options().split(',').all(is_mounted),
            "the guest's root is mounted with {mounted}"
        );
        let mut measures = Vec::new();
        for phase in Phase::ALL {
            if let Some(command) = phase.command(self.pace) {
                guest.check(&command)?;
            }
            std::thread::sleep(phase.rest(self.pace));
            guest.qmp().execute("stop", Value::Null)?;
            let measure = store.pause(phase, measures.len() as u64 + 1, &image.layout)?;
            guest.resume()?;
            progress(&measure.line());
            measures.push(measure);
        }
        let kernel = guest.check("uname -r")?.trim().to_owned();
        guest.kill()?;
        drop(server);
        Ok(Run { cell, mounted, kernel, measures })
    }
}

/// A store, and the command that works on it.
#[derive(Debug)]
struct Store<'a> {
    dormouse: &'a Path,
    dir: PathBuf,
    socket: PathBuf,
}

impl<'a> Store<'a> {
    /// A new one in `dir`, which is emptied.
    fn new(dormouse: &'a Path, dir: &Path) -> Result<Store<'a>> {
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
        fs::create_dir_all(dir)?;
        let store = Store { dormouse, dir: dir.join("store"), socket: dir.join(SOCKET) };
        store.json(&["init"])?;
        Ok(store)
    }

    fn commit_base(&self, image: &Image) -> Result<Value> {
        let path = image.path.to_str().context("a path that is not UTF-8")?;
        self.json(&["commit", BASE, "--disk", path])
    }

    /// Commits what the paused guest wrote, and looks at what that was.
    fn pause(&self, phase: Phase, number: u64, layout: &Layout) -> Result<Measure> {
        let status = self.json(&["disk", "status", LIVE])?;
        let disk = &status["disks"][0];
        let committed = self.json(&["disk", "commit", LIVE, SNAPSHOT])?;
        let snapshot = format!("{SNAPSHOT}@{number}");
        ensure!(committed["snapshot"] == *snapshot, "expected {snapshot}: {committed}");
        let before = match number {
            1 => format!("{BASE}@1"),
            _ => format!("{SNAPSHOT}@{}", number - 1),
        };
        let diff = self.json(&["diff", &before, &snapshot])?;
        let diff = &diff["images"][0];
        let mut changed = [0; Part::ALL.len()];
        for region in diff["regions"].as_array().context("a diff without regions")? {
            let [offset, length] = [0, 1].map(|index| region[index].as_u64());
            let (offset, length) = offset.zip(length).context("a region without numbers")?;
            let counts = layout.count(offset / BLOCK_BYTES..(offset + length) / BLOCK_BYTES);
            (0..changed.len()).for_each(|part| changed[part] += counts[part]);
        }
        let figures = &committed["figures"];
        Ok(Measure {
            phase,
            dirty_blocks: integer(disk, "dirty_bytes")? / BLOCK_BYTES,
            zero_blocks: integer(disk, "zero_bytes")? / BLOCK_BYTES,
            changed_blocks: changed,
            freed_blocks: integer(diff, "now_zero_bytes")? / BLOCK_BYTES,
            new_blocks: integer(figures, "new_bytes")? / BLOCK_BYTES,
            stored_bytes: integer(figures, "stored_bytes")?,
            written_bytes: integer(&committed, "written_bytes")?,
        })
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = output_of(self.command().arg("--json").args(arguments))?;
        serde_json::from_str(&text).with_context(|| format!("dormouse printed no JSON: {text}"))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.dormouse);
        command.arg("--store").arg(&self.dir);
        command
    }
}

fn integer(object: &Value, name: &str) -> Result<u64> {
    object[name].as_u64().with_context(|| format!("no {name} in {object}"))
}

/// `dormouse serve nbd`; ends when it is dropped.
#[derive(Debug)]
struct Server(Child);

impl Server {
    fn start(store: &Store<'_>) -> Result<Server> {
        let child = store
            .command()
            .args(["--quiet", "serve", "nbd", LIVE, "--socket"])
            .arg(&store.socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start dormouse")?;
        let mut server = Server(child);
        let stdout = server.0.stdout.take().context("stdout was piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line.starts_with("nbd+unix://"), "the server did not start: {line:?}");
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, and nobody is left to tell.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
