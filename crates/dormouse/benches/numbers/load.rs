//! Load on a server: fio with its engine for NBD, a job for each connection.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value as Json;

use crate::peers::Server;
use crate::report::Value;

/// Requests of random patterns, whose figure is requests a second.
pub(crate) const SMALL_BYTES: u64 = 4 << 10;

/// Requests of sequential patterns, whose figure is bytes a second.
pub(crate) const LARGE_BYTES: u64 = 256 << 10;

/// Writes between two flushes of the mixed pattern.
const WRITES_TO_FLUSH: u32 = 32;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    RandomRead,
    RandomWrite,

    /// Seven reads in ten, and a flush after every 32 writes.
    RandomMixed,
    SequentialRead,
    SequentialWrite,
}

impl Pattern {
    pub(crate) const ALL: [Pattern; 5] = [
        Pattern::RandomRead,
        Pattern::RandomWrite,
        Pattern::RandomMixed,
        Pattern::SequentialRead,
        Pattern::SequentialWrite,
    ];

    fn is_sequential(self) -> bool {
        matches!(self, Pattern::SequentialRead | Pattern::SequentialWrite)
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Pattern::RandomRead => "4 KiB random read",
            Pattern::RandomWrite => "4 KiB random write",
            Pattern::RandomMixed => "4 KiB random mixed, flushed",
            Pattern::SequentialRead => "256 KiB sequential read",
            Pattern::SequentialWrite => "256 KiB sequential write",
        }
    }
}

/// When it is enough.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    Milliseconds(u64),

    /// All connections together.
    Bytes(u64),

    /// Each block of the area once, in random order; for random patterns and one connection.
    EachBlockOnce,
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) pattern: Pattern,
    pub(crate) depth: u64,
    pub(crate) connections: u64,

    /// From the beginning of the disk; sequential connections share it out.
    pub(crate) area_bytes: u64,
    pub(crate) until: Until,
}

impl Load {
    /// `4 KiB random read, depth 1, 4 connections`.
    pub(crate) fn title(&self) -> String {
        let plural = if self.connections == 1 { "" } else { "s" };
        let (title, depth) = (self.pattern.title(), self.depth);
        format!("{title}, depth {depth}, {} connection{plural}", self.connections)
    }

    /// A speed in the pattern's unit.
    pub(crate) fn value(&self, bytes_per_second: f64) -> Value {
        if self.pattern.is_sequential() {
            Value::BytesPerSecond(bytes_per_second)
        } else {
            Value::PerSecond(bytes_per_second / SMALL_BYTES as f64)
        }
    }

    /// Runs it and returns bytes a second.
    pub(crate) fn run(&self, server: &Server) -> Result<f64> {
        self.run_on(&server.uri())
    }

    /// The same on an export by its URI.
    pub(crate) fn run_on(&self, uri: &str) -> Result<f64> {
        let sequential = self.pattern.is_sequential();
        let mut command = Command::new("fio");
        command.args(["--name=load", "--ioengine=nbd", "--thread", "--group_reporting"]);
        command.args(["--output-format=json", "--gtod_reduce=1", "--disk_util=0"]);
        command.arg(format!("--uri={uri}"));
        command.arg(format!(
            "--rw={}",
            match self.pattern {
                Pattern::RandomRead => "randread",
                Pattern::RandomWrite => "randwrite",
                Pattern::RandomMixed => "randrw",
                Pattern::SequentialRead => "read",
                Pattern::SequentialWrite => "write",
            }
        ));
        command.arg(format!("--bs={}", if sequential { LARGE_BYTES } else { SMALL_BYTES }));
        command.arg(format!("--iodepth={}", self.depth));
        command.arg(format!("--numjobs={}", self.connections));
        if sequential {
            let part = self.area_bytes / self.connections;
            command.arg(format!("--size={part}")).arg(format!("--offset_increment={part}"));
        } else {
            command.arg(format!("--size={}", self.area_bytes));
            if !matches!(self.until, Until::EachBlockOnce) {
                command.arg("--norandommap");
            }
        }
        if self.pattern == Pattern::RandomMixed {
            command.arg("--rwmixread=70").arg(format!("--fsync={WRITES_TO_FLUSH}"));
        }
        match self.until {
            Until::Milliseconds(ms) => {
                command.arg("--time_based").arg(format!("--runtime={ms}ms"));
            }
            Until::Bytes(bytes) => {
                command.arg(format!("--io_size={}", bytes / self.connections));
            }
            Until::EachBlockOnce => {
                command.arg(format!("--io_size={}", self.area_bytes));
            }
        }
        let output = command.output().context("cannot run fio")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "fio failed: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        // Its engine says hello on standard output.
        let json = text.find('{').zip(text.rfind('}')).map(|(from, to)| &text[from..=to]);
        let json: Json = serde_json::from_str(json.context("fio printed no figures")?)?;
        let job = &json["jobs"][0];
        ensure!(job["error"] == 0, "fio met error {}", job["error"]);
        let speed = |way: &str| job[way]["bw_bytes"].as_f64().context("fio printed no speed");
        let speed = speed("read")? + speed("write")?;
        ensure!(speed > 0.0, "fio did nothing on {uri}");
        Ok(speed)
    }
}
