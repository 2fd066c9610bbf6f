"""What is easily got wrong."""

import concurrent.futures
import json
import os
import threading
import time
import urllib.error
import urllib.request

from e2b import CommandExitException, NotFoundException, Sandbox, SandboxState, TimeoutException
from e2b.exceptions import NotEnoughSpaceException, SandboxException

from checks import check, eventually, main, raises

URL = os.environ["E2B_SANDBOX_URL"]
box = Sandbox.create(timeout=900)


def proxied(sandbox, path, port=49983, method="GET", **headers):
    """Status and body of a request into a sandbox, without an SDK."""
    h = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(port)} | headers
    try:
        r = urllib.request.urlopen(urllib.request.Request(URL + path, headers=h, method=method))
        return r.status, r.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


@check
def pause_keeps_running_commands_and_the_token():
    token = box._envd_access_token
    h = box.commands.run("for i in $(seq 100000); do echo $i; sleep 0.2; done", background=True, timeout=0)
    assert box.pause() is True
    assert Sandbox.get_info(box.sandbox_id).state == SandboxState.PAUSED
    same = Sandbox.connect(box.sandbox_id)
    assert same._envd_access_token == token
    assert h.pid in [p.pid for p in same.commands.list()]
    again = same.commands.connect(h.pid)
    assert any(out for out, _, _ in again), "a command's output goes on after a pause"
    assert same.commands.kill(h.pid) is True


@check
def pause_without_memory_reboots_and_keeps_the_disk():
    boot = box.commands.run("cat /proc/sys/kernel/random/boot_id; touch /dev/shm/gone").stdout
    box.files.write("kept", "kept")
    pid = box.commands.run("sleep 1000", background=True, timeout=0).pid
    assert box.pause(mode="filesystem") is True
    box.connect(timeout=900)
    assert box.commands.run("cat /proc/sys/kernel/random/boot_id").stdout != boot
    assert box.files.read("kept") == "kept" and not box.files.exists("/dev/shm/gone")
    assert pid not in [p.pid for p in box.commands.list()]
    # The next pause keeps the memory again.
    boot = box.commands.run("cat /proc/sys/kernel/random/boot_id").stdout
    box.pause()
    box.connect(timeout=900)
    assert box.commands.run("cat /proc/sys/kernel/random/boot_id").stdout == boot
    box.pause()
    box.connect(timeout=900, on_resume="reboot")
    assert box.commands.run("cat /proc/sys/kernel/random/boot_id").stdout != boot
    assert box.files.read("kept") == "kept"


@check
def a_paused_sandbox_answers_502_and_does_not_wake():
    box.pause()
    for path in ("/health", "/files?path=x", "/process.Process/List"):
        code, text = proxied(box, path)
        assert code == 502 and json.loads(text) == {
            "sandboxId": box.sandbox_id, "message": "The sandbox was not found", "code": 502}, (code, text)
    assert Sandbox.get_info(box.sandbox_id).state == SandboxState.PAUSED
    box.connect(timeout=900)
    code, text = proxied(box, "/", port=81)
    assert code == 502 and "port is not open" in json.loads(text)["message"], text


@check
def the_hosts_own_calls_are_not_forwarded():
    for path in ("/init", "//init", "/sync", "/INIT", "/x/../init"):
        code, text = proxied(box, path, method="POST", **{"X-Access-Token": box._envd_access_token})
        assert code in (404, 401, 403), (path, code, text)


@check
def keepalives_come_after_the_start():
    # With a ping interval of a second the first event must still be the start.
    h = box.commands.run("sleep 3; echo end", background=True, timeout=30)
    assert h.wait().stdout == "end\n"


@check
def time_limits_of_seconds():
    short = Sandbox.create(timeout=10)
    gone = short.commands.run("sleep 1000", background=True, timeout=0)
    e = raises(TimeoutException, gone.wait)
    assert "killed or reached its" in str(e), e
    eventually(lambda: not short.is_running())
    raises(NotFoundException, lambda: Sandbox.connect(short.sandbox_id))


