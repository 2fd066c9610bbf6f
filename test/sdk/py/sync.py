"""Every documented method of Sandbox, commands, files and pty, synchronous."""

import datetime
import io
import os
import urllib.request

import e2b
from e2b import (
    CommandExitException,
    FileType,
    FilesystemEventType,
    NotFoundException,
    Sandbox,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)
from e2b.exceptions import AuthenticationException, InvalidArgumentException, SandboxException

from e2b.sandbox_sync.commands.command import Commands
from e2b.sandbox_sync.commands.command_handle import CommandHandle
from e2b.sandbox_sync.commands.pty import Pty
from e2b.sandbox_sync.filesystem.filesystem import Filesystem
from e2b.sandbox_sync.filesystem.watch_handle import WatchHandle
from e2b.sandbox_sync.git import Git

from checks import check, eventually, every_method_of, main, raises

unused = every_method_of(
    Sandbox, Commands, CommandHandle, Filesystem, Pty, WatchHandle, Git,
    # There is no MCP gateway; a git server that wants a password is another one's.
    but=["Sandbox.get_mcp_url", "Sandbox.get_mcp_token", "Git.dangerously_authenticate"],
)
box = Sandbox.create(timeout=600, metadata={"who": "a b&c=d/é", "n": "1"}, envs={"COLOR": "green"})


