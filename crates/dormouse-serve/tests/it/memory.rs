//! A device in memory that can be told to fail, to be slow and to be watched.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

use dormouse_serve::nbd::{
    BASE_ALLOCATION, BlockDevice, Context, DIRTY_CONTEXT, DeviceErrorKind, DeviceResult,
    Durability, FlagsWidth, HOLE, Run, SOURCE_CONTEXT, ZERO, ZeroMode,
};

const BLOCK: u64 = 4096;

pub(crate) struct Memory {
    bytes: Mutex<Vec<u8>>,
    dirty: Mutex<Vec<bool>>,
    pub(crate) read_only: bool,
    /// Errors by the offset at which a request begins.
    pub(crate) failures: Mutex<BTreeMap<u64, DeviceErrorKind>>,
    /// Requests that begin here wait until [`Memory::open_gate`].
    pub(crate) gate_at: AtomicU64,
    gate: Mutex<bool>,
    gate_opened: Condvar,
    pub(crate) at_gate: AtomicBool,
    pub(crate) flushes: AtomicU64,
    pub(crate) durable_writes: AtomicU64,
    pub(crate) largest_zero: AtomicU64,
}

impl Memory {
    pub(crate) fn new(bytes: Vec<u8>) -> Memory {
        Memory {
            dirty: Mutex::new(vec![false; bytes.len().div_ceil(4096)]),
            bytes: Mutex::new(bytes),
            read_only: false,
            failures: Mutex::default(),
            gate_at: AtomicU64::new(u64::MAX),
            gate: Mutex::new(false),
            gate_opened: Condvar::new(),
            at_gate: AtomicBool::new(false),
            flushes: AtomicU64::new(0),
            durable_writes: AtomicU64::new(0),
            largest_zero: AtomicU64::new(0),
        }
    }

    /// Every byte another one, except zero blocks 16..32 of every 64.
    pub(crate) fn pattern(size: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..size).map(|at| (at / 4096 * 31 + at * 7 + 1) as u8 | 1).collect();
        for chunk in bytes.chunks_mut(64 * 4096) {
            let end = chunk.len().min(32 * 4096);
            if end > 16 * 4096 {
                chunk[16 * 4096..end].fill(0);
            }
        }
        bytes
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    pub(crate) fn open_gate(&self) {
        *self.gate.lock().unwrap() = true;
        self.gate_opened.notify_all();
    }

    fn enter(&self, offset: u64) -> DeviceResult<()> {
        if self.gate_at.load(Ordering::SeqCst) == offset {
            self.at_gate.store(true, Ordering::SeqCst);
            let mut open = self.gate.lock().unwrap();
            while !*open {
                open = self.gate_opened.wait(open).unwrap();
            }
        }
        match self.failures.lock().unwrap().get(&offset) {
            Some(&kind) => Err(kind.into()),
            None => Ok(()),
        }
    }

    fn put(&self, offset: u64, length: usize, durability: Durability, fill: impl Fn(&mut [u8])) {
        let at = offset as usize;
        fill(&mut self.bytes.lock().unwrap()[at..at + length]);
        let mut dirty = self.dirty.lock().unwrap();
        for block in at / 4096..(at + length).div_ceil(4096) {
            dirty[block] = true;
        }
        if durability == Durability::Now {
            self.durable_writes.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl BlockDevice for Memory {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        self.enter(offset)?;
        let at = offset as usize;
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> DeviceResult<()> {
        self.enter(offset)?;
        self.put(offset, data.len(), durability, |place| place.copy_from_slice(data));
        Ok(())
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode, durability: Durability) -> DeviceResult<()> {
        self.enter(range.start)?;
        if mode.fast_only && !mode.may_punch {
            return Err(DeviceErrorKind::NotSupported.into());
        }
        let length = range.end - range.start;
        self.largest_zero.fetch_max(length, Ordering::SeqCst);
        self.put(range.start, length as usize, durability, |place| place.fill(0));
        Ok(())
    }

    fn trim(&self, range: Range<u64>, durability: Durability) -> DeviceResult<()> {
        self.zero(range, ZeroMode { may_punch: true, fast_only: false }, durability)
    }

    fn flush(&self) -> DeviceResult<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.enter(u64::MAX - 1)
    }

    fn contexts(&self) -> &[Context] {
        &[
            Context::ALLOCATION,
            Context { name: DIRTY_CONTEXT, flags: FlagsWidth::U32 },
            Context { name: SOURCE_CONTEXT, flags: FlagsWidth::U64 },
        ]
    }

    fn extents(
        &self,
        context: &str,
        range: Range<u64>,
        sink: &mut dyn FnMut(Run) -> ControlFlow<()>,
    ) -> DeviceResult<()> {
        let mut at = range.start;
        // One run for each block: the server joins them.
        while at < range.end {
            let end = ((at / BLOCK + 1) * BLOCK).min(self.size_bytes());
            let flags = match context {
                BASE_ALLOCATION => {
                    let bytes = self.bytes.lock().unwrap();
                    let zero = bytes[at as usize..end as usize].iter().all(|&byte| byte == 0);
                    if zero { HOLE | ZERO } else { 0 }
                }
                DIRTY_CONTEXT => u64::from(self.dirty.lock().unwrap()[(at / BLOCK) as usize]),
                SOURCE_CONTEXT => 1 << 40 | at >> 20,
                _ => return Err(DeviceErrorKind::Invalid.into()),
            };
            if sink(Run { length: end - at, flags }).is_break() {
                break;
            }
            at = end;
        }
        Ok(())
    }
}