@check
def auto_pause_and_auto_resume():
    s = Sandbox.create(timeout=10, lifecycle={"on_timeout": "pause", "auto_resume": True})
    try:
        eventually(lambda: Sandbox.get_info(s.sandbox_id).state == SandboxState.PAUSED)
        assert s.commands.run("echo awake").stdout == "awake\n", "traffic wakes it"
        info = Sandbox.get_info(s.sandbox_id)
        assert info.state == SandboxState.RUNNING and info.lifecycle["auto_resume"] is True, info
    finally:
        s.kill()


@check
def forks_are_individuals():
    box.files.write("who", "parent")
    forks = box.fork(timeout=120, count=2)
    try:
        assert len({f.sandbox_id for f in forks} | {box.sandbox_id}) == 3, forks
        assert len({f._envd_access_token for f in forks} | {box._envd_access_token}) == 3
        for f in forks:
            assert f.files.read("who") == "parent"
            f.files.write("who", f.sandbox_id)
        assert box.files.read("who") == "parent"
        # One sandbox's token opens no other one.
        code, _ = proxied(forks[0], "/files?path=who", **{"X-Access-Token": box._envd_access_token})
        assert code == 401, code
    finally:
        for f in forks:
            f.kill()


@check
def snapshots_by_sandbox():
    a = box.create_snapshot(name="trap-a")
    b = box.create_snapshot()
    try:
        assert box.is_running()
        got = []
        p = box.list_snapshots(limit=1)
        while p.has_next:
            got += [s.snapshot_id for s in p.next_items()]
        assert sorted(got) == sorted([a.snapshot_id, b.snapshot_id]), got
        assert [s.snapshot_id for s in Sandbox.list_snapshots(sandbox_id="nobody").next_items()] == []
        # A second one of a name takes it; what was made from the first goes on.
        child = Sandbox.create(a.snapshot_id, timeout=120)
        box.files.write("second", "yes")
        assert box.create_snapshot(name="trap-a").snapshot_id == a.snapshot_id
        later = Sandbox.create(a.snapshot_id, timeout=120)
        try:
            assert later.files.exists("second") and not child.files.exists("second")
        finally:
            child.kill()
            later.kill()
    finally:
        assert Sandbox.delete_snapshot(a.snapshot_id + ":default") is True
        assert Sandbox.delete_snapshot(b.snapshot_id) is True


@check
def network_rules():
    # Nothing but the rules decides what ends at a closed door: a dropped
    # packet times out, one that is let through to nowhere is refused or not.
    box.update_network({"allow_out": ["192.0.2.1"], "deny_out": ["0.0.0.0/0"]})
    info = box.get_info().network
    assert info["allow_out"] == ["192.0.2.1/32"] and info["deny_out"] == ["0.0.0.0/0"], info
    box.pause()
    box.connect(timeout=900)
    assert box.get_info().network["deny_out"] == ["0.0.0.0/0"]
    box.update_network({})
    assert not box.get_info().network.get("deny_out")
    e = raises(SandboxException, lambda: box.update_network({"allow_out": ["example.com"]}))
    assert "allowOut" in str(e) and "0.0.0.0/0" in str(e), e


# Asks a name server for a name and prints what kind of answer comes.
ASK = """
import socket, sys
q = b"\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + b"".join(bytes([len(l)]) + l.encode() for l in sys.argv[1].split(".")) + b"\\0\\0\\1\\0\\1"
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(30); s.sendto(q, ("8.8.8.8", 53))
print(s.recv(512)[3] & 15)
"""


