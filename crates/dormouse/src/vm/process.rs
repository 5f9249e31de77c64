//! A VMM's process: told from others that had its number, started to outlive us, ended.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dormouse_sys::peer::Peer;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::sockets::Listening;
use crate::reaper;

/// How long a process that was killed may take to be gone: it may have to give back all of its memory.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// A process, told from every other there was or will be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ProcessId {
    /// Its number.
    pub(crate) pid: u32,

    /// When it was started, in clock ticks since the host was (`proc_pid_stat(5)`, field 22).
    pub(crate) started: u64,

    /// Which of the host's lives that was (`/proc/sys/kernel/random/boot_id`).
    pub(crate) boot: String,
}

impl ProcessId {
    /// Of a process that lives.
    pub(crate) fn of(pid: u32) -> Result<ProcessId> {
        let started = started(pid)?.with_context(|| format!("process {pid} is gone"))?;
        Ok(ProcessId { pid, started, boot: boot()? })
    }

    /// The process, if it still lives.
    pub(crate) fn find(&self) -> Result<Option<Peer>> {
        if self.boot != boot()? {
            return Ok(None);
        }
        // Held first, then looked at: what is held keeps its number.
        let peer = match Peer::by_pid(self.pid) {
            Ok(peer) => peer,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(error).context("cannot look for the VMM's process"),
        };
        if started(self.pid)? != Some(self.started) || peer.has_ended()? {
            return Ok(None);
        }
        Ok(Some(peer))
    }

    /// Ends it, waits until it is gone, and removes the sockets that it leaves.
    pub(crate) fn end(&self) -> Result<()> {
        if let Some(peer) = self.find()? {
            let sockets = Listening::of(self.pid);
            peer.kill().with_context(|| format!("cannot end process {}", self.pid))?;
            wait(&peer, END_TIMEOUT)?;
            sockets.remove();
        }
        Ok(())
    }

    /// Waits for it to end by itself; whether it did.
    pub(crate) fn ends_within(&self, timeout: Duration) -> Result<bool> {
        Ok(match self.find()? {
            Some(peer) => wait(&peer, timeout).is_ok(),
            None => true,
        })
    }
}

/// Ends the processes whose output goes to a file: a VMM that was started by somebody who was killed
/// before its number was written down. There is none that is not seen here because it is no VMM yet: from
/// the fork to the exec it has the VM's lock open, and whoever calls this has that lock.
pub(crate) fn end_all_that_write_to(log: &Path) -> Result<()> {
    let entries = fs::read_dir("/proc").context("cannot list processes")?;
    for entry in entries.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        // Others' are not shown to us, and are not ours. One may have given up either.
        let writes = || {
            let is_log = |fd: &str| fs::read_link(entry.path().join(fd)).is_ok_and(|at| at == log);
            is_log("fd/1") || is_log("fd/2")
        };
        if writes()
            && let Ok(id) = ProcessId::of(pid)
            && writes()
        {
            id.end()?;
        }
    }
    Ok(())
}

fn wait(peer: &Peer, timeout: Duration) -> Result<()> {
    let begun = Instant::now();
    let mut rest = Duration::from_micros(200);
    while !peer.has_ended()? {
        if begun.elapsed() > timeout {
            anyhow::bail!("process {} has not ended within {timeout:?}", peer.pid());
        }
        thread::sleep(rest);
        rest = (rest * 2).min(Duration::from_millis(20));
    }
    Ok(())
}

/// A VMM that was just started by this process.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) id: ProcessId,
    child: Option<Child>,
}

impl Started {
    /// Starts a VMM in a session of its own, its outputs in `log`.
    pub(crate) fn start(mut command: Command, log: &Path) -> Result<Started> {
        let program = command.get_program().display().to_string();
        let cannot = || format!("cannot start {program}");
        let file = fs::File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)
            .with_context(cannot)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().with_context(cannot)?)
            .stderr(file)
            // Ctrl-C at whoever wakes a VM is not meant for the VM.
            .process_group(0)
            .spawn()
            .with_context(cannot)?;
        let started = Started { id: ProcessId::of(child.id())?, child: Some(child) };
        let own = "/proc/self/oom_score_adj";
        let own = fs::read_to_string(own).with_context(|| format!("cannot read {own}"))?;
        expose_to_oom_killer(&own, started.id.pid)?;
        Ok(started)
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        Some(status.to_string())
    }

    /// Lets it live on. Whoever lives as long as it does, such as the daemon, waits for its end, so that
    /// nothing of it is left in the kernel's tables.
    pub(crate) fn let_go(mut self) {
        if let Some(child) = self.child.take() {
            reaper::let_go(child);
        }
    }
}

