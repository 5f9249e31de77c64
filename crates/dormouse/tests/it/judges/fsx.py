"""Random writes, holes, cuts and mapped writes to one file, against the same in memory.

The first argument is the file, the second a seed, the third how many steps.
"""

import ctypes
import mmap
import os
import random
import sys

PATH, STEPS = sys.argv[1], int(sys.argv[3])
MAX = 6 << 20
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
libc = ctypes.CDLL(None, use_errno=True)
chance = random.Random(int(sys.argv[2]))
fd = os.open(PATH, os.O_RDWR | os.O_CREAT, 0o600)
model = bytearray()


def fallocate(mode, offset, length):
    arguments = ctypes.c_int(mode), ctypes.c_long(offset), ctypes.c_long(length)
    if libc.fallocate(fd, *arguments) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def check():
    # From the disk and not from what the kernel still has.
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    got = os.pread(fd, MAX + 1, 0)
    assert len(got) == len(model), (len(got), len(model))
    assert got == model, next(at for at in range(len(got)) if got[at] != model[at])


def place():
    offset = chance.randrange(max(len(model), 1))
    length = chance.choice((1, 700, 4096, 70000, 500000))
    return offset, min(chance.randrange(length) + 1, MAX - offset)


for step in range(STEPS):
    offset, length = place()
    kind = chance.randrange(10)
    if kind <= 4:
        offset = chance.choice((offset, len(model) + 5000, offset & ~4095)) % MAX
        data = chance.choice((os.urandom(length), bytes(length)))[: MAX - offset]
        os.pwrite(fd, data, offset)
        model.extend(bytes(max(0, offset + len(data) - len(model))))
        model[offset : offset + len(data)] = data
    elif kind <= 6 and model:
        mode = chance.choice((PUNCH_HOLE, ZERO_RANGE)) | KEEP_SIZE
        fallocate(mode, offset, length)
        end = min(offset + length, len(model))
        model[offset:end] = bytes(end - offset)
    elif kind == 7:
        length = chance.choice((offset, len(model) + length)) % MAX
        os.truncate(fd, length)
        del model[length:]
        model.extend(bytes(length - len(model)))
    elif kind == 8 and model:
        with mmap.mmap(fd, len(model)) as mapped:
            end = min(offset + length, len(model))
            data = os.urandom(end - offset)
            mapped[offset:end] = data
            model[offset:end] = data
    elif chance.randrange(4) == 0:
        check()
check()
