"""Holds pages of memory and files whose content is known to the test.

A block of 4096 bytes is made of a number, its seed, and its place; seed 0 is
zeros. One JSON request a line, one JSON answer a line, one at a time. A request
that changes something has a number of its own; one that comes again, because
its answer was lost, is not done again.
"""
import hashlib
import json
import mmap
import os
import socket
import sys
import zlib

BLOCK = 4096


def block(seed, place):
    if seed == 0:
        return bytes(BLOCK)
    return hashlib.sha256(f"{seed}:{place}".encode()).digest() * (BLOCK // 32)


class Ledger:
    def __init__(self, blocks, directory):
        self.born = os.urandom(16).hex()
        self.memory = mmap.mmap(-1, blocks * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        self.done = 0

    def do_memory(self, q):
        for start, count in q["at"]:
            if q["seed"] == 0 and q["drop"]:
                # The kernel takes the pages away; they read as zeros.
                self.memory.madvise(mmap.MADV_DONTNEED, start * BLOCK, count * BLOCK)
                continue
            for i in range(start, start + count):
                self.memory[i * BLOCK:(i + 1) * BLOCK] = block(q["seed"], i)

    def do_file(self, q):
        fd = os.open(os.path.join(self.directory, q["name"]), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(fd, q["blocks"] * BLOCK)
            for start, count in q["at"]:
                for i in range(start, start + count):
                    os.pwrite(fd, block(q["seed"], i), i * BLOCK)
            if q["sync"]:
                os.fsync(fd)
        finally:
            os.close(fd)

    def do_remove(self, q):
        os.unlink(os.path.join(self.directory, q["name"]))

    def read_files(self, digest):
        """Reads from the disk: what the kernel has of a file is dropped first."""
        out = {}
        for name in sorted(os.listdir(self.directory)):
            fd = os.open(os.path.join(self.directory, name), os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                with os.fdopen(os.dup(fd), "rb") as f:
                    out[name] = digest(f.read())
            finally:
                os.close(fd)
        return out

    def answer(self, q):
        verb = q["do"]
        a = {"pid": os.getpid(), "born": self.born}
        if verb in ("memory", "file", "remove"):
            if q["number"] > self.done:
                getattr(self, "do_" + verb)(q)
                self.done = q["number"]
        elif verb == "sync":
            os.sync()
        elif verb == "check":
            a["memory"] = hashlib.md5(self.memory).hexdigest()
            a["files"] = self.read_files(lambda b: hashlib.md5(b).hexdigest())
        elif verb == "blocks":  # for the report of a failure
            parts = lambda b: [zlib.crc32(b[i:i + BLOCK]) for i in range(0, len(b), BLOCK)]
            a["memory_blocks"] = parts(self.memory)
            a["file_blocks"] = self.read_files(parts)
        else:
            raise ValueError("unknown request " + verb)
        a["done"] = self.done
        return a

    def serve(self, port, ready):
        s = socket.create_server(("127.0.0.1", port))
        open(ready, "w").close()
        while True:
            peer, _ = s.accept()
            with peer, peer.makefile("rw") as talk:
                try:
                    a = self.answer(json.loads(talk.readline()))
                except Exception as e:
                    a = {"error": f"{type(e).__name__}: {e}"}
                try:
                    print(json.dumps(a), file=talk, flush=True)
                except OSError:
                    pass  # who asked is gone, and asks again


Ledger(int(sys.argv[1]), sys.argv[2]).serve(int(sys.argv[3]), sys.argv[4])
