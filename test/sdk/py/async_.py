"""Every documented method of AsyncSandbox, commands, files and pty."""

import asyncio
import os

# The SDK takes 200 connections to one origin at most, and all sandboxes are one
# here: streams on all of them would keep everything else waiting.
os.environ["E2B_MAX_CONNECTIONS"] = "450"

import e2b
from e2b import AsyncSandbox, CommandExitException, FilesystemEventType, NotFoundException, TimeoutException
from e2b.exceptions import AuthenticationException, InvalidArgumentException

from e2b.sandbox_async.commands.command import Commands
from e2b.sandbox_async.commands.command_handle import AsyncCommandHandle
from e2b.sandbox_async.commands.pty import Pty
from e2b.sandbox_async.filesystem.filesystem import Filesystem
from e2b.sandbox_async.filesystem.watch_handle import AsyncWatchHandle
from e2b.sandbox_async.git import Git

import checks
from checks import araises, check, main

unused = checks.every_method_of(
    AsyncSandbox, Commands, AsyncCommandHandle, Filesystem, Pty, AsyncWatchHandle, Git,
    # There is no MCP gateway; a git server that wants a password is another one's.
    but=["AsyncSandbox.get_mcp_url", "AsyncSandbox.get_mcp_token", "Git.dangerously_authenticate"],
)
box = checks._loop.run_until_complete(AsyncSandbox.create(timeout=600, metadata={"async": "1"}, envs={"COLOR": "green"}))


@check
async def info_and_list():
    assert (await box.get_info()).metadata == {"async": "1"}
    p = AsyncSandbox.list(query=e2b.SandboxQuery(metadata={"async": "1"}))
    assert [s.sandbox_id for s in await p.next_items()] == [box.sandbox_id] and not p.has_next
    assert await box.is_running()


@check
async def commands():
    r = await box.commands.run("echo out; echo err >&2; echo $COLOR")
    assert (r.stdout, r.stderr, r.exit_code) == ("out\ngreen\n", "err\n", 0), r
    e = await araises(CommandExitException, box.commands.run("exit 3"))
    assert e.exit_code == 3
    await araises(TimeoutException, box.commands.run("sleep 60", timeout=1))
    await araises(AuthenticationException, box.commands.run("true", user="x"))
    await araises(InvalidArgumentException, box.commands.run("true", cwd="/no/such"))
    h = await box.commands.run("cat", background=True, stdin=True)
    assert h.pid in [p.pid for p in await box.commands.list()]
    await box.commands.send_stdin(h.pid, "one\n")
    await box.commands.close_stdin(h.pid)
    assert (await h.wait()).stdout == "one\n"
    k = await box.commands.run("sleep 1000", background=True)
    await k.disconnect()
    again = await box.commands.connect(k.pid)
    assert await box.commands.kill(k.pid) is True
    await araises(CommandExitException, again.wait())
    assert await box.commands.kill(999999) is False


@check
async def two_hundred_new_processes_at_once():
    # An emulated guest starts few in a second on a busy machine: they wait for
    # their turn, and the SDK's minute may not do.
    long = {"timeout": 0, "request_timeout": 500}
    hs = await asyncio.gather(*(box.commands.run("sleep 1000", background=True, **long) for _ in range(200)))
    assert await box.files.exists("/etc/hostname", request_timeout=500)
    listed = [p.pid for p in await box.commands.list(request_timeout=500)]
    assert len({h.pid for h in hs}) == 200 and {h.pid for h in hs} <= set(listed)
    assert (await box.commands.run("pkill -x sleep", **long)).exit_code == 0
    await asyncio.gather(*(araises(CommandExitException, c.wait()) for c in hs))


@check
async def a_full_pool_of_streams():
    h = await box.commands.run("sleep 1000", background=True, timeout=0)
    hs = await asyncio.gather(*(box.commands.connect(h.pid, timeout=0) for _ in range(198)))
    assert await box.files.exists("/etc/hostname"), "the two hundredth"
    assert await h.kill() is True
    await asyncio.gather(*(araises(CommandExitException, c.wait()) for c in [h, *hs]))


@check
async def files():
    data = os.urandom(1 << 20)
    assert (await box.files.write("d/a", data)).path == "/home/user/d/a"
    assert bytes(await box.files.read("d/a", format="bytes")) == data
    got = b"".join([c async for c in await box.files.read("d/a", format="stream")])
    assert got == data
    await box.files.write_files([{"path": "m/1", "data": "1"}, {"path": "m/2", "data": b"2"}])
    assert sorted(e.name for e in await box.files.list("m")) == ["1", "2"]
    assert await box.files.make_dir("x") is True and await box.files.make_dir("x") is False
    assert (await box.files.rename("m/1", "m/3")).name == "3"
    assert await box.files.exists("m/3") and not await box.files.exists("m/1")
    await box.files.remove("m/3")
    assert (await box.files.get_info("m/2")).size == 1
    await araises(NotFoundException, box.files.read("nope"))
    await araises(InvalidArgumentException, box.files.read("/tmp"))


