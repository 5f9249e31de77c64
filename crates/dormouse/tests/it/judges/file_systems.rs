//! ext4 and xfs of this machine's kernel on a live disk, without its nbd module: nbdfuse makes a
//! file of the export, and a loop device of the file. Discards go all the way through.
//!
//! Mounts and programs are in namespaces that end with the test, however it ends; the loop
//! devices are let go with the mounts.

use std::process::Command;

use super::{MIB, Trial};
use crate::fixture::errors;

/// xfs wants 300 MiB at least.
const FILE_SYSTEM_BYTES: usize = 320 * MIB;

/// `$d` is the command, `$uri` the disk, `$make` makes a file system on a file, `$check` looks for
/// faults in it.
const SCRIPT: &str = r#"
step() { echo "--- $*" >&2; }
dirty() { "$d" disk status box --json | tr , '\n' | sed -n 's/.*"dirty_bytes":\([0-9]*\).*/\1/p'; }
# Blocks of the disk that have a file's mark in them.
marked() {
    nbdcopy "$uri" - | /usr/bin/python3 -c 'import sys
read = lambda: sys.stdin.buffer.read(4096)
print(sum(b"dormouse marked" in block for block in iter(read, b"")))'
}
mkdir fuse mnt
nbdfuse --connections 2 fuse/disk "$uri" & fuse=$!
until [ -e fuse/disk ]; do kill -0 $fuse; sleep 0.05; done

step a tree of files, a third of them deleted, and a file under random changes
$make fuse/disk
mount -o loop fuse/disk mnt
mkdir mnt/tree
find /usr/lib/python3* /usr/share/doc -type f -size -64k -print0 | sort -z | head -z -n 2500 \
    | xargs -0 cp --parents -t mnt/tree
sync -f mnt
find mnt/tree -type f -print0 | sort -z | sed -zn 0~3p | xargs -0 rm
/usr/bin/python3 fsx.py mnt/fsx 1 400
fio --name=load --filename=mnt/load --size=12m --ioengine=psync --rw=randwrite --fsync=50 \
    --bsrange=512-64k --verify=crc32c --verify_fatal=1 --output=fio.log

step a commit in the midst of it
cp -r mnt/tree mnt/again & copying=$!
/usr/bin/python3 fsx.py mnt/fsx2 2 300 & changing=$!
"$d" disk commit box torn
wait $copying
wait $changing

step deleted and trimmed is free
rm -r mnt/again mnt/load
sync -f mnt
yes 'dormouse marked this' | head -c 33554432 > mnt/gone
sync -f mnt
filled=$(dirty)
[ "$(marked)" = 8192 ]
rm mnt/gone
# Neither file system trims what its journal may still need; a mount begins with an empty one.
umount mnt
mount -o loop fuse/disk mnt
fstrim mnt
trimmed=$(dirty)
echo "dirty: $filled bytes, $trimmed after fstrim" >&2
[ "$(marked)" = 0 ]
# Journals and mounts write, too.
[ $((filled - trimmed)) -ge 25165824 ]

step unmounted, checked and committed
(cd mnt && find . -type f -print0 | xargs -0 sha256sum) > sums
[ "$(wc -l < sums)" -gt 100 ]
umount mnt
$check fuse/disk
"$d" disk commit box clean
"$d" export clean:root clean
cmp fuse/disk clean
umount fuse
wait $fuse

step the exports
$check clean
mount -o loop,ro clean mnt
(cd mnt && sha256sum --quiet -c ../sums)
umount mnt
"$d" export torn:root torn
# The kernel goes through the journal of what was never unmounted.
mount -o loop torn mnt
umount mnt
$check torn
"#;

fn judge(make: &str, check: &str) {
    let trial = Trial::blank(FILE_SYSTEM_BYTES);
    trial.home.file("fsx.py", include_bytes!("fsx.py"));
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"])
        .args(["timeout", "-k", "1", "300", "sh", "-euc", SCRIPT])
        .env("d", env!("CARGO_BIN_EXE_dormouse"))
        .env("uri", trial.uri())
        .envs([("make", make), ("check", check)])
        .env_remove("DORMOUSE_STORE")
        .current_dir(trial.home.path("."))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{:?}: {}\n{said}", output.status, errors(&output));
    trial.home.ok(&["verify", "--deep"]);
}

#[test]
fn ext4_on_a_loop_device() {
    judge("mkfs.ext4 -q -F -b 4096", "e2fsck -fn");
}

#[test]
fn xfs_on_a_loop_device() {
    judge("mkfs.xfs -q", "xfs_repair -n");
}
