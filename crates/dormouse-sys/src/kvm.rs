//! A virtual CPU that runs a few instructions over memory of this process (`/dev/kvm`,
//! `Documentation/virt/kvm/api.rst`), for tests of what a guest's own accesses do.
//!
//! Flat 32-bit protected mode without paging: guest-physical addresses are what the instructions
//! say. There are no devices, no interrupts and no clock; a run ends with `hlt`. x86-64 hosts only.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mapping::Mapping;

const GET_API_VERSION: libc::Ioctl = 0xae00;
const CREATE_VM: libc::Ioctl = 0xae01;
const GET_VCPU_MMAP_SIZE: libc::Ioctl = 0xae04;
const CREATE_VCPU: libc::Ioctl = 0xae41;
const SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_ae46;
const SET_TSS_ADDR: libc::Ioctl = 0xae47;
const RUN: libc::Ioctl = 0xae80;
const SET_REGS: libc::Ioctl = 0x4090_ae82;
const GET_SREGS: libc::Ioctl = 0x8138_ae83;
const SET_SREGS: libc::Ioctl = 0x4138_ae84;

const API_VERSION: i32 = 12;
/// Three pages below 4 GiB that Intel's KVM wants for itself.
const TSS_ADDRESS: libc::c_ulong = 0xfffb_d000;
/// Where `kvm_run` has the reason of the last exit.
const EXIT_REASON_AT: usize = 8;
const EXIT_HLT: u32 = 5;
const PROTECTED_MODE: u64 = 1;

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    bytes: u64,
    address: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

#[repr(C)]
#[derive(Default)]
struct SystemRegisters {
    cs: Segment,
    data: [Segment; 5],
    tr: Segment,
    ldt: Segment,
    tables: [u64; 4],
    cr0: u64,
    cr2_to_cr8: [u64; 4],
    efer: u64,
    apic_base: u64,
    interrupts: [u64; 4],
}

#[repr(C)]
#[derive(Default)]
struct GeneralRegisters {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rsp_to_r15: [u64; 10],
    rip: u64,
    rflags: u64,
}

const _: () = assert!(size_of::<MemoryRegion>() == 32);
const _: () = assert!(size_of::<Segment>() == 24);
const _: () = assert!(size_of::<SystemRegisters>() == 312);
const _: () = assert!(size_of::<GeneralRegisters>() == 144);

/// A machine: memory at guest-physical addresses.
#[derive(Clone, Debug)]
pub struct Machine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kvm: File,
    vm: OwnedFd,
    /// Mapped as long as the machine can reach it.
    _memory: Vec<(u64, Arc<Mapping>)>,
}

/// What a run starts with; all other registers are 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Registers {
    /// The first instruction.
    pub eip: u32,
    /// See the instructions.
    pub eax: u32,
    /// See the instructions.
    pub ecx: u32,
    /// See the instructions.
    pub edx: u32,
    /// See the instructions.
    pub esi: u32,
    /// See the instructions.
    pub edi: u32,
}

/// A virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: OwnedFd,
    run: Mapping,
    _machine: Machine,
}

