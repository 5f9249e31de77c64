//! Shows long work on standard error: a bar on a terminal, a line every few seconds elsewhere.

use std::fmt;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dormouse_store::progress::{Job, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::output::size::human;

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

/// How often a bar is drawn again, at most.
const DRAWS_PER_SECOND: u8 = 10;

const BAR: &str =
    "{msg} {files}[{wide_bar:.cyan/dim}] {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
const SPINNER: &str = "{msg} {spinner} {files}{bytes} {bytes_per_sec} {elapsed}";

/// Whom the library tells what it does, and the flag that stops it.
pub(crate) struct Display {
    style: Style,
    /// Files of the stage, where it counts any.
    files: Arc<AtomicU64>,
    cancel: Arc<AtomicBool>,
}

enum Style {
    Nothing,
    Bar(ProgressBar),
    Lines(Lines),
}

struct Lines {
    done_bytes: AtomicU64,
    /// Guards only itself; held for the time of printing a line.
    stage: Mutex<Stage>,
}

struct Stage {
    name: String,
    total_bytes: Option<u64>,
    begun: Instant,
    told: Instant,
}

impl fmt::Debug for Display {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Display").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

impl Display {
    /// A display for standard error as it is, or none at all.
    pub(crate) fn new(silent: bool, cancel: Arc<AtomicBool>) -> Display {
        let style = if silent {
            Style::Nothing
        } else if std::io::stderr().is_terminal() {
            let target = ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND);
            Style::Bar(ProgressBar::with_draw_target(None, target))
        } else {
            let now = Instant::now();
            let stage = Stage { name: String::new(), total_bytes: None, begun: now, told: now };
            Style::Lines(Lines { done_bytes: AtomicU64::new(0), stage: Mutex::new(stage) })
        };
        Display { style, files: Arc::default(), cancel }
    }

    /// What the library's long operations are given.
    pub(crate) fn job(&self) -> Job<'_> {
        Job { progress: self, cancel: &self.cancel }
    }

    /// So many more bytes belong to the stage than was known when it began.
    pub(crate) fn expect_more(&self, bytes: u64) {
        match &self.style {
            Style::Nothing => {}
            Style::Bar(bar) => {
                if bar.length().is_none() {
                    bar.set_length(0);
                    bar.set_style(self.bar_style(BAR));
                }
                bar.inc_length(bytes);
            }
            Style::Lines(lines) => {
                let mut stage = lines.stage.lock().unwrap_or_else(PoisonError::into_inner);
                stage.total_bytes = Some(stage.total_bytes.unwrap_or(0) + bytes);
            }
        }
    }

    /// So many more files were taken up.
    pub(crate) fn count(&self, files: u64) {
        self.files.fetch_add(files, Ordering::Relaxed);
        match &self.style {
            Style::Nothing => {}
            Style::Bar(bar) => bar.tick(),
            Style::Lines(lines) => lines.advance(0, self.files.load(Ordering::Relaxed)),
        }
    }

    fn bar_style(&self, template: &str) -> ProgressStyle {
        let files = Arc::clone(&self.files);
        let told = move |_: &ProgressState, out: &mut dyn fmt::Write| {
            // A bar that cannot be drawn is not worth an end.
            let _ = out.write_str(&files_told(files.load(Ordering::Relaxed)));
        };
        ProgressStyle::with_template(template)
            .expect("the templates above are valid")
            .with_key("files", told)
            .progress_chars("━╸─")
    }

    /// Whether a signal asked to stop.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Style::Bar(bar) = &self.style {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Display {
    fn begin(&self, stage: &str, total_bytes: Option<u64>) {
        self.files.store(0, Ordering::Relaxed);
        match &self.style {
            Style::Nothing => {}
            Style::Bar(bar) => {
                bar.reset();
                match total_bytes {
                    Some(total) => bar.set_length(total),
                    None => bar.unset_length(),
                }
                let template = if total_bytes.is_some() { BAR } else { SPINNER };
                bar.set_style(self.bar_style(template));
                bar.set_message(stage.to_owned());
            }
            Style::Lines(lines) => {
                let now = Instant::now();
                let name = stage.to_owned();
                lines.done_bytes.store(0, Ordering::Relaxed);
                *lines.stage.lock().unwrap_or_else(PoisonError::into_inner) =
                    Stage { name, total_bytes, begun: now, told: now };
            }
        }
    }

    fn advance(&self, bytes: u64) {
        match &self.style {
            Style::Nothing => {}
            Style::Bar(bar) => bar.inc(bytes),
            Style::Lines(lines) => lines.advance(bytes, self.files.load(Ordering::Relaxed)),
        }
    }
}

/// `1234 files, `, or nothing where none are counted.
fn files_told(files: u64) -> String {
    if files == 0 { String::new() } else { format!("{files} files, ") }
}

impl Lines {
    #[expect(clippy::print_stderr, reason = "this is where progress is printed")]
    fn advance(&self, bytes: u64, files: u64) {
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // Whoever finds the lock taken leaves the telling to its holder.
        let Ok(mut stage) = self.stage.try_lock() else { return };
        let now = Instant::now();
        if now - stage.told < LINE_INTERVAL {
            return;
        }
        stage.told = now;
        let elapsed = now - stage.begun;
        eprintln!("{}", line(&stage.name, files, done, stage.total_bytes, elapsed));
    }
}

/// `write: 1234 files, 1.2 GiB of 4.0 GiB (30 %), 512 MiB/s, 6 s left`.
fn line(stage: &str, files: u64, done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let files = files_told(files);
    let per_second = (u128::from(done) * 1000 / elapsed.as_millis().max(1)).max(1);
    let per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
    let rate = human(per_second);
    match total.filter(|&total| total > 0) {
        Some(total) => {
            let percent = u128::from(done.min(total)) * 100 / u128::from(total);
            let left = total.saturating_sub(done) / per_second;
            format!(
                "{stage}: {files}{} of {} ({percent} %), {rate}/s, {left} s left",
                human(done),
                human(total)
            )
        }
        None => format!("{stage}: {files}{}, {rate}/s", human(done)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_rate_and_remaining_time() {
        let two = Duration::from_secs(2);
        assert_eq!(
            line("capture", 0, 1 << 30, Some(4 << 30), two),
            "capture: 1.0 GiB of 4.0 GiB (25 %), 512.0 MiB/s, 6 s left"
        );
        assert_eq!(line("read", 12, 4096, None, two), "read: 12 files, 4.0 KiB, 2.0 KiB/s");
        assert_eq!(line("read", 0, 0, Some(0), Duration::ZERO), "read: 0 B, 1 B/s");
    }
}