@check
def names_in_the_rules():
    REFUSED = "5\n"
    s = Sandbox.create(timeout=300, network={"allow_out": ["*.wrenn.test", "192.0.2.1"], "deny_out": lambda ctx: [ctx.all_traffic]})
    try:
        s.files.write("ask.py", ASK)
        info = s.get_info().network
        assert info["allow_out"] == ["*.wrenn.test", "192.0.2.1/32"] and info["deny_out"] == ["0.0.0.0/0"], info
        # Other names are not even asked for; of an allowed one the host's name
        # servers decide, and there is none.
        assert s.commands.run("python3 ask.py other.example").stdout == REFUSED
        assert s.commands.run("python3 ask.py a.wrenn.test").stdout != REFUSED
        s.pause()
        s.connect(timeout=300)
        assert s.commands.run("python3 ask.py other.example").stdout == REFUSED
        s.update_network({"allow_out": ["other.example"], "allow_internet_access": False, "dns_servers": ["9.9.9.9"]})
        assert s.get_info().network["dns_servers"] == ["9.9.9.9"]
        assert s.commands.run("python3 ask.py other.example").stdout != REFUSED
        assert s.commands.run("python3 ask.py a.wrenn.test").stdout == REFUSED
        assert s.get_info().allow_internet_access is False
    finally:
        s.kill()
    e = raises(SandboxException, lambda: Sandbox.create(network={"allow_out": ["example.com"]}))
    assert "400" in str(e) and "allowOut" in str(e), e


@check
def published_ports():
    box.commands.run("mkdir -p web; echo page > web/index.html; cd web; python3 -m http.server 8080 >/dev/null 2>&1", background=True, timeout=0)
    eventually(lambda: proxied(box, "/", port=8080)[0] == 200)
    assert proxied(box, "/index.html", port=8080)[1] == b"page\n"
    host = f"8080-{box.sandbox_id}.wrenn.test"
    r = urllib.request.urlopen(urllib.request.Request(URL + "/index.html", headers={"Host": host}))
    assert r.read() == b"page\n"


TLS_SERVER = """
import http.server, ssl
s = http.server.HTTPServer(("", 8443), http.server.SimpleHTTPRequestHandler)
c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
c.load_cert_chain("c.pem", "k.pem")
s.socket = c.wrap_socket(s.socket, server_side=True)
s.serve_forever()
"""


@check
def private_ports_ask_for_a_token():
    s = Sandbox.create(timeout=120, network={"allow_public_traffic": False, "https_ports": [8443]})
    try:
        # A program of the guest's that speaks TLS, with a certificate of its own.
        s.files.write("tls.py", TLS_SERVER)
        s.commands.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout k.pem -out c.pem 2>/dev/null")
        s.commands.run("python3 tls.py >/dev/null 2>&1", background=True, timeout=0)
        eventually(lambda: proxied(s, "/tls.py", port=8443, **{"E2b-Traffic-Access-Token": s.traffic_access_token}) == (200, TLS_SERVER.encode()))
        assert s.get_info().network["https_ports"] == [8443]
        assert s.traffic_access_token
        s.commands.run("python3 -m http.server 8080 >/dev/null 2>&1", background=True, timeout=0)
        assert proxied(s, "/", port=8080)[0] == 403
        assert proxied(s, "/", port=8080, **{"E2b-Traffic-Access-Token": "0" * 40})[0] == 403
        eventually(lambda: proxied(s, "/", port=8080, **{"E2b-Traffic-Access-Token": s.traffic_access_token})[0] == 200)
        assert s.commands.run("true").exit_code == 0, "the guest agent has a token of its own"
    finally:
        s.kill()


@check
def a_full_disk():
    box.commands.run("mkdir -p /tmp/full && mount -t tmpfs -o size=1m tmpfs /tmp/full && chmod 777 /tmp/full", user="root")
    raises(NotEnoughSpaceException, lambda: box.files.write("/tmp/full/f", b"x" * (4 << 20)))


@check
def killed_while_streaming():
    h = box.commands.run("sleep 1000", background=True, timeout=0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(lambda: raises(TimeoutException, h.wait))
        assert box.kill() is True
        e = waiting.result(30)
    assert "sandbox was killed" in str(e), e
    assert not box.is_running()


main()
