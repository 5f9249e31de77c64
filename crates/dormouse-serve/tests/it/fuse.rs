//! Files that the FUSE server shows, as programs use them.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek as _, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use dormouse_serve::device::DeviceErrorKind;
use dormouse_serve::fuse::{Mount, Tree, Unmounted, clear_stale};
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, fcntl_lock, flock, seek};
use rustix::io::Errno;

use crate::fuse_tree::{Mounted, OPTIONS, Place};
use crate::memory::Memory;

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap()
}

fn read_write(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn an_image_is_a_regular_file_with_its_size_holes_and_bytes() {
    let mounted = Mounted::new();
    let bytes = Memory::pattern(300 * 4096 + 100);
    let (path, _) = mounted.image("memory", bytes.clone());
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.is_file());
    assert_eq!(metadata.len(), bytes.len() as u64);
    assert_eq!(metadata.blocks(), (bytes.len() as u64 / 2).div_ceil(512));
    assert_eq!(metadata.mode() & 0o7777, 0o644);
    assert!(fs::read(&path).unwrap() == bytes);
    let mut file = File::open(&path).unwrap();
    let mut part = vec![0; 10_000];
    file.read_exact_at(&mut part, 777).unwrap();
    assert_eq!(part, bytes[777..10_777]);
    file.seek(std::io::SeekFrom::End(-10)).unwrap();
    assert_eq!(file.read(&mut part).unwrap(), 10);
    // Holes are blocks 16..32 of every 64.
    let block = 4096;
    for (from, data, hole) in [
        (0, Ok(0), Ok(16)),
        (15, Ok(15), Ok(16)),
        (16, Ok(32), Ok(16)),
        (40, Ok(40), Ok(80)),
        (300, Ok(300), Err(())),
    ] {
        assert_eq!(
            seek(&file, SeekFrom::Data(from * block)),
            data.map(|at: u64| at * block).map_err(|()| Errno::NXIO)
        );
        let hole = hole.map_or(bytes.len() as u64, |at: u64| at * block);
        assert_eq!(seek(&file, SeekFrom::Hole(from * block)), Ok(hole));
    }
    assert_eq!(seek(&file, SeekFrom::Data(bytes.len() as u64)), Err(Errno::NXIO));
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(mounted.place.path()), ["disks", "images", "memories"]);
    assert_eq!(names(&mounted.place.path().join("images")), ["memory"]);
    assert_eq!(
        metadata.ino(),
        fs::read_dir(path.parent().unwrap())
            .unwrap()
            .map(|entry| { std::os::unix::fs::DirEntryExt::ino(&entry.unwrap()) })
            .next()
            .unwrap()
    );
}

/// QEMU before 8.2 opens a memory file for writing also when it maps it privately, and punches holes
/// into it when its balloon reports free pages.
#[test]
fn an_image_may_be_opened_for_writing_and_is_never_changed() {
    let mounted = Mounted::new();
    let bytes = Memory::pattern(64 * 4096);
    let (path, _) = mounted.image("memory", bytes.clone());
    let reader = File::open(&path).unwrap();
    let file = read_write(&path);
    assert_eq!(errno(&file.write_at(b"x", 0).unwrap_err()), Errno::ROFS);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for mode in [punch, FallocateFlags::ZERO_RANGE, FallocateFlags::empty()] {
        assert_eq!(fallocate(&file, mode, 0, 4096), Err(Errno::ROFS));
    }
    assert_eq!(errno(&file.set_len(0).unwrap_err()), Errno::ROFS);
    let truncated = OpenOptions::new().write(true).truncate(true).open(&path);
    assert_eq!(errno(&truncated.unwrap_err()), Errno::ROFS);
    // A shared mapping could change the pages that every fork sees.
    let shared = python(
        "import mmap,os,sys\nf=os.open(sys.argv[1],os.O_RDWR)\n\
         try: mmap.mmap(f,4096,mmap.MAP_SHARED)\nexcept OSError as e: print(e.errno)",
        &path,
    );
    assert_eq!(shared.trim(), Errno::NODEV.raw_os_error().to_string());
    let private = python(
        "import mmap,os,sys\nf=os.open(sys.argv[1],os.O_RDWR)\n\
         m=mmap.mmap(f,0,mmap.MAP_PRIVATE)\nm[:9]=b'my memory'\nprint(m[:9], m[4096]!=0)",
        &path,
    );
    assert_eq!(private.trim(), "b'my memory' True");
    assert!(fs::read(&path).unwrap() == bytes);
    let mut again = vec![0; bytes.len()];
    reader.read_exact_at(&mut again, 0).unwrap();
    assert!(again == bytes);
    assert_eq!(errno(&fs::remove_file(&path).unwrap_err()), Errno::ROFS);
    assert_eq!(errno(&File::create(path.with_file_name("new")).unwrap_err()), Errno::ROFS);
    assert_eq!(errno(&fs::create_dir(path.with_file_name("new")).unwrap_err()), Errno::ROFS);
}