@check
async def files_watch():
    await box.files.make_dir("w")
    seen = asyncio.Event()

    def on_event(ev):
        if ev.name == "f" and ev.type == FilesystemEventType.CREATE:
            seen.set()

    h = await box.files.watch_dir("w", on_event, recursive=True)
    await box.files.write("w/f", "1")
    await asyncio.wait_for(seen.wait(), 60)
    await h.stop()


@check
async def pty():
    out = bytearray()
    h = await box.pty.create(e2b.PtySize(rows=24, cols=80), on_data=out.extend)
    await box.pty.resize(h.pid, e2b.PtySize(rows=30, cols=100))
    await box.pty.send_stdin(h.pid, b"stty size; exit 7\n")
    e = await araises(CommandExitException, h.wait())
    assert e.exit_code == 7 and b"30 100" in out, (e, bytes(out))


@check
async def life_cycle():
    await box.files.write("kept", "kept")
    await box.set_timeout(500)
    assert await box.pause() is True and await box.pause() is False
    assert not await box.is_running()
    await box.connect()
    snap = await box.create_snapshot()
    child = await AsyncSandbox.create(snap.snapshot_id)
    assert await child.files.read("kept") == "kept"
    assert await child.kill() is True and await child.kill() is False
    p = box.list_snapshots()
    assert [s.snapshot_id for s in await p.next_items()] == [snap.snapshot_id]
    assert await AsyncSandbox.delete_snapshot(snap.snapshot_id) is True
    (fork,) = await box.fork(timeout=60)
    assert await fork.files.read("kept") == "kept" and fork.sandbox_id != box.sandbox_id
    assert await fork.kill() is True
    assert isinstance(await box.get_metrics(), list)


async def streamed(to, *parts):
    for p in parts:
        await to.send(p)
    await to.close()


@check
async def input_of_many_kinds():
    h = await box.commands.run("cat", background=True, stdin=True)
    await h.send_stdin("one\n")
    await streamed(box.commands.stream_input(h.pid), "two\n", b"three\n")
    await h.close_stdin()
    assert (await h.wait()).stdout == "one\ntwo\nthree\n"
    out = bytearray()
    t = await box.pty.create(e2b.PtySize(rows=24, cols=80), on_data=lambda d: None, timeout=0)
    again = await box.pty.connect(t.pid, on_data=out.extend, timeout=0)
    await streamed(box.pty.stream_input(t.pid), b"echo a; ", b"exit 3\n")
    e = await araises(CommandExitException, again.wait())
    assert e.exit_code == 3
    k = await box.pty.create(e2b.PtySize(rows=24, cols=80), on_data=lambda d: None, timeout=0)
    assert await box.pty.kill(k.pid) is True


@check
async def git():
    g = box.git
    await g.configure_user("A User", "a@example.com")
    await g.set_config("init.defaultBranch", "main")
    assert await g.get_config("user.name") == "A User"
    await g.init("work", initial_branch="main")
    await g.init("bare.git", bare=True, initial_branch="main")
    await box.files.write("work/a", "1\n")
    await g.add("work")
    await g.commit("work", "one")
    await g.remote_add("work", "origin", "/home/user/bare.git")
    assert await g.remote_get("work", "origin") == "/home/user/bare.git"
    await g.push("work", "origin", "main")
    await g.clone("file:///home/user/bare.git", "copy")
    await g.create_branch("work", "topic")
    await g.checkout_branch("work", "main")
    assert sorted((await g.branches("work")).branches) == ["main", "topic"]
    await g.delete_branch("work", "topic")
    await box.files.write("work/a", "2\n")
    await g.restore("work", ["a"])
    await g.reset("work", mode="hard")
    assert (await g.status("work")).is_clean and await box.files.read("work/a") == "1\n"
    await g.pull("copy")


@check
async def life_cycle_by_id():
    async with await AsyncSandbox.create(timeout=600, idempotency_key="an-async-key") as s:
        assert (await AsyncSandbox.create(timeout=600, idempotency_key="an-async-key")).sandbox_id == s.sandbox_id
        i = s.sandbox_id
        await AsyncSandbox.set_timeout(i, 500)
        await s.update_network({"deny_out": ["192.0.2.0/24"]})
        assert (await AsyncSandbox.get_info(i)).network["deny_out"] == ["192.0.2.0/24"]
        assert await AsyncSandbox.pause(i, strict=True) is True
        assert await (await AsyncSandbox.connect(i, timeout=600)).is_running()
        assert await s.beta_pause() is True
        await s.connect(timeout=600)
        await s.files.write("s", "signed")
        for url in (s.download_url("s"), s.upload_url("s"), s.get_host(8080)):
            assert i in url or "signature=" in url, url
    assert await AsyncSandbox.kill(i) is False


@check
async def kill_while_streaming():
    h = await box.commands.run("sleep 1000", background=True, timeout=0)
    e, killed = await asyncio.gather(araises(TimeoutException, h.wait()), box.kill())
    assert killed is True and "sandbox was killed" in str(e), e
    assert not await box.is_running()


@check
def every_documented_method_was_used():
    assert not unused(), unused()


main()
