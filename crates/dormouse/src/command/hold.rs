//! `dormouse hold`: keeps descriptors of VMMs, started by `serve memory` and `mount --hold`.

use std::path::Path;

use anyhow::Result;

use crate::live::memory::{Successor, hold};

pub(super) fn run(socket: &Path, successor: Successor) -> Result<()> {
    hold(socket, successor)
}