fn python(script: &str, path: &Path) -> String {
    let output =
        std::process::Command::new("python3").args(["-c", script]).arg(path).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn bytes_that_cannot_be_read_are_an_error_and_the_rest_is_served() {
    let mounted = Mounted::new();
    let bytes = Memory::pattern(1024 * 4096);
    let (path, image) = mounted.image("memory", bytes.clone());
    image.failures.lock().unwrap().insert(0, DeviceErrorKind::Io);
    let file = File::open(&path).unwrap();
    let mut block = vec![0; 4096];
    assert_eq!(errno(&file.read_exact_at(&mut block, 0).unwrap_err()), Errno::IO);
    file.read_exact_at(&mut block, 900 * 4096).unwrap();
    assert_eq!(block, bytes[900 * 4096..901 * 4096]);
    image.failures.lock().unwrap().clear();
    file.read_exact_at(&mut block, 0).unwrap();
    assert_eq!(block, bytes[..4096], "an error is not remembered");
}

#[test]
fn a_disk_is_written_punched_zeroed_and_flushed_at_once() {
    let mounted = Mounted::new();
    let mut expected = Memory::pattern(512 * 4096);
    let (path, disk) = mounted.disk("root", expected.clone());
    let file = read_write(&path);
    file.write_all_at(&[7; 5000], 3000).unwrap();
    expected[3000..8000].fill(7);
    assert!(disk.contents() == expected, "nothing waits in a page cache");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 100_000, 8192).unwrap();
    expected[100_000..108_192].fill(0);
    fallocate(&file, FallocateFlags::ZERO_RANGE, 200_000, 70_000).unwrap();
    expected[200_000..270_000].fill(0);
    assert!(disk.contents() == expected);
    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 4096), Err(Errno::OPNOTSUPP));
    assert_eq!(seek(&file, SeekFrom::Hole(51 * 4096)).unwrap(), 51 * 4096);
    let flushes = disk.flushes.load(Ordering::SeqCst);
    file.sync_data().unwrap();
    assert_eq!(disk.flushes.load(Ordering::SeqCst), flushes + 1);
    // What goes over the end is as on a block device.
    let end = expected.len() as u64;
    assert_eq!(file.write_at(&[1; 100], end - 10).unwrap(), 10);
    expected[512 * 4096 - 10..].fill(1);
    assert_eq!(errno(&file.write_at(&[1; 100], end).unwrap_err()), Errno::NOSPC);
    assert_eq!(errno(&file.set_len(end + 1).unwrap_err()), Errno::PERM);
    file.set_len(end).unwrap();
    let truncated = OpenOptions::new().write(true).truncate(true).open(&path);
    assert_eq!(errno(&truncated.unwrap_err()), Errno::PERM);
    // A large write comes in parts, with O_DIRECT or without.
    let direct = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
        .open(&path)
        .unwrap();
    let part = Memory::pattern(257 * 4096);
    direct.write_all_at(&part, 8192).unwrap();
    expected[8192..][..part.len()].copy_from_slice(&part);
    assert!(disk.contents() == expected);
    assert!(fs::read(&path).unwrap() == expected);
    disk.failures.lock().unwrap().insert(0, DeviceErrorKind::NoSpace);
    assert_eq!(errno(&file.write_at(b"x", 0).unwrap_err()), Errno::NOSPC);
    disk.failures.lock().unwrap().insert(u64::MAX - 1, DeviceErrorKind::Io);
    assert_eq!(errno(&file.sync_all().unwrap_err()), Errno::IO);
}

