"""What no ordinary client sends, to `box` and `vm@1:root` behind one socket.

Changes go to the raw file `model`, too. The first argument is the socket, the second the size.
"""

import errno
import nbd
import socket
import struct
import sys

PATH, SIZE = sys.argv[1], int(sys.argv[2])
model = open("model", "r+b")
ALLOCATION, DIRTY = "base:allocation", "dormouse:dirty"


def expect(name, call):
    """The call must fail with this error, or with any if there is no name."""
    try:
        result = call()
    except nbd.Error as error:
        assert name is None or error.errno == name, (error.errno, name)
    else:
        raise AssertionError(f"no error but {result!r}")


def remember(data, offset):
    model.seek(offset)
    model.write(data)


def handle(export="box", opt_mode=False, contexts=(), structured=True):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.set_export_name(export)
    h.set_opt_mode(opt_mode)
    for context in contexts:
        h.add_meta_context(context)
    # Requests that make no sense are sent all the same.
    h.set_strict_mode(0)
    h.connect_unix(PATH)
    return h


def negotiation():
    h = handle(opt_mode=True)
    names = []
    h.opt_list(lambda name, description: names.append(name))
    assert names == ["box", "vm@1:root"], names
    h.set_export_name("nothing")
    expect("ENOENT", h.opt_info)
    expect("ENOENT", h.opt_go)
    h.set_export_name("x" * 4096)
    expect(None, h.opt_info)
    h.set_export_name("vm@1:root")
    h.opt_info()
    assert h.is_read_only() and not h.can_trim()
    h.set_export_name("box")
    h.opt_info()
    assert not h.is_read_only() and h.get_size() == SIZE
    contexts = []
    h.opt_list_meta_context(lambda name: contexts.append(name))
    assert {ALLOCATION, DIRTY} <= set(contexts), contexts
    h.add_meta_context("base:")
    contexts.clear()
    h.opt_list_meta_context(lambda name: contexts.append(name))
    assert contexts == [ALLOCATION], contexts
    h.clear_meta_contexts()
    h.add_meta_context("nobody:nothing")
    h.add_meta_context(ALLOCATION)
    h.opt_go()
    assert h.can_meta_context(ALLOCATION) and not h.can_meta_context("nobody:nothing")
    h.shutdown()

    h = handle(opt_mode=True)
    h.opt_abort()
    assert h.aio_is_closed()


def transmission():
    for structured in (False, True):
        h = handle(structured=structured)
        assert h.get_structured_replies_negotiated() == structured
        # Nothing at all: whatever the answer, the connection lives.
        for call in (
            lambda: h.pread(0, 0),
            lambda: h.pwrite(b"", 4096),
            lambda: h.trim(0, 0),
            lambda: h.zero(0, SIZE),
            lambda: h.cache(0, 0),
        ):
            try:
                call()
            except nbd.Error:
                pass
        assert h.aio_is_ready()
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (1 << 62, 512), ((1 << 64) - 1, 2)):
            expect("EINVAL", lambda: h.pread(length, offset))
            expect("ENOSPC", lambda: h.pwrite(b"x" * length, offset))
            expect("EINVAL", lambda: h.trim(length, offset))
            expect("ENOSPC", lambda: h.zero(length, offset))
            expect("EINVAL", lambda: h.cache(length, offset))
        # More than a request may have.
        expect(None, lambda: h.pread(32 * 1024 * 1024 + 1, 0))
        assert h.aio_is_ready()
        h.shutdown()

    h = handle()
    data = bytes(range(256)) * 1000
    h.pwrite(data, 12345, nbd.CMD_FLAG_FUA)
    remember(data, 12345)
    assert bytes(h.pread(len(data), 12345)) == data
    h.zero(70000, 20001, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
    remember(bytes(70000), 20001)
    h.zero(9000, 100001, nbd.CMD_FLAG_NO_HOLE)
    remember(bytes(9000), 100001)
    expect("ENOTSUP", lambda: h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO))
    h.trim(SIZE - 5000, 5000)
    remember(bytes(SIZE - 5000), 5000)
    h.pwrite(b"end", SIZE - 3)
    remember(b"end", SIZE - 3)
    # Flags that have no meaning there.
    expect("EINVAL", lambda: h.flush(nbd.CMD_FLAG_NO_HOLE))
    expect("EINVAL", lambda: h.trim(512, 0, nbd.CMD_FLAG_REQ_ONE))
    expect("EINVAL", lambda: h.block_status(512, 0, lambda *_: 0))
    h.shutdown()
    expect(None, lambda: h.pread(512, 0))
    expect(None, h.flush)

    h = handle("vm@1:root")
    expect("EPERM", lambda: h.pwrite(b"x", 0))
    expect("EPERM", lambda: h.zero(512, 0))
    expect("EPERM", lambda: h.trim(512, 0))
    assert len(h.pread(1 << 20, 0)) == 1 << 20
    h.shutdown()