impl Drop for Started {
    /// One that nobody let live on is ended.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Where it has ended already there is nothing to be done.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Has a child killed like any other process when the host is short of memory, though we are spared
/// (`own`, by the service's `OOMScoreAdjust=`): guests are what takes the memory. To raise it is anybody's
/// right.
fn expose_to_oom_killer(own: &str, pid: u32) -> Result<()> {
    if !own.starts_with('-') {
        return Ok(());
    }
    let path = format!("/proc/{pid}/oom_score_adj");
    match fs::write(&path, "0") {
        Err(error) if !is_gone(&error) => {
            Err(error).with_context(|| format!("cannot write {path}"))
        }
        _ => Ok(()),
    }
}

fn started(pid: u32) -> Result<Option<u64>> {
    let path = format!("/proc/{pid}/stat");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {path}")),
    };
    // The name in field 2 may hold anything, a parenthesis too; the last one is its end.
    let rest = text.rsplit_once(") ").map(|(_, rest)| rest);
    let field = rest.and_then(|rest| rest.split(' ').nth(22 - 3));
    let started = field.and_then(|field| field.parse().ok());
    started.map(Some).with_context(|| format!("{path} is not as proc_pid_stat(5) has it"))
}

fn boot() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    Ok(text.trim().to_owned())
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_until_it_ends_and_no_other_is_taken_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        let mut started = Started::start(command, &folder.path().join("log")).unwrap();
        let id = started.id.clone();
        assert_eq!(id.find().unwrap().unwrap().pid(), id.pid);
        assert!(started.ended().is_none());
        let earlier = ProcessId { started: id.started - 1, ..id.clone() };
        assert!(earlier.find().unwrap().is_none(), "another process of the same number");
        let before = ProcessId { boot: "before".to_owned(), ..id.clone() };
        assert!(before.find().unwrap().is_none());
        before.end().unwrap();
        assert!(!id.ends_within(Duration::from_millis(1)).unwrap());
        id.end().unwrap();
        assert!(started.ended().unwrap().contains("signal"));
        assert!(id.find().unwrap().is_none());
        assert!(id.ends_within(Duration::ZERO).unwrap());
    }

    #[test]
    fn one_whose_number_was_never_written_down_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        let log = folder.path().join("log");
        let started = Started::start(command, &log).unwrap();
        let id = started.id.clone();
        end_all_that_write_to(&folder.path().join("other")).unwrap();
        assert!(id.find().unwrap().is_some());
        end_all_that_write_to(&log).unwrap();
        assert!(id.find().unwrap().is_none());
    }

    fn oom_score_of(process: &str) -> String {
        fs::read_to_string(format!("/proc/{process}/oom_score_adj")).unwrap()
    }

    /// The service has `OOMScoreAdjust=-500`, which guests had too: a host short of memory killed
    /// everything else before the guest that took it.
    #[test]
    fn one_is_not_spared_by_the_oom_killer_though_we_are() {
        let folder = tempfile::tempdir().unwrap();
        let start = || {
            let mut command = Command::new("sleep");
            command.arg("60");
            Started::start(command, &folder.path().join("log")).unwrap()
        };
        // One that others are to be spared before keeps it, unless we are spared.
        let own = "/proc/self/oom_score_adj";
        fs::write(own, "300").unwrap();
        let started = start();
        let pid = started.id.pid;
        assert_eq!(oom_score_of(&pid.to_string()), "300\n");
        expose_to_oom_killer("0\n", pid).unwrap();
        assert_eq!(oom_score_of(&pid.to_string()), "300\n");
        expose_to_oom_killer("-500\n", pid).unwrap();
        assert_eq!(oom_score_of(&pid.to_string()), "0\n");
        drop(started);
        expose_to_oom_killer("-500\n", pid).unwrap();
        // The whole way, where this may be done.
        if let Err(error) = fs::write(own, "-500") {
            eprintln!("SKIPPED the start by one that is spared: nobody may be here: {error}");
            return;
        }
        let started = start();
        assert_eq!(oom_score_of(&started.id.pid.to_string()), "0\n");
        assert_eq!(oom_score_of("self"), "-500\n");
    }

    #[test]
    fn one_that_nobody_let_live_on_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        let started = Started::start(command, &folder.path().join("log")).unwrap();
        let id = started.id.clone();
        drop(started);
        assert!(id.find().unwrap().is_none());
    }
}
