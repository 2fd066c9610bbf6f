"""A file of 1 GiB, up and down."""

from e2b import Sandbox

from checks import check, main

SIZE = 1 << 30
box = Sandbox.create(timeout=900)


class Zeros:
    left = SIZE

    def read(self, n=-1):
        n = min(self.left, 1 << 20 if n < 0 else n)
        self.left -= n
        return b"\0" * n


def agents_peak():
    """MiB that the guest agent, the parent of commands, has had at most."""
    return int(box.commands.run("awk '/VmHWM/ {print $2}' /proc/$PPID/status").stdout) >> 10


@check
def a_gibibyte_streams_through():
    before = agents_peak()
    box.files.write("/home/user/large", Zeros())
    assert box.files.get_info("large").size == SIZE
    got = 0
    for chunk in box.files.read("large", format="stream"):
        got += len(chunk)
    assert got == SIZE, got
    grown = agents_peak() - before
    print(f"the guest agent's peak grew by {grown} MiB")
    assert grown < 64, grown
    box.kill()


main()
