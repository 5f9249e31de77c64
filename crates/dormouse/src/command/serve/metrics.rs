//! A server's figures as JSON; `docs/cli.md` has the table.

use dormouse_serve::nbd::{CommandStats, ExportStats, ServerStats};
use serde_json::{Value, json};

use super::{Device, Exports};
use crate::command::disk::overlay_figures;

/// What SIGUSR1 and `--metrics` print.
pub(super) fn object(stats: &ServerStats, exports: &Exports) -> Value {
    let each = stats.exports.iter().zip(&exports.list);
    let exports: Vec<Value> = each
        .map(|(stats, exported)| {
            let mut object = export(stats);
            object["disk"] = match &exported.device {
                Device::Image(_) => Value::Null,
                Device::Live(disk) => overlay_figures(&disk.overlay).unwrap_or_else(|error| {
                    tracing::warn!(%error, "a disk's figures are missing");
                    Value::Null
                }),
            };
            object
        })
        .collect();
    json!({
        "version": 1,
        "exports": exports,
        "connections": stats.connections,
        "accepted": stats.accepted,
        "turned_away": stats.turned_away,
        "failed": stats.failed,
    })
}

fn export(stats: &ExportStats) -> Value {
    json!({
        "name": stats.name,
        "connections": stats.connections,
        "read": command(&stats.read),
        "write": command(&stats.write),
        "flush": command(&stats.flush),
        "trim": command(&stats.trim),
        "zero": command(&stats.zero),
        "cache": command(&stats.cache),
        "block_status": command(&stats.block_status),
        "refused": stats.refused,
    })
}

fn command(stats: &CommandStats) -> Value {
    json!({
        "requests": stats.requests,
        "bytes": stats.bytes,
        "errors": stats.errors,
        "waiting_seconds": stats.waiting.as_secs_f64(),
        "serving_seconds": stats.serving.as_secs_f64(),
    })
}
