//! Cloud Hypervisor's side of its migration protocol, written from the protocol's pages and not
//! from ours.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dormouse_sys::passing;

const START: u16 = 1;
const CONFIG: u16 = 2;
const STATE: u16 = 3;
const COMPLETE: u16 = 5;
const ABANDON: u16 = 6;
const MEMORY_FD: u16 = 7;
const COMPLETE_PAUSED: u16 = 8;
pub(super) const PAGE_FAULT: u16 = 9;

/// A connection for page faults has to come within this time.
const FAULTS_WITHIN: Duration = Duration::from_secs(5);

pub(super) fn request(command: u16, length: u64) -> [u8; 16] {
    let mut head = [0; 16];
    head[..2].copy_from_slice(&command.to_le_bytes());
    head[8..].copy_from_slice(&length.to_le_bytes());
    head
}

pub(super) fn read_head(stream: &mut UnixStream) -> Result<(u16, u64)> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    let mut length = [0; 8];
    length.copy_from_slice(&head[8..]);
    Ok((u16::from_le_bytes([head[0], head[1]]), u64::from_le_bytes(length)))
}

/// Sends a snapshot.
pub(super) fn send(
    socket: &Path,
    memory: &[File],
    config: &str,
    state: &str,
    was_running: bool,
) -> Result<()> {
    let mut stream = UnixStream::connect(socket).context("cannot connect to the destination")?;
    let mut ask = |command, payload: &[u8], file: Option<&File>| -> Result<()> {
        stream.write_all(&request(command, payload.len() as u64))?;
        match file {
            Some(file) => passing::send(&stream, payload, &[file.as_fd()])?,
            None => stream.write_all(payload)?,
        }
        let (status, _) = read_head(&mut stream).context("no answer")?;
        ensure!(status == 1, "the receiver reported an error after command {command}");
        Ok(())
    };
    ask(START, &[], None)?;
    for (slot, file) in memory.iter().enumerate() {
        ask(MEMORY_FD, &u32::try_from(slot)?.to_le_bytes(), Some(file))?;
    }
    ask(CONFIG, config.as_bytes(), None)?;
    ask(STATE, state.as_bytes(), None)?;
    ask(if was_running { COMPLETE } else { COMPLETE_PAUSED }, &[], None)
}

/// A migration that comes in; its state is not answered yet.
pub(super) struct Received {
    stream: UnixStream,
    pub(super) faults: Option<UnixStream>,
    pub(super) config: String,
    pub(super) state: String,
    pub(super) memory: Vec<File>,
    /// Pages come over the connection.
    pub(super) is_private: bool,
}

/// Listens, and takes everything up to the state.
pub(super) fn receive(socket: &Path, is_lazy: bool) -> Result<Received> {
    let listener = UnixListener::bind(socket)?;
    let (mut stream, _) = listener.accept()?;
    let ok = |stream: &mut UnixStream| stream.write_all(&request(1, 0));
    let (command, _) = read_head(&mut stream)?;
    ensure!(command == START, "command {command} at the start");
    ok(&mut stream)?;
    let (mut memory, mut config) = (Vec::new(), None);
    let state = loop {
        let (command, length) = read_head(&mut stream)?;
        let length = usize::try_from(length)?;
        match command {
            MEMORY_FD => {
                ensure!(config.is_none() && length == 4, "a descriptor out of order");
                let (mut number, mut descriptors) = ([0; 4], Vec::new());
                let count = passing::receive(&stream, &mut number, &mut descriptors)?;
                ensure!(count == 4 && descriptors.len() == 1, "no descriptor");
                ensure!(u32::from_le_bytes(number) as usize == memory.len(), "a slot out of order");
                memory.extend(descriptors.into_iter().map(File::from));
            }
            CONFIG | STATE => {
                let mut bytes = vec![0; length];
                stream.read_exact(&mut bytes)?;
                let text = String::from_utf8(bytes)?;
                if command == STATE {
                    break text;
                }
                config = Some(text);
            }
            ABANDON => bail!("abandoned"),
            other => bail!("command {other} before the state"),
        }
        ok(&mut stream)?;
    };
    let faults = match is_lazy {
        false => None,
        true => {
            // It was made behind the configuration, so it waits here already.
            let (mut faults, _) = listener.accept()?;
            faults.set_read_timeout(Some(FAULTS_WITHIN))?;
            let mut role = [0; 2];
            faults.read_exact(&mut role).context("no role of a connection")?;
            ensure!(u16::from_le_bytes(role) == 2, "role {role:?}");
            Some(faults)
        }
    };
    let is_private = is_lazy && memory.is_empty();
    ensure!(is_lazy || !memory.is_empty(), "a migration without memory");
    std::fs::remove_file(socket)?;
    let config = config.context("a state without a configuration")?;
    Ok(Received { stream, faults, config, state, memory, is_private })
}

impl Received {
    pub(super) fn answer_state(&mut self) -> Result<()> {
        Ok(self.stream.write_all(&request(1, 0))?)
    }

    /// Takes the last command; whether the guest is to run.
    pub(super) fn finish(&mut self) -> Result<bool> {
        let (command, _) = read_head(&mut self.stream)?;
        ensure!(command == COMPLETE || command == COMPLETE_PAUSED, "command {command} at the end");
        self.stream.write_all(&request(1, 0))?;
        Ok(command == COMPLETE)
    }
}