def statuses():
    h = handle(contexts=[ALLOCATION, DIRTY])
    seen = {}

    def extents(context, offset, entries, error):
        assert context not in seen and error.value == 0
        seen[context] = list(zip(entries[::2], entries[1::2]))

    h.block_status(SIZE, 0, extents)
    assert set(seen) == {ALLOCATION, DIRTY}, seen
    for context, runs in seen.items():
        assert sum(length for length, _ in runs) == SIZE, (context, runs)
        flags = [flag for _, flag in runs]
        assert all(a != b for a, b in zip(flags, flags[1:])), (context, runs)
    for offset, length in ((0, 1), (4095, 2), (777, 1 << 20), (SIZE - 1, 1), (0, SIZE)):
        seen.clear()
        h.block_status(length, offset, extents, nbd.CMD_FLAG_REQ_ONE)
        for context, runs in seen.items():
            assert len(runs) == 1 and 0 < runs[0][0] <= length, (context, runs)
        assert set(seen) == {ALLOCATION, DIRTY}, seen
    expect("EINVAL", lambda: h.block_status(2, SIZE - 1, extents))
    h.shutdown()


def pipelines():
    """Requests are in flight when the client says that it goes: they are done, and no later one."""
    h = handle()
    for index in range(64):
        data = bytes([index + 1]) * 8192
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), (1 << 20) + index * 8192)
        remember(data, (1 << 20) + index * 8192)
    h.aio_disconnect()
    while not h.aio_is_closed():
        h.poll(-1)
    h = handle()
    expected = b"".join(bytes([index + 1]) * 8192 for index in range(64))
    assert bytes(h.pread(len(expected), 1 << 20)) == expected
    h.shutdown()


