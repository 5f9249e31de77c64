//! An image as a compressed qcow2 file, made by `qemu-img`: what people use who use nothing else.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Converts the raw file `image` to the new file `qcow2` with zstd and returns its length.
///
/// # Errors
/// When `qemu-img` is missing or fails.
pub fn compress(image: &Path, qcow2: &Path) -> Result<u64> {
    run(
        &["convert", "-c", "-o", "compression_type=zstd", "-f", "raw", "-O", "qcow2"],
        image,
        qcow2,
    )?;
    Ok(fs::metadata(qcow2)?.len())
}

/// Converts a qcow2 file back to the raw file `image`.
///
/// # Errors
/// When `qemu-img` is missing or fails.
pub fn expand(qcow2: &Path, image: &Path) -> Result<()> {
    run(&["convert", "-f", "qcow2", "-O", "raw"], qcow2, image)
}

fn run(arguments: &[&str], from: &Path, to: &Path) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(arguments)
        .args([from, to])
        .output()
        .context("cannot run qemu-img (`cargo xtask packages` installs it)")?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "qemu-img failed on {}: {message}", from.display());
    Ok(())
}
