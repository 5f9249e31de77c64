//! A guest of 206 bytes that needs no operating system: it counts, and checks its memory.
//!
//! It is a kernel that QEMU starts by its PVH note, on every x86 machine, in some tens of
//! milliseconds. It fills [`Counter::pages`] pages from [`MEMORY_START`] on, each with a number at
//! its start and the number's complement at its end. Then it goes round: with each step of the
//! count it looks whether the next page has what it put there a round ago, and puts the count
//! there. Every 64 steps it writes the count to its serial line, as eight hexadecimal digits; after
//! the first wrong page it writes `X` and stops for good.
//!
//! So one line that follows another says that as many pages of memory were right.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Where its pages begin.
pub const MEMORY_START: u64 = 4 << 20;

/// Where it is loaded.
const LOAD_ADDRESS: u32 = 1 << 20;

/// Where in the code the number of pages stands.
const PAGES_AT: [usize; 2] = [34, 48];

#[rustfmt::skip]
const CODE: [u8; 206] = [
    // start:
    0xfa,  // cli
    0xbc, 0x00, 0x00, 0x30, 0x00,  // mov $0x300000,%esp
    0x31, 0xc9,  // xor %ecx,%ecx
    // fill:
    0x89, 0xcf,  // mov %ecx,%edi
    0xc1, 0xe7, 0x0c,  // shl $0xc,%edi
    0x81, 0xc7, 0x00, 0x00, 0x40, 0x00,  // add $0x400000,%edi
    0x89, 0x0f,  // mov %ecx,(%edi)
    0x89, 0xc8,  // mov %ecx,%eax
    0xf7, 0xd0,  // not %eax
    0x89, 0x87, 0xfc, 0x0f, 0x00, 0x00,  // mov %eax,0xffc(%edi)
    0x41,  // inc %ecx
    0x81, 0xf9, 0x44, 0x33, 0x22, 0x11,  // cmp $0x11223344,%ecx
    0x72, 0xe0,  // jb 8 <fill>
    0x31, 0xf6,  // xor %esi,%esi
    // main:
    0x89, 0xf0,  // mov %esi,%eax
    0x46,  // inc %esi
    0x31, 0xd2,  // xor %edx,%edx
    0xbb, 0x44, 0x33, 0x22, 0x11,  // mov $0x11223344,%ebx
    0xf7, 0xf3,  // div %ebx
    0x89, 0xd1,  // mov %edx,%ecx
    0x89, 0xd7,  // mov %edx,%edi
    0xc1, 0xe7, 0x0c,  // shl $0xc,%edi
    0x81, 0xc7, 0x00, 0x00, 0x40, 0x00,  // add $0x400000,%edi
    0x85, 0xc0,  // test %eax,%eax
    0x74, 0x04,  // je 4b <check>
    0x89, 0xf1,  // mov %esi,%ecx
    0x29, 0xd9,  // sub %ebx,%ecx
    // check:
    0x39, 0x0f,  // cmp %ecx,(%edi)
    0x75, 0x53,  // jne a2 <bad>
    0xf7, 0xd1,  // not %ecx
    0x39, 0x8f, 0xfc, 0x0f, 0x00, 0x00,  // cmp %ecx,0xffc(%edi)
    0x75, 0x49,  // jne a2 <bad>
    0x89, 0x37,  // mov %esi,(%edi)
    0x89, 0xf0,  // mov %esi,%eax
    0xf7, 0xd0,  // not %eax
    0x89, 0x87, 0xfc, 0x0f, 0x00, 0x00,  // mov %eax,0xffc(%edi)
    0xf7, 0xc6, 0x3f, 0x00, 0x00, 0x00,  // test $0x3f,%esi
    0x75, 0xbd,  // jne 2a <main>
    0x89, 0xf5,  // mov %esi,%ebp
    0xbb, 0x08, 0x00, 0x00, 0x00,  // mov $0x8,%ebx
    // digit:
    0xc1, 0xc5, 0x04,  // rol $0x4,%ebp
    0x89, 0xe8,  // mov %ebp,%eax
    0x83, 0xe0, 0x0f,  // and $0xf,%eax
    0x83, 0xc0, 0x30,  // add $0x30,%eax
    0x83, 0xf8, 0x39,  // cmp $0x39,%eax
    0x76, 0x03,  // jbe 87 <small>
    0x83, 0xc0, 0x27,  // add $0x27,%eax
    // small:
    0xe8, 0x2d, 0x00, 0x00, 0x00,  // call b9 <put>
    0x4b,  // dec %ebx
    0x75, 0xe5,  // jne 74 <digit>
    0xb8, 0x0a, 0x00, 0x00, 0x00,  // mov $0xa,%eax
    0xe8, 0x20, 0x00, 0x00, 0x00,  // call b9 <put>
    0xb9, 0x40, 0x0d, 0x03, 0x00,  // mov $0x30d40,%ecx
    // wait:
    0xe2, 0xfe,  // loop 9e <wait>
    0xeb, 0x88,  // jmp 2a <main>
    // bad:
    0xb8, 0x58, 0x00, 0x00, 0x00,  // mov $0x58,%eax
    0xe8, 0x0d, 0x00, 0x00, 0x00,  // call b9 <put>
    0xb8, 0x0a, 0x00, 0x00, 0x00,  // mov $0xa,%eax
    0xe8, 0x03, 0x00, 0x00, 0x00,  // call b9 <put>
    // stop:
    0xf4,  // hlt
    0xeb, 0xfd,  // jmp b6 <stop>
    // put:
    0x89, 0xc1,  // mov %eax,%ecx
    0xba, 0xfd, 0x03, 0x00, 0x00,  // mov $0x3fd,%edx
    // full:
    0xec,  // in (%dx),%al
    0xa8, 0x20,  // test $0x20,%al
    0x74, 0xfb,  // je c0 <full>
    0xba, 0xf8, 0x03, 0x00, 0x00,  // mov $0x3f8,%edx
    0x89, 0xc8,  // mov %ecx,%eax
    0xee,  // out %al,(%dx)
    0xc3,  // ret
];

