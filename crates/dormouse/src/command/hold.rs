//! `dormouse hold`: keeps descriptors of VMMs, started by `serve memory`.

use std::path::Path;

use anyhow::Result;

use crate::live::memory::hold;

pub(super) fn run(socket: &Path) -> Result<()> {
    hold(socket)
}
