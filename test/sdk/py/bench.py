"""Measures for test/bench what the SDK adds; prints a line of JSON per figure.

What is compared is measured in turn. Times are in milliseconds.
"""

import asyncio
import http.client
import json
import os
import sys
import time
import urllib.parse

from e2b import AsyncSandbox, FilesystemEventType, Sandbox

ROUNDS = int(sys.argv[1])
SIZE = 100 << 20
api = urllib.parse.urlparse(os.environ["WRENN_URL"])


def figure(name, values):
    print(json.dumps({"name": name, "ms": [v * 1000 for v in values]}), flush=True)


def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def own(method, path, body=None):
    """One call of our own API, as a client does that keeps no connections."""
    c = http.client.HTTPConnection(api.hostname, api.port)
    c.request(method, path, body and json.dumps(body), {"X-API-Key": os.environ["WRENN_API_KEY"], "Content-Type": "application/json"})
    r = c.getresponse()
    text = r.read()
    c.close()
    assert r.status < 300, (r.status, text)
    return text and json.loads(text)


def create_to_first_command():
    """From a warm snapshot, where little else hides what a surface adds."""
    box = Sandbox.create(timeout=600)
    box.commands.run("true")
    box.create_snapshot(name="bench-e2b")
    box.kill()
    made = []

    def by_sdk():
        s = Sandbox.create("bench-e2b", timeout=600)
        made.append(s.sandbox_id)
        assert s.commands.run("echo x").stdout == "x\n"

    def by_own():
        sid = own("POST", "/v1/sandboxes", {"template": "bench-e2b"})["id"]
        made.append(sid)
        out = own("POST", f"/v1/sandboxes/{sid}/exec", {"cmd": "/bin/bash", "args": ["-l", "-c", "echo x"]})
        assert out["stdout"] == "x\n", out

    times = {by_sdk: [], by_own: []}
    for n in range(ROUNDS + 1):
        for f, list_ in times.items():
            d = timed(f)
            if n > 0:  # the first loads the snapshot
                list_.append(d)
            own("DELETE", "/v1/sandboxes/" + made.pop())
    figure("create by sdk", times[by_sdk])
    figure("create by own api", times[by_own])


# What a plain server in the sandbox does: a file down, and up.
SERVER = """
import http.server, shutil
class H(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_PUT(self):
        left = int(self.headers["Content-Length"])
        with open("up", "wb") as f:
            while left > 0:
                b = self.rfile.read(min(left, 1 << 16))
                f.write(b)
                left -= len(b)
        self.send_response(204)
        self.end_headers()
http.server.ThreadingHTTPServer(("", 8080), H).serve_forever()
"""


def file_copies():
    box = Sandbox.create(timeout=1800)
    box.files.write("server.py", SERVER)
    box.commands.run("python3 server.py", background=True, timeout=0)
    data = os.urandom(SIZE)

    def plain(method, path, body=None):
        c = http.client.HTTPConnection(api.hostname, api.port)
        c.request(method, path, body, {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "8080"})
        r = c.getresponse()
        got = 0
        while b := r.read(1 << 16):
            got += len(b)
        c.close()
        return r.status, got

    while plain("GET", "/server.py")[0] != 200:
        time.sleep(0.1)
    box.files.write("f", data)

    def sdk_down():
        assert sum(len(c) for c in box.files.read("f", format="stream")) == SIZE

    def plain_down():
        assert plain("GET", "/f") == (200, SIZE)

    def sdk_up():
        box.files.write("g", data)

    def plain_up():
        assert plain("PUT", "/up", data)[0] == 204

    times = {f: [] for f in (sdk_down, plain_down, sdk_up, plain_up)}
    for _ in range(max(3, ROUNDS // 3)):
        for f, list_ in times.items():
            list_.append(timed(f))
    for f, list_ in times.items():
        figure(f.__name__.replace("_", " "), list_)
    box.kill()


async def watch_events():
    """From the call that writes to the event: the write is in it."""
    box = await AsyncSandbox.create(timeout=600)
    await box.files.make_dir("w")
    loop = asyncio.get_running_loop()
    waiting = {}

    def seen(e):
        if e.type == FilesystemEventType.CREATE and e.name in waiting and not waiting[e.name].done():
            waiting[e.name].set_result(time.perf_counter())

    h = await box.files.watch_dir("w", seen)
    values = []
    for n in range(ROUNDS * 5):
        name = f"f{n}"
        waiting[name] = loop.create_future()
        t = time.perf_counter()
        written = asyncio.create_task(box.files.write("w/" + name, "x"))
        values.append(await asyncio.wait_for(waiting[name], 60) - t)
        await written
    await h.stop()
    await box.kill()
    figure("watch event", values)


create_to_first_command()
file_copies()
asyncio.run(watch_events())
