//! A working folder of a thread's own (`unshare(2)` with `CLONE_FS`), so that many names in one
//! folder are looked up from it and not by a path that leads there.
//!
//! System calls such as `llistxattr(2)` take no folder's descriptor. By way of `/proc/self/fd` each
//! costs three times as much as by its bare name.

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd;

use rustix::thread::UnshareFlags;

/// That the thread that made this has a working folder of its own; no other thread can have it.
#[derive(Debug)]
pub struct OwnFolder(PhantomData<*const ()>);

impl OwnFolder {
    /// Gives the calling thread a working folder of its own, for as long as it lives. Needs no
    /// rights, but sandboxes may forbid it.
    pub fn new() -> io::Result<OwnFolder> {
        // SAFETY: `CLONE_FS` parts root, working folder and umask from the other threads'; the
        // table of descriptors, which the function's rule is about, stays shared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
        Ok(OwnFolder(PhantomData))
    }

    /// Makes a folder the thread's working folder.
    pub fn enter(&self, folder: impl AsFd) -> io::Result<()> {
        Ok(rustix::process::fchdir(folder)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn other_threads_stay_where_they_are() {
        let before = std::env::current_dir().unwrap();
        let inside = std::thread::spawn(|| {
            let own = OwnFolder::new().unwrap();
            own.enter(File::open("/proc").unwrap()).unwrap();
            std::env::current_dir().unwrap()
        });
        assert_eq!(inside.join().unwrap(), std::path::Path::new("/proc"));
        assert_eq!(std::env::current_dir().unwrap(), before);
    }
}