impl Machine {
    /// One with `memory` at guest-physical addresses: pages of 4 KiB, below 4 GiB, without overlap.
    ///
    /// `ENOENT`, `EACCES`: there is no KVM for us here.
    pub fn new(memory: Vec<(u64, Arc<Mapping>)>) -> io::Result<Machine> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        // SAFETY: takes no argument.
        let version = checked(unsafe { libc::ioctl(kvm.as_raw_fd(), GET_API_VERSION, 0) })?;
        if version != API_VERSION {
            return Err(io::Error::other(format!("KVM has version {version} of its API")));
        }
        // SAFETY: takes the machine's type, 0 for the usual one.
        let vm = checked(unsafe { libc::ioctl(kvm.as_raw_fd(), CREATE_VM, 0) })?;
        // SAFETY: the kernel made this descriptor for us a moment ago.
        let vm = unsafe { OwnedFd::from_raw_fd(vm) };
        // SAFETY: takes an address of the guest by value.
        checked(unsafe { libc::ioctl(vm.as_raw_fd(), SET_TSS_ADDR, TSS_ADDRESS) })?;
        for (slot, (guest_address, mapping)) in (0..).zip(&memory) {
            let addresses = mapping.addresses();
            let region = MemoryRegion {
                slot,
                flags: 0,
                guest_address: *guest_address,
                bytes: addresses.end - addresses.start,
                address: addresses.start,
            };
            // SAFETY: the argument has the kernel's layout. The guest reaches the mapping only, whose
            // content is only reached through atomics, and which lives as long as the machine.
            checked(unsafe {
                libc::ioctl(vm.as_raw_fd(), SET_USER_MEMORY_REGION, &raw const region)
            })?;
        }
        Ok(Machine { inner: Arc::new(Inner { kvm, vm, _memory: memory }) })
    }

    /// Its CPU with a number of its own.
    pub fn vcpu(&self, number: u32) -> io::Result<Vcpu> {
        let Inner { kvm, vm, .. } = &*self.inner;
        // SAFETY: takes the number by value.
        let fd = checked(unsafe {
            libc::ioctl(vm.as_raw_fd(), CREATE_VCPU, libc::c_ulong::from(number))
        })?;
        // SAFETY: the kernel made this descriptor for us a moment ago.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: takes no argument.
        let bytes = checked(unsafe { libc::ioctl(kvm.as_raw_fd(), GET_VCPU_MMAP_SIZE, 0) })?;
        let run =
            Mapping::shared_file(&File::from(fd.try_clone()?), bytes.unsigned_abs() as usize)?;
        let mut system = SystemRegisters::default();
        // SAFETY: the argument has the kernel's layout.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), GET_SREGS, &raw mut system) })?;
        let flat = |selector, kind| Segment {
            limit: u32::MAX,
            selector,
            kind,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Segment::default()
        };
        system.cs = flat(8, 0xb);
        system.data = [flat(16, 3); 5];
        system.cr0 |= PROTECTED_MODE;
        // SAFETY: the argument has the kernel's layout.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), SET_SREGS, &raw const system) })?;
        Ok(Vcpu { fd, run, _machine: self.clone() })
    }
}

impl Vcpu {
    /// Runs instructions until they halt. An access to a page that is missing and observed by a
    /// userfaultfd makes it wait, as it makes a guest wait.
    pub fn run(&mut self, start: Registers) -> io::Result<()> {
        let registers = GeneralRegisters {
            rax: start.eax.into(),
            rcx: start.ecx.into(),
            rdx: start.edx.into(),
            rsi: start.esi.into(),
            rdi: start.edi.into(),
            rip: start.eip.into(),
            // A bit that is always set.
            rflags: 2,
            ..GeneralRegisters::default()
        };
        // SAFETY: the argument has the kernel's layout.
        checked(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_REGS, &raw const registers) })?;
        loop {
            // SAFETY: takes no argument; the guest reaches the machine's memory only.
            match checked(unsafe { libc::ioctl(self.fd.as_raw_fd(), RUN, 0) }) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(_) => break,
            }
        }
        let bytes = self.run.bytes();
        let reason: [u8; 4] =
            std::array::from_fn(|at| bytes[EXIT_REASON_AT + at].load(Ordering::Relaxed));
        match u32::from_ne_bytes(reason) {
            EXIT_HLT => Ok(()),
            reason => Err(io::Error::other(format!("the guest stopped for reason {reason}"))),
        }
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::PageSize;

    /// `host_`: not every machine has KVM.
    #[test]
    fn host_a_guest_copies_and_halts() {
        let code = Arc::new(Mapping::anonymous(4096, PageSize::Small).unwrap());
        let data = Arc::new(Mapping::anonymous(8192, PageSize::Small).unwrap());
        // rep movsd; hlt
        for (byte, instruction) in code.bytes().iter().zip([0xf3, 0xa5, 0xf4]) {
            byte.store(instruction, Ordering::Relaxed);
        }
        data.words()[5].store(77, Ordering::Relaxed);
        let memory = vec![(0, Arc::clone(&code)), (1 << 24, Arc::clone(&data))];
        let machine = match Machine::new(memory) {
            Ok(machine) => machine,
            Err(error) if std::env::var_os("DORMOUSE_TEST_HOST").is_none() => {
                eprintln!("SKIPPED: there is no KVM here: {error}");
                return;
            }
            Err(error) => panic!("no KVM: {error}"),
        };
        let mut vcpu = machine.vcpu(0).unwrap();
        let (esi, edi) = (1 << 24, (1 << 24) + 4096);
        vcpu.run(Registers { ecx: 1024, esi, edi, ..Registers::default() }).unwrap();
        assert_eq!(data.words()[512 + 5].load(Ordering::Relaxed), 77);
        let outside = Registers { ecx: 1, esi: 1 << 30, edi, ..Registers::default() };
        assert!(vcpu.run(outside).is_err(), "there is nothing");
    }
}
