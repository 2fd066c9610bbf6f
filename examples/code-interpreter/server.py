"""The server part of e2b-code-interpreter, for Python and bash, with the standard library alone.

It listens on port 49999 of a sandbox and speaks what the published clients do:
POST /execute answers a line of JSON for every piece of output; /contexts keeps
interpreters apart. A context is a process (worker.py) that lives from cell to
cell; its output is what its file descriptors 1 and 2 give, so that programs it
starts are heard too.
"""

import http.server
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import uuid

HOME = os.path.expanduser("~")
HERE = os.path.dirname(os.path.abspath(__file__))
LANGUAGES = {"python": "python", "python3": "python", "bash": "bash", "sh": "bash"}
MAX_BODY = 16 << 20
MAX_CONTEXTS = 64


class Refused(Exception):
    """What is wrong with a request, with its status."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Worker:
    """One interpreter process; one cell at a time."""

    def __init__(self, cwd):
        self.cwd = cwd
        self.turn = threading.Lock()
        self.start()

    def start(self):
        mine, theirs = os.pipe()  # its messages to us
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "worker.py"), str(theirs)], cwd=self.cwd, pass_fds=[theirs],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        os.close(theirs)
        self.messages = queue.Queue()
        streams = [(self.process.stdout, "stdout"), (self.process.stderr, "stderr"), (os.fdopen(mine, "rb"), None)]
        for stream, kind in streams:
            threading.Thread(target=self.listen, args=(self.messages, stream, kind), daemon=True).start()

    @staticmethod
    def listen(messages, stream, kind):
        """Puts what a stream gives into the queue, and None at its end."""
        with stream:
            if kind is None:
                for line in stream:
                    messages.put(json.loads(line))
            else:
                while text := stream.read1(1 << 16):
                    messages.put({"type": kind, "text": text})
        messages.put(None)

    def stop(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def interrupt(self):
        try:
            os.killpg(self.process.pid, signal.SIGINT)
        except ProcessLookupError:
            pass

    def run(self, cell, gone):
        """Yields a cell's messages; gone() tells that nobody wants them any more."""
        self.process.stdin.write(json.dumps(cell).encode() + b"\n")
        self.process.stdin.flush()
        # The end of a cell is marked on both streams: what was printed before
        # it is heard before it.
        mark, open_streams, done, told = cell["mark"].encode(), {"stdout", "stderr"}, False, False
        held = {"stdout": b"", "stderr": b""}
        ends = 0
        while open_streams or not done:
            try:
                m = self.messages.get(timeout=0.2)
            except queue.Empty:
                if gone() and not told:
                    told = True
                    self.interrupt()
                continue
            if m is None:
                ends += 1
                if ends == 3:  # the interpreter is gone
                    self.start()
                    yield {"type": "error", "name": "ContextDied", "value": "the interpreter ended, and was started anew", "traceback": ""}
                    return
            elif m["type"] == "end":
                done = True
            elif m["type"] in held:
                kind = m["type"]
                text = held[kind] + m["text"]
                before, found, _ = text.partition(mark)
                if found:
                    open_streams.discard(kind)
                # Part of a mark, or of a character, waits for the rest.
                keep = 0 if found else max((n for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
                before, held[kind] = (before, b"") if found else (text[: len(text) - keep], text[len(text) - keep :])
                if before:
                    yield {"type": kind, "text": before.decode(errors="replace"), "timestamp": time.time_ns()}
            else:
                yield m


class Contexts:
    def __init__(self):
        self.lock = threading.Lock()
        self.all = {}
        self.default = self.add("python", HOME)["id"]

    def add(self, language, cwd):
        if language not in LANGUAGES:
            raise Refused(400, f"language: {language!r} is not here; there are python and bash")
        if not os.path.isdir(cwd):
            raise Refused(400, f"cwd: {cwd!r} is no directory")
        language = LANGUAGES[language]
        with self.lock:
            if len(self.all) >= MAX_CONTEXTS:
                raise Refused(400, f"there are {MAX_CONTEXTS} contexts already; remove one")
            c = {"id": str(uuid.uuid4()), "language": language, "cwd": cwd}
            self.all[c["id"]] = (c, Worker(cwd))
            return c

    def get(self, id_):
        with self.lock:
            if id_ not in self.all:
                raise Refused(404, f"Context {id_} not found")
            return self.all[id_]

    def of_language(self, language):
        """The context of a cell that names none."""
        if LANGUAGES.get(language or "python") == "python":
            return self.get(self.default)
        with self.lock:
            found = [x for x in self.all.values() if x[0]["language"] == LANGUAGES.get(language)]
        return found[0] if found else self.get(self.add(language, HOME)["id"])

    def remove(self, id_):
        _, worker = self.get(id_)
        with self.lock:
            self.all.pop(id_, None)
        worker.stop()

    def restart(self, id_):
        _, worker = self.get(id_)
        worker.stop()
        with worker.turn:
            if worker.process.poll() is not None:
                worker.start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    contexts: Contexts

    def log_message(self, *args):
        pass

    def body(self):
        n = int(self.headers.get("Content-Length") or 0)
        if n > MAX_BODY:
            raise Refused(413, f"the body must have at most {MAX_BODY} bytes")
        try:
            v = json.loads(self.rfile.read(n) or b"{}")
        except ValueError as e:
            raise Refused(400, f"the body is no JSON: {e}") from None
        if not isinstance(v, dict):
            raise Refused(400, "the body must be a JSON object")
        return v

    def answer(self, status, value=None):
        text = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def handled(self, f, *args):
        try:
            f(*args)
        except Refused as e:
            self.answer(e.status, {"message": str(e)})

    def do_GET(self):
        self.handled({"/health": lambda: self.answer(200, "OK"), "/contexts": self.list}.get(self.path, self.nothing))

    def do_DELETE(self):
        self.handled(self.by_id, self.contexts.remove, "")

    def do_POST(self):
        if self.path == "/execute":
            self.handled(self.execute)
        elif self.path == "/contexts":
            self.handled(self.create)
        else:
            self.handled(self.by_id, self.contexts.restart, "/restart")

    def nothing(self):
        raise Refused(404, "there is nothing at this path")

    def list(self):
        with self.contexts.lock:
            out = [c for c, _ in self.contexts.all.values()]
        self.answer(200, out)

    def create(self):
        b = self.body()
        self.answer(200, self.contexts.add(b.get("language") or "python", b.get("cwd") or HOME))

    def by_id(self, do, end):
        self.body()
        if not (self.path.startswith("/contexts/") and self.path.endswith(end)):
            self.nothing()
        do(self.path[len("/contexts/") : len(self.path) - len(end)])
        self.answer(204)

    def gone(self):
        """Tells that the client has hung up."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, 2)  # MSG_PEEK
        except OSError:
            return True

    def execute(self):
        b = self.body()
        code, envs = b.get("code"), b.get("env_vars") or {}
        if not isinstance(code, str) or not isinstance(envs, dict):
            raise Refused(400, "code must be a string, and env_vars an object")
        context, worker = self.contexts.get(b["context_id"]) if b.get("context_id") else self.contexts.of_language(b.get("language"))
        if context["language"] == "python" and LANGUAGES.get(b.get("language") or "python") is None:
            raise Refused(400, f"language: {b['language']!r} is not here; there are python and bash")
        cell = {"code": code, "envs": envs, "language": context["language"], "mark": f"\0{uuid.uuid4()}\0"}
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with worker.turn:
            for m in worker.run(cell, self.gone):
                self.chunk(json.dumps(m).encode() + b"\n")
        self.chunk(json.dumps({"type": "end_of_execution"}).encode() + b"\n")
        self.chunk(b"")

    def chunk(self, text):
        # The worker is heard to the end even when nobody listens.
        try:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(text), text))
            self.wfile.flush()
        except OSError:
            self.close_connection = True


if __name__ == "__main__":
    Handler.contexts = Contexts()
    http.server.ThreadingHTTPServer(("0.0.0.0", 49999), Handler).serve_forever()