/// The guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Pages that it fills and checks.
    pub pages: u32,
}

impl Counter {
    /// Writes the kernel to a file, for `-kernel`.
    pub fn write_kernel(&self, path: &Path) -> io::Result<()> {
        fs::write(path, self.kernel())
    }

    /// What its memory has before the first step of the count, in as many bytes.
    pub fn expects(&self, page: u32) -> [u32; 2] {
        [page, !page]
    }

    fn kernel(&self) -> Vec<u8> {
        let mut code = CODE;
        for at in PAGES_AT {
            code[at..at + 4].copy_from_slice(&self.pages.to_le_bytes());
        }
        elf(&code)
    }
}

/// A 64-bit ELF file with one segment, and a note that says where a PVH loader enters.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER_BYTES: u16 = 64;
    const SEGMENT_BYTES: u16 = 56;
    const NOTE_AT: u64 = 64 + 2 * 56;
    const CODE_AT: u64 = 4096;
    // XEN_ELFNOTE_PHYS32_ENTRY
    const NOTE_TYPE: u32 = 18;
    let mut note = Vec::new();
    for word in [4, 8, NOTE_TYPE] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u64::from(LOAD_ADDRESS).to_le_bytes());
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    // An executable for x86-64.
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    file.extend(u64::from(LOAD_ADDRESS).to_le_bytes());
    file.extend(u64::from(HEADER_BYTES).to_le_bytes());
    file.extend([0; 12]);
    for number in [HEADER_BYTES, SEGMENT_BYTES, 2, 0, 0, 0] {
        file.extend(number.to_le_bytes());
    }
    let address = u64::from(LOAD_ADDRESS);
    let length = code.len() as u64;
    // Both kinds of segment: what to load (1), and a note (4); readable and executable.
    for (kind, at, address, length, align) in
        [(1_u32, CODE_AT, address, length, 4096), (4, NOTE_AT, 0, note.len() as u64, 4)]
    {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for number in [at, address, address, length, length, align] {
            file.extend(number.to_le_bytes());
        }
    }
    file.extend(&note);
    file.resize(4096, 0);
    file.extend(code);
    file
}

/// The last count in what a guest wrote to its serial line; an error if it found a wrong page.
pub fn last_count(serial: &Path) -> Result<Option<u32>> {
    let text = match fs::read_to_string(serial) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("cannot read {}", serial.display()))?,
    };
    // A line that is not whole yet does not count; firmware may say something first.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut last = None;
    for line in whole.lines().map(str::trim) {
        if line == "X" {
            bail!("the guest found a wrong page after {last:x?}");
        }
        if line.len() == 8
            && let Ok(count) = u32::from_str_radix(line, 16)
        {
            if last.is_some_and(|last| count != last + 64) {
                bail!("the guest counted {count:#x} after {last:x?}");
            }
            last = Some(count);
        }
    }
    Ok(last)
}

/// Waits until a guest has counted beyond `after`, and returns how far.
pub fn wait_count(serial: &Path, after: u32, timeout: Duration) -> Result<u32> {
    let deadline = Instant::now() + timeout;
    loop {
        match last_count(serial)? {
            Some(count) if count > after => return Ok(count),
            last if Instant::now() > deadline => {
                bail!("the guest counts {last:x?}, and not beyond {after:#x}");
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_and_wrong_pages_are_errors() {
        let folder = std::env::temp_dir().join(format!("counter-{}", std::process::id()));
        let write = |text: &str| {
            fs::write(&folder, text).unwrap();
            let last = last_count(&folder);
            fs::remove_file(&folder).unwrap();
            last
        };
        assert_eq!(last_count(&folder).unwrap(), None);
        assert_eq!(write("SeaBIOS\n00000040\n0000008").unwrap(), Some(0x40));
        assert_eq!(write("00000040\n00000080\n").unwrap(), Some(0x80));
        assert!(write("00000040\n000000c0\n").is_err());
        assert!(write("00000040\nX\n").is_err());
    }
}