class Raw:
    """A connection that says exactly what it is told to."""

    ACK, UNSUP, INVALID = 1, (1 << 31) + 1, (1 << 31) + 3

    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(PATH)
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.socket.sendall(struct.pack(">I", 3))

    def take(self, count):
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part, "the server hung up"
            data += part
        return data

    def option(self, number, data=b""):
        """All replies to an option: kinds and data."""
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)
        replies = []
        while not replies or not (replies[-1][0] == self.ACK or replies[-1][0] >> 31):
            magic, option, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, option) == (0x3E889045565A9, number)
            replies.append((kind, self.take(length)))
        return replies

    def verdict(self, number, data=b""):
        return self.option(number, data)[-1][0]

    def request(self, kind, cookie, offset=0, length=0, data=b"", flags=0):
        header = struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length)
        self.socket.sendall(header + data)

    def simple(self):
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert magic == 0x67446698, hex(magic)
        return error, cookie

    def ended(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def text(string):
    return struct.pack(">I", len(string)) + string.encode()


def contexts(export, *names):
    return text(export) + struct.pack(">I", len(names)) + b"".join(map(text, names))


GO, STRUCTURED, LIST_META, SET_META, EXTENDED = 7, 8, 9, 10, 11


def options_out_of_order():
    raw = Raw()
    assert raw.verdict(SET_META, contexts("box", ALLOCATION)) >> 31, "contexts come too early"
    assert raw.verdict(4711, b"?" * 3000) == Raw.UNSUP
    assert raw.verdict(STRUCTURED, b"x") == Raw.INVALID
    assert raw.verdict(STRUCTURED) == Raw.ACK
    assert raw.verdict(EXTENDED) == Raw.ACK
    assert raw.verdict(STRUCTURED) >> 31, "extended headers are more than structured replies"
    # The second choice counts, and it is for one export.
    assert len(raw.option(SET_META, contexts("box", ALLOCATION, DIRTY))) == 3
    assert len(raw.option(SET_META, contexts("box", DIRTY))) == 2
    assert raw.verdict(GO, text("nothing") + b"\0\0") >> 31
    assert raw.verdict(GO, text("box") + b"\0\0") == Raw.ACK
    status = struct.pack(">IHHQQQ", 0x21E41C71, 0, 7, 5, 0, SIZE)
    raw.socket.sendall(status)
    magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", raw.take(32))
    assert (magic, flags, kind, cookie, offset) == (0x6E8A278C, 1, 6, 5, 0)
    raw.take(length)

    # One of two contexts, named in a payload with the length.
    raw = Raw()
    assert raw.verdict(EXTENDED) == Raw.ACK
    chosen = raw.option(SET_META, contexts("box", ALLOCATION, DIRTY))
    ids = [struct.unpack(">I", data[:4])[0] for _, data in chosen[:-1]]
    assert raw.verdict(GO, text("box") + b"\0\0") == Raw.ACK
    for id in ids:
        payload = struct.pack(">QI", SIZE, id)
        status = struct.pack(">IHHQQQ", 0x21E41C71, 32, 7, 5, 0, len(payload)) + payload
        raw.socket.sendall(status)
        magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", raw.take(32))
        assert (magic, flags, kind, cookie) == (0x6E8A278C, 1, 6, 5)
        told = raw.take(length)
        assert struct.unpack(">I", told[:4])[0] == id
        assert sum(struct.unpack(f">{(length - 8) // 8}Q", told[8:])[::2]) == SIZE

    raw = Raw()
    assert raw.verdict(STRUCTURED) == Raw.ACK
    assert len(raw.option(SET_META, contexts("vm@1:root", ALLOCATION))) == 2
    assert raw.verdict(GO, text("box") + b"\0\0") == Raw.ACK
    raw.request(7, 9, 0, 4096)
    magic, flags, kind, cookie, length = struct.unpack(">IHHQI", raw.take(20))
    assert (magic, kind, cookie) == (0x668E33EF, 0x8001, 9), "contexts of another export"
    assert struct.unpack(">I", raw.take(length)[:4])[0] == errno.EINVAL


def after_the_end():
    raw = Raw()
    assert raw.verdict(GO, text("box") + b"\0\0") == Raw.ACK
    data = b"before" * 512
    before = struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 3 << 20, len(data)) + data
    leave = struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0)
    after = struct.pack(">IHHQQI", 0x25609513, 0, 1, 3, 3 << 20, len(data)) + b"after." * 512
    raw.socket.sendall(before + leave + after)
    assert raw.simple() == (0, 1)
    assert raw.ended(), "an answer to nobody"
    remember(data, 3 << 20)

    raw = Raw()
    assert raw.verdict(GO, text("box") + b"\0\0") == Raw.ACK
    # Half a write is no write.
    raw.request(1, 1, 4 << 20, 8192, b"x" * 4096)
    raw.socket.shutdown(socket.SHUT_WR)
    assert raw.ended()
    h = handle()
    assert bytes(h.pread(len(data), 3 << 20)) == data
    h.shutdown()


for part in (
    negotiation,
    transmission,
    statuses,
    pipelines,
    options_out_of_order,
    after_the_end,
):
    part()
model.close()