/// Two VMs on one writable disk are kept apart by their locks, as on any file system: OFD locks
/// (QEMU, Cloud Hypervisor) belong to the open file, POSIX locks to the process, flock to both.
#[test]
fn locks_conflict_as_on_other_file_systems() {
    let mounted = Mounted::new();
    let (path, _) = mounted.disk("root", vec![1; 8192]);
    let script = "import fcntl,os,struct,sys\n\
        def lock(f, cmd, kind): fcntl.fcntl(f, cmd, struct.pack('hhqqi', kind, 0, 100, 1, 0))\n\
        F_OFD_SETLK = 37\n\
        a = os.open(sys.argv[1], os.O_RDWR)\nb = os.open(sys.argv[1], os.O_RDWR)\n\
        lock(a, F_OFD_SETLK, fcntl.F_RDLCK)\nlock(b, F_OFD_SETLK, fcntl.F_RDLCK)\n\
        try: lock(b, F_OFD_SETLK, fcntl.F_WRLCK); print('both')\n\
        except BlockingIOError: print('one')\n\
        lock(a, F_OFD_SETLK, fcntl.F_UNLCK)\nlock(b, F_OFD_SETLK, fcntl.F_WRLCK)\n\
        try: lock(a, F_OFD_SETLK, fcntl.F_WRLCK); print('both')\n\
        except BlockingIOError: print('one')\n\
        os.close(b)\nlock(a, F_OFD_SETLK, fcntl.F_WRLCK)\nprint('after close')";
    let elsewhere = mounted.place.beside("file");
    fs::write(&elsewhere, [1; 8192]).unwrap();
    assert_eq!(python(script, &elsewhere), "one\none\nafter close\n");
    assert_eq!(python(script, &path), "one\none\nafter close\n");
    let (a, b) = (read_write(&path), read_write(&path));
    flock(&a, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert_eq!(flock(&b, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
    fcntl_lock(&a, FlockOperation::NonBlockingLockExclusive).unwrap();
    let other = "import fcntl,sys\nf=open(sys.argv[1],'r+b')\n\
        try: fcntl.lockf(f, fcntl.LOCK_EX|fcntl.LOCK_NB); print('both')\n\
        except OSError: print('one')";
    assert_eq!(python(other, &path), "one\n");
}

/// A VMM that owns its memory file maps it shared; what it changed is known when it says so.
#[test]
fn a_memory_is_mapped_shared_and_written_back() {
    let mounted = Mounted::new();
    let mut expected = Memory::pattern(256 * 4096);
    let (path, memory) = mounted.memory("memory", expected.clone());
    let script = "import mmap,os,sys\nf=os.open(sys.argv[1],os.O_RDWR)\n\
        m=mmap.mmap(f,0)\nm[5000:5005]=b'guest'\nm[900000:900005]=b'wrote'\n\
        os.pwrite(f,b'file',20000)\nassert m[20000:20004]==b'file'\nos.fsync(f)\n\
        m[4096*200]=9\nprint('done')";
    assert_eq!(python(script, &path), "done\n");
    expected[5000..5005].copy_from_slice(b"guest");
    expected[900_000..900_005].copy_from_slice(b"wrote");
    expected[20_000..20_004].copy_from_slice(b"file");
    expected[4096 * 200] = 9;
    assert!(memory.contents() == expected, "the last close brings the rest");
    assert!(memory.flushes.load(Ordering::SeqCst) > 0);
}

/// Ten readers of one image share its page cache, so its bytes are read from the device once.
#[test]
fn what_comes_and_goes_is_seen_at_once_and_an_open_file_stays() {
    let mounted = Mounted::new();
    let folder = mounted.place.path().join("images");
    assert!(!folder.join("a").exists());
    let (path, _) = mounted.image("a", vec![5; 8192]);
    assert!(path.exists(), "its absence was not remembered");
    let files: Vec<File> = (0..10).map(|_| File::open(&path).unwrap()).collect();
    assert_eq!(mounted.files.opens.load(Ordering::SeqCst), 1, "all opens share one");
    let mut byte = [0];
    for file in &files {
        file.read_exact_at(&mut byte, 4096).unwrap();
        assert_eq!(byte, [5]);
    }
    drop(files);
    let file = File::open(&path).unwrap();
    mounted.files.images.lock().unwrap().clear();
    assert!(fs::read_dir(&folder).unwrap().next().is_none());
    file.read_exact_at(&mut byte, 8191).unwrap();
    assert_eq!(byte, [5]);
    assert_eq!(file.metadata().unwrap().len(), 8192);
}

#[test]
fn a_mount_in_use_goes_when_its_last_file_is_closed() {
    let mut mounted = Mounted::new();
    let (path, _) = mounted.image("memory", Memory::pattern(1 << 20));
    let mut file = File::open(&path).unwrap();
    let mount = mounted.mount.take().unwrap();
    assert_eq!(mount.unmount().unwrap(), Unmounted::Detached);
    assert!(!path.exists());
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert!(bytes == Memory::pattern(1 << 20));
    drop(file);
    mount.wait().unwrap();
    assert_eq!(mount.unmount().unwrap(), Unmounted::Clean);
}

/// The last close tells the server, and takes the connection from under the thread that reads it.
#[test]
fn the_last_close_is_the_end_whatever_is_being_told() {
    for _ in 0..50 {
        let mut mounted = Mounted::new();
        let (path, _) = mounted.image("memory", Memory::pattern(1 << 20));
        let file = File::open(&path).unwrap();
        let mount = mounted.mount.take().unwrap();
        assert_eq!(mount.unmount().unwrap(), Unmounted::Detached);
        drop(file);
        mount.wait().unwrap();
    }
}

#[test]
fn mounting_twice_is_refused_and_a_place_is_used_again() {
    let mut mounted = Mounted::new();
    let tree = || std::sync::Arc::clone(&mounted.files) as std::sync::Arc<dyn Tree>;
    let place = mounted.place.path();
    let twice = Mount::new(tree(), place, &OPTIONS).unwrap_err();
    assert_eq!(twice.kind(), dormouse_serve::error::ErrorKind::InUse);
    assert!(!clear_stale(place).unwrap(), "a mount that lives is left alone");
    let mount = Mount::new(tree(), &Place::new().path().join("none"), &OPTIONS);
    assert_eq!(mount.unwrap_err().kind(), dormouse_serve::error::ErrorKind::NotFound);
    let (path, _) = mounted.image("a", vec![1; 4096]);
    let mount = mounted.mount.take().unwrap();
    assert_eq!(mount.unmount().unwrap(), Unmounted::Clean);
    mount.wait().unwrap();
    let tree = std::sync::Arc::clone(&mounted.files) as std::sync::Arc<dyn Tree>;
    mounted.mount = Some(Mount::new(tree, place, &OPTIONS).unwrap());
    assert_eq!(fs::read(path).unwrap(), [1; 4096]);
}

/// All that tools ask for beside bytes is answered, or refused for one request and not for ever.
#[test]
fn odd_requests_are_refused_one_by_one() {
    let mounted = Mounted::new();
    let (path, _) = mounted.disk("root", vec![1; 1 << 20]);
    let file = read_write(&path);
    // Collapsing is what the kernel does not even ask for; the next request works all the same.
    let odd = FallocateFlags::COLLAPSE_RANGE;
    assert_eq!(fallocate(&file, odd, 0, 4096), Err(Errno::OPNOTSUPP));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 0, 4096).unwrap();
    fallocate(&file, punch, (1 << 20) - 4096, 1 << 30).unwrap();
    let mut block = [1; 4096];
    file.read_exact_at(&mut block, (1 << 20) - 4096).unwrap();
    assert_eq!(block, [0; 4096]);
    let long = CString::new("x".repeat(255)).unwrap();
    assert!(!path.with_file_name(long.to_str().unwrap()).exists());
    let mut copied = File::create(mounted.place.beside("copy")).unwrap();
    std::io::copy(&mut File::open(&path).unwrap(), &mut copied).unwrap();
    copied.flush().unwrap();
    assert_eq!(copied.metadata().unwrap().len(), 1 << 20);
    assert!(file.as_raw_fd() > 2);
    assert_eq!(rustix::fs::statvfs(&path).unwrap().f_bsize, 4096);
}
