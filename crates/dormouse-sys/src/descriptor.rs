//! Descriptors that somebody else owns, pointed at another file.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{DupFlags, dup3};

/// Makes `target` refer to the file of `with` (`dup3(2)`). Whoever owns `target` goes on to own it,
/// and finds the other file there; what it referred to before is closed.
///
/// The owner must be ready for that: this is for handing a file to code that can only be given one
/// when it is made.
pub fn replace(target: BorrowedFd<'_>, with: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open for the time of the borrow, and is not closed here: its owner
    // keeps it, which is why the second owner is never dropped.
    let mut owned = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(target.as_raw_fd()) });
    Ok(dup3(with, &mut owned, DupFlags::CLOEXEC)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_owner_finds_the_other_file() {
        let mut mine = File::open("/dev/null").unwrap();
        let other = File::open("/dev/zero").unwrap();
        replace(mine.as_fd(), other.as_fd()).unwrap();
        drop(other);
        let mut byte = [7];
        mine.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [0]);
    }
}
