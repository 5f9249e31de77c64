//! Who touches memory: a thread of the process, or a virtual CPU as a guest would.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use dormouse_sys::kvm::{Machine, Registers, Vcpu};
use dormouse_sys::mapping::{Mapping, PageSize};

use super::content::{PAGE_BYTES, PAGE_WORDS};
use super::memory::Memory;

/// Where the guest has the image: its memory lies behind it in the order of the image.
const IMAGE_AT: u32 = 1 << 28;

/// Bytes of a CPU's own memory: a page of instructions and one to copy to.
const OWN_BYTES: usize = 2 * PAGE_BYTES;

/// `rep movsd; hlt`: copies ECX words of 32 bits from ESI to EDI.
const COPY: [u8; 3] = [0xf3, 0xa5, 0xf4];
/// `mov [edi], eax; mov [edi+4], edx; hlt`.
const STORE: [u8; 6] = [0x89, 0x07, 0x89, 0x57, 0x04, 0xf4];
const STORE_AT: usize = 16;

/// Something that touches memory.
#[derive(Debug)]
pub(super) enum Cpu {
    /// A thread of ours.
    Thread,
    /// A CPU of KVM's.
    Virtual {
        vcpu: Vcpu,
        /// Memory of all CPUs' own.
        own: Arc<Mapping>,
        number: usize,
    },
}

impl Cpu {
    /// CPUs of one machine that has all of `memory`.
    pub(super) fn virtual_ones(memory: &Memory, count: usize) -> Result<Vec<Cpu>> {
        let own = Arc::new(Mapping::anonymous(count * OWN_BYTES, PageSize::Small)?);
        let mut slots = vec![(0, Arc::clone(&own))];
        for (offset, mapping) in memory.mappings() {
            slots.push((u64::from(IMAGE_AT) + offset, mapping));
        }
        let machine = Machine::new(slots).context("cannot make a machine; is there /dev/kvm?")?;
        let mut cpus = Vec::new();
        for number in 0..count {
            let bytes = &own.bytes()[number * OWN_BYTES..];
            for (at, code) in [(0, &COPY[..]), (STORE_AT, &STORE)] {
                for (into, byte) in bytes[at..].iter().zip(code) {
                    into.store(*byte, Ordering::Relaxed);
                }
            }
            let vcpu = machine.vcpu(u32::try_from(number)?).context("cannot make a CPU")?;
            cpus.push(Cpu::Virtual { vcpu, own: Arc::clone(&own), number });
        }
        Ok(cpus)
    }

    /// Reads the first words of a page, as many as there is room for.
    pub(super) fn read(&mut self, memory: &Memory, page: u64, into: &mut [u64]) -> Result<()> {
        match self {
            Cpu::Thread => {
                for (into, word) in into.iter_mut().zip(memory.words(page)) {
                    *into = word.load(Ordering::Relaxed);
                }
            }
            Cpu::Virtual { vcpu, own, number } => {
                let (start, copied) = own_addresses(*number)?;
                let (eip, ecx) = (start, u32::try_from(into.len() * 2)?);
                let (esi, edi) = (guest_address(page, 0)?, copied);
                vcpu.run(Registers { eip, ecx, esi, edi, ..Registers::default() })
                    .with_context(|| format!("the guest cannot read page {page}"))?;
                let words = &own.words()[(*number * 2 + 1) * PAGE_WORDS..];
                for (into, word) in into.iter_mut().zip(words) {
                    *into = word.load(Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// Writes a word of a page.
    pub(super) fn write(
        &mut self,
        memory: &Memory,
        page: u64,
        word: usize,
        value: u64,
    ) -> Result<()> {
        match self {
            Cpu::Thread => memory.words(page)[word].store(value, Ordering::Relaxed),
            Cpu::Virtual { vcpu, number, .. } => {
                let (start, _) = own_addresses(*number)?;
                let eip = start + u32::try_from(STORE_AT)?;
                let (eax, edx) = (u32::try_from(value & 0xffff_ffff)?, u32::try_from(value >> 32)?);
                let edi = guest_address(page, word)?;
                vcpu.run(Registers { eip, eax, edx, edi, ..Registers::default() })
                    .with_context(|| format!("the guest cannot write to page {page}"))?;
            }
        }
        Ok(())
    }
}

/// Where a CPU has its instructions, and where it copies to.
fn own_addresses(number: usize) -> Result<(u32, u32)> {
    let start = u32::try_from(number * OWN_BYTES)?;
    Ok((start, start + u32::try_from(PAGE_BYTES)?))
}

fn guest_address(page: u64, word: usize) -> Result<u32> {
    let address = u64::from(IMAGE_AT) + page * PAGE_BYTES as u64 + word as u64 * 8;
    u32::try_from(address).context("memory beyond what the guest can address")
}