@check
def info_and_list():
    i = box.get_info()
    assert i.sandbox_id == box.sandbox_id and i.state == SandboxState.RUNNING, i
    assert i.metadata == {"who": "a b&c=d/é", "n": "1"}, i.metadata
    assert i.template_id == "base" and i.cpu_count == 1 and i.memory_mb == 512, i
    left = (i.end_at - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
    assert 500 < left < 601, left
    assert Sandbox.get_info(box.sandbox_id).sandbox_id == box.sandbox_id
    found = Sandbox.list(query=SandboxQuery(metadata={"who": "a b&c=d/é"})).next_items()
    assert [s.sandbox_id for s in found] == [box.sandbox_id], found
    none = Sandbox.list(query=SandboxQuery(metadata={"who": "nobody"})).next_items()
    assert none == [], none
    running = Sandbox.list(query=SandboxQuery(state=[SandboxState.RUNNING])).next_items()
    assert box.sandbox_id in [s.sandbox_id for s in running]


@check
def commands_run():
    r = box.commands.run("echo out; echo err >&2; echo $COLOR; pwd; whoami; umask; echo -n x")
    assert r.stdout == "out\ngreen\n/home/user\nuser\n0022\nx", r.stdout
    assert r.stderr == "err\n" and r.exit_code == 0, r
    assert box.commands.run("echo $COLOR $MORE", envs={"MORE": "1"}, cwd="/tmp", user="root").stdout == "green 1\n"
    assert box.commands.run("pwd; id -un", cwd="/etc", user="root").stdout == "/etc\nroot\n"
    assert box.commands.run("sudo id -un").stdout == "root\n"
    e = raises(CommandExitException, lambda: box.commands.run("echo no >&2; exit 3"))
    assert e.exit_code == 3 and e.stderr == "no\n", e
    out, err = [], []
    box.commands.run("echo 1; echo 2 >&2", on_stdout=out.append, on_stderr=err.append)
    assert "".join(out) == "1\n" and "".join(err) == "2\n", (out, err)
    assert box.commands.run("nice; ps -o ni= -p $PPID | tr -d ' '").stdout == "0\n-20\n", "the agent goes before its commands"
    assert box.commands.run("printf 'h\\303\\251\\342\\202\\254'").stdout == "hé€"


@check
def commands_errors():
    raises(TimeoutException, lambda: box.commands.run("sleep 60", timeout=1))
    e = raises(AuthenticationException, lambda: box.commands.run("true", user="x"))
    assert "invalid username: 'x'" in str(e), e
    raises(InvalidArgumentException, lambda: box.commands.run("true", cwd="/no/such"))
    assert box.commands.kill(999999) is False
    raises(NotFoundException, lambda: box.commands.connect(999999).wait())


@check
def commands_background():
    h = box.commands.run("cat; echo end", background=True, stdin=True)
    listed = [p for p in box.commands.list() if p.pid == h.pid]
    assert len(listed) == 1 and listed[0].cmd == "/bin/bash" and "-c" in listed[0].args, listed
    box.commands.send_stdin(h.pid, "one\n")
    other = box.commands.connect(h.pid)
    box.commands.send_stdin(h.pid, "two\n")
    box.commands.close_stdin(h.pid)
    assert "end\n" in other.wait().stdout
    k = box.commands.run("sleep 1000", background=True)
    assert k.kill() is True
    e = raises(CommandExitException, k.wait)
    assert e.exit_code == -1, e
    d = box.commands.run("sleep 1000", background=True)
    d.disconnect()
    assert d.pid in [p.pid for p in box.commands.list()], "a client that goes away must end nothing"
    assert box.commands.kill(d.pid) is True


@check
def files_read_and_write():
    w = box.files.write("dir/new/a.txt", "text é")
    assert w.path == "/home/user/dir/new/a.txt" and w.name == "a.txt" and w.type == FileType.FILE, w
    assert box.files.read("dir/new/a.txt") == "text é"
    assert box.files.read(w.path, format="bytes") == "text é".encode()
    data = os.urandom(3 << 20)
    box.files.write("/tmp/big", data)
    assert b"".join(box.files.read("/tmp/big", format="stream")) == data
    box.files.write("/tmp/z", b"z" * (1 << 20), gzip=True)
    assert bytes(box.files.read("/tmp/z", format="bytes", gzip=True)) == b"z" * (1 << 20)
    box.files.write("/tmp/io", io.BytesIO(data))
    assert bytes(box.files.read("/tmp/io", format="bytes")) == data
    many = box.files.write_files([{"path": f"many/{i}", "data": str(i)} for i in range(10)])
    assert [m.path for m in many] == [f"/home/user/many/{i}" for i in range(10)], many
    box.files.write("/root/r", "r", user="root")
    assert box.files.get_info("/root/r", user="root").owner == "root"
    raises(NotFoundException, lambda: box.files.read("/no/such"))
    raises(InvalidArgumentException, lambda: box.files.read("/tmp"))
    raises(AuthenticationException, lambda: box.files.read("/tmp/big", user="nobody-here"))


@check
def files_metadata():
    box.files.write("m.txt", "1", metadata={"color": "red", "kind": "x"})
    assert box.files.get_info("m.txt").metadata == {"color": "red", "kind": "x"}
    box.files.write("m.txt", "2", metadata={"color": "blue"})
    assert box.files.get_info("m.txt").metadata == {"color": "blue"}
    box.files.write("m.txt", "3")
    assert not box.files.get_info("m.txt").metadata


@check
def files_directories():
    assert box.files.make_dir("t/x/y") is True and box.files.make_dir("t/x/y") is False
    box.files.write("t/x/f", "f")
    box.commands.run("ln -s /etc/hostname t/link")
    assert sorted(e.name for e in box.files.list("t")) == ["link", "x"]
    assert sorted(e.path for e in box.files.list("t", depth=2)) == [
        "/home/user/t/link", "/home/user/t/x", "/home/user/t/x/f", "/home/user/t/x/y"]
    i = box.files.get_info("t/x/f")
    assert (i.name, i.size, i.permissions, i.owner, i.group, i.mode) == ("f", 1, "-rw-r--r--", "user", "user", 0o644), i
    assert box.files.get_info("t/link").symlink_target == "/etc/hostname"
    assert box.files.exists("t/x/f") and not box.files.exists("t/nope")
    assert box.files.rename("t/x/f", "t/g").path == "/home/user/t/g"
    box.files.remove("t/g")
    box.files.remove("t/g")
    raises(NotFoundException, lambda: box.files.list("t/nope"))
    raises(NotFoundException, lambda: box.files.rename("t/nope", "t/z"))
    raises(InvalidArgumentException, lambda: box.files.list("t/link"))


@check
def files_watch():
    box.files.make_dir("w/sub")
    h = box.files.watch_dir("w", recursive=True)
    box.files.write("w/sub/f", "1")
    seen = []

    def created():
        seen.extend(h.get_new_events())
        return [e for e in seen if e.name == "sub/f" and e.type in (FilesystemEventType.CREATE, FilesystemEventType.WRITE)]

    eventually(created)
    h.stop()
    raises(SandboxException, h.get_new_events)
    raises(NotFoundException, lambda: box.files.watch_dir("nope"))


@check
def signed_urls():
    box.files.write("s p+a/ü.txt", "signed")
    for url in (box.download_url("s p+a/ü.txt"), box.download_url("s p+a/ü.txt", use_signature_expiration=60)):
        assert urllib.request.urlopen(url).read() == b"signed"
    up = box.upload_url("up.bin", use_signature_expiration=60)
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="up.bin"\r\n\r\nraw\r\n--b--\r\n'
    req = urllib.request.Request(up, body, {"Content-Type": "multipart/form-data; boundary=b"})
    assert urllib.request.urlopen(req).status == 200 and box.files.read("up.bin") == "raw"

    def status(url):
        try:
            return urllib.request.urlopen(url).status, b""
        except urllib.error.HTTPError as e:
            return e.code, e.read()

    assert box.get_host(8080) == f"8080-{box.sandbox_id}.{box.sandbox_domain}"
    assert status(box.download_url("s p+a/ü.txt").replace("signature=v1_", "signature=v1_A"))[0] == 401
    code, text = status(box.download_url("s p+a/ü.txt", use_signature_expiration=-5))
    assert code == 401 and b"signature is already expired" in text, (code, text)


@check
def pty():
    h = box.pty.create(e2b.PtySize(rows=24, cols=80), envs={"P": "pp"}, cwd="/tmp")
    box.pty.resize(h.pid, e2b.PtySize(rows=30, cols=100))
    box.pty.send_stdin(h.pid, b"stty size; echo $P $TERM; tput cols; pwd; exit 7\n")
    out = bytearray()
    e = raises(CommandExitException, lambda: h.wait(on_pty=out.extend))
    assert e.exit_code == 7, e
    assert b"30 100" in out and b"pp xterm-256color" in out and b"/tmp" in out, bytes(out)
    k = box.pty.create(e2b.PtySize(rows=24, cols=80))
    assert box.pty.kill(k.pid) is True
    eventually(lambda: box.pty.kill(k.pid) is False)


@check
def timeouts():
    box.set_timeout(300)
    before = box.get_info().end_at
    box.connect(timeout=10)
    assert box.get_info().end_at == before, "a shorter limit of a connect must change nothing"
    box.connect(timeout=900)
    assert box.get_info().end_at > before
    box.set_timeout(600)
    assert box.get_info().end_at < before + datetime.timedelta(seconds=500)


@check
def metrics():
    m = eventually(box.get_metrics)[-1]
    assert m.cpu_count == 1 and 0 < m.mem_used < m.mem_total <= 512 << 20 and 0 < m.disk_used < m.disk_total, m
    assert box.get_metrics(start=datetime.datetime.now() + datetime.timedelta(hours=1)) == []


@check
def pagination_and_order():
    more = [Sandbox.create(metadata={"page": "1"}) for _ in range(2)]
    try:
        for order, sign in (("desc", -1), ("asc", 1)):
            p = Sandbox.list(query=SandboxQuery(metadata={"page": "1"}), limit=1, order=order)
            got = []
            while p.has_next:
                page = p.next_items()
                assert len(page) == 1, page
                got += [s.sandbox_id for s in page]
            assert got == [s.sandbox_id for s in more][::sign], got
    finally:
        for s in more:
            assert s.kill() is True


@check
def wrong_keys_and_names():
    raises(AuthenticationException, lambda: Sandbox.create(api_key="e2b_" + "0" * 40))
    raises(NotFoundException, lambda: Sandbox.connect("nosuchsandbox"))
    raises(NotFoundException, lambda: Sandbox.get_info("nosuchsandbox"))
    raises(NotFoundException, lambda: Sandbox.set_timeout("nosuchsandbox", 10))
    assert Sandbox.kill("nosuchsandbox") is False
    assert Sandbox.delete_snapshot("ns/no:such") is False
    e = raises(SandboxException, lambda: Sandbox.create("no-such-template"))
    assert "404" in str(e), e
    e = raises(SandboxException, lambda: Sandbox.create(network={"allow_out": ["example.com"]}))
    assert "400" in str(e) and "allowOut" in str(e), e


@check
def input_of_many_kinds():
    h = box.commands.run("cat", background=True, stdin=True)
    h.send_stdin("one\n")
    box.commands.send_stdin(h.pid, b"\x66\xc3\xa9\n")
    box.commands.stream_input(h.pid, (c for c in ["three\n", b"four\n"]))
    h.close_stdin()
    assert h.wait().stdout == "one\nfé\nthree\nfour\n"
    lines = []
    r = box.commands.run("seq 5", on_stdout=lines.append, retain_output=False)
    assert "".join(lines) == "1\n2\n3\n4\n5\n" and r.stdout is None, (lines, r)
    t = box.pty.create(e2b.PtySize(rows=24, cols=80), timeout=0)
    again = box.pty.connect(t.pid, timeout=0)
    box.pty.stream_input(t.pid, iter([b"echo a; ", b"exit 3\n"]))
    assert raises(CommandExitException, again.wait).exit_code == 3


@check
def files_in_other_ways():
    box.files.write("o", b"\0\1octets", use_octet_stream=True, metadata={"k": "v"})
    assert bytes(box.files.read("o", format="bytes")) == b"\0\1octets" and box.files.get_info("o").metadata == {"k": "v"}
    box.files.write("chunks", iter([b"a", b"b" * 100_000]))
    assert len(box.files.read("chunks")) == 100_001
    box.files.write_files([{"path": "p/1", "data": io.StringIO("ü")}, {"path": "p/2", "data": b"2"}], gzip=True, metadata={"a": "b"})
    assert box.files.read("p/1") == "ü" and box.files.get_info("p/2").metadata == {"a": "b"}
    h = box.files.watch_dir("p", include_entry=True)
    box.files.write("p/3", "3")
    seen = []

    def made():
        seen.extend(h.get_new_events())
        return [e for e in seen if e.name == "3" and e.entry and e.entry.path == "/home/user/p/3" and e.entry.owner == "user"]

    eventually(made)
    h.stop()


@check
def git():
    g = box.git
    g.configure_user("A User", "a@example.com")
    g.set_config("init.defaultBranch", "main")
    assert g.get_config("user.name") == "A User" and g.get_config("none.such") is None
    g.init("work", initial_branch="main")
    g.init("bare.git", bare=True, initial_branch="main")
    box.files.write("work/a", "1\n")
    assert [f.name for f in g.status("work").file_status] == ["a"]
    g.add("work", ["a"])
    g.commit("work", "one", author_name="B", author_email="b@example.com")
    g.remote_add("work", "origin", "/home/user/bare.git")
    assert g.remote_get("work", "origin") == "/home/user/bare.git"
    g.push("work", "origin", "main")
    g.clone("file:///home/user/bare.git", "copy", depth=1)
    assert box.files.read("copy/a") == "1\n"
    g.create_branch("work", "topic")
    g.checkout_branch("work", "main")
    assert sorted(g.branches("work").branches) == ["main", "topic"] and g.branches("work").current_branch == "main"
    g.delete_branch("work", "topic")
    box.files.write("work/a", "2\n")
    g.restore("work", ["a"])
    assert box.files.read("work/a") == "1\n"
    box.files.write("work/a", "3\n")
    g.add("work")
    g.reset("work", mode="hard")
    assert box.files.read("work/a") == "1\n" and g.status("work").is_clean
    g.commit("work", "two", allow_empty=True)
    g.push("work", "origin", "main")
    g.pull("copy")
    assert box.commands.run("git -C copy log --format=%s").stdout.startswith("two\n")


@check
def life_cycle_by_id():
    with Sandbox.create(timeout=600, idempotency_key="a-key", allow_internet_access=False) as s:
        again = Sandbox.create(timeout=600, idempotency_key="a-key", allow_internet_access=False)
        assert again.sandbox_id == s.sandbox_id
        i = s.sandbox_id
        info = Sandbox.get_info(i)
        assert info.allow_internet_access is False and info.lifecycle == {"on_timeout": "kill", "auto_resume": False}, info
        q = SandboxQuery(template="base", started_after=info.started_at - datetime.timedelta(seconds=1))
        assert i in [x.sandbox_id for x in Sandbox.list(query=q).next_items()]
        assert Sandbox.list(query=SandboxQuery(template="none")).next_items() == []
        Sandbox.set_timeout(i, 500)
        Sandbox.update_network(i, {"deny_out": ["192.0.2.0/24"]})
        assert isinstance(Sandbox.get_metrics(i), list)
        assert Sandbox.pause(i, strict=True) is True and Sandbox.pause(i) is False
        assert Sandbox.connect(i, timeout=600).is_running()
        assert s.beta_pause() is True
        s.connect(timeout=600)
        a, b = Sandbox.create_snapshot(i, name="by-id"), s.create_snapshot()
        assert [x.snapshot_id for x in s.list_snapshots(name="by-id").next_items()] == [a.snapshot_id]
        assert Sandbox.delete_snapshot(a.snapshot_id) and Sandbox.delete_snapshot(b.snapshot_id)
        (f,) = s.fork(timeout=60)
        assert Sandbox.kill(f.sandbox_id) is True
    assert Sandbox.kill(i) is False, "the end of the block has killed it"


@check
def a_client_object():
    c = e2b.E2B(api_key=os.environ["E2B_API_KEY"])
    s = c.Sandbox.connect(box.sandbox_id)
    assert s.commands.run("echo bound").stdout == "bound\n"
    assert c.Template.exists("base") is True
    raises(AuthenticationException, lambda: e2b.E2B(api_key="e2b_" + "0" * 40).Sandbox.get_info(box.sandbox_id))


@check
def kill():
    assert box.is_running() and box.kill() is True
    assert not box.is_running() and box.kill() is False
    raises(TimeoutException, lambda: box.commands.run("true"))
    raises(TimeoutException, lambda: box.files.read("/etc/hostname"))


@check
def every_documented_method_was_used():
    assert not unused(), unused()


main()
