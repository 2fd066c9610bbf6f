"""The class of error of every bad input, synchronous and asynchronous.

The server has little memory for sandboxes and a low limit of requests.
"""

import asyncio
import inspect
import os
import urllib.parse

from e2b import (
    AsyncSandbox,
    CommandExitException,
    ConnectionConfig,
    FileNotFoundException,
    InvalidArgumentException,
    NotEnoughSpaceException,
    PtySize,
    RateLimitException,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    SandboxNotRunningException,
    ServiceBusyException,
    TimeoutException,
)
from e2b.exceptions import AuthenticationException, NotFoundException

import checks
from checks import check, eventually, main, raises

NOBODY = "nosuchsandbox"
WRONG_KEY = "e2b_" + "0" * 40


def settled(x):
    return checks._loop.run_until_complete(x) if inspect.isawaitable(x) else x


def waited(handle):
    """Waits for what a call gives a handle of, too."""
    return settled(settled(handle).wait())


def full(box):
    settled(box.commands.run(
        "mkdir -p /tmp/full && { mountpoint -q /tmp/full || mount -t tmpfs -o size=1m tmpfs /tmp/full; } && chmod 777 /tmp/full",
        user="root"))
    return box.files.write("/tmp/full/f", b"x" * (4 << 20))


def with_a_wrong_token(S, box):
    token = "0" * 64
    return S(
        sandbox_id=box.sandbox_id, sandbox_domain=box.sandbox_domain, envd_version=box._envd_version, envd_access_token=token,
        connection_config=ConnectionConfig(extra_sandbox_headers={
            "E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "49983", "X-Access-Token": token}))


# What is asked of a class of sandboxes or of a running one, and how it ends.
TABLE = {
    # The control plane.
    "connect to nobody": (SandboxNotFoundException, lambda S, b: S.connect(NOBODY)),
    "connect to no ID": (SandboxNotFoundException, lambda S, b: S.connect("Not_An_ID")),
    "info of nobody": (SandboxNotFoundException, lambda S, b: S.get_info(NOBODY)),
    "limit of nobody": (SandboxNotFoundException, lambda S, b: S.set_timeout(NOBODY, 10)),
    "pause of nobody": (SandboxNotFoundException, lambda S, b: S.pause(NOBODY)),
    "snapshot of nobody": (SandboxNotFoundException, lambda S, b: S.create_snapshot(NOBODY)),
    "fork of nobody": (SandboxNotFoundException, lambda S, b: S.fork(NOBODY)),
    "metrics of nobody": (SandboxNotFoundException, lambda S, b: S.get_metrics(NOBODY)),
    "network of nobody": (SandboxNotFoundException, lambda S, b: S.update_network(NOBODY, {})),
    "a wrong key": (AuthenticationException, lambda S, b: S.create(api_key=WRONG_KEY)),
    "info with a wrong key": (AuthenticationException, lambda S, b: S.get_info(b.sandbox_id, api_key=WRONG_KEY)),
    "kill with a wrong key": (AuthenticationException, lambda S, b: S.kill(b.sandbox_id, api_key=WRONG_KEY)),
    "no such template": ((SandboxException, "404", "no-such"), lambda S, b: S.create("no-such")),
    "a bad name of a template": ((SandboxException, "400", "template"), lambda S, b: S.create("Not A Name")),
    "a limit of nothing": ((SandboxException, "400", "timeout"), lambda S, b: S.create(timeout=0)),
    "a limit too long": ((SandboxException, "400", "timeout"), lambda S, b: S.create(timeout=10**9)),
    "a limit set to nothing": ((SandboxException, "400", "timeout"), lambda S, b: S.set_timeout(b.sandbox_id, -1)),
    "a bad variable": ((SandboxException, "400", "envs"), lambda S, b: S.create(envs={"A=B": "1"})),
    "too much metadata": ((SandboxException, "400", "metadata"), lambda S, b: S.create(metadata={"a": "x" * 100_000})),
    "a rule that is none": ((SandboxException, "400", "allowOut"), lambda S, b: b.update_network({"allow_out": ["no rule!"]})),
    "a name that is denied": ((SandboxException, "400", "denyOut"), lambda S, b: b.update_network({"deny_out": ["example.com"]})),
    "an IPv6 rule": ((SandboxException, "400", "IPv6"), lambda S, b: b.update_network({"deny_out": ["2001:db8::/32"]})),
    "rules of requests": ((SandboxException, "400", "rules"),
                          lambda S, b: S.create(network={"rules": {"a.example": [{"transform": {"headers": {"Host": "b"}}}]}})),
    "a proxy for traffic out": ((SandboxException, "400", "egressProxy"),
                                lambda S, b: S.create(network={"egress_proxy": {"address": "a.example:1080"}})),
    "an MCP gateway": (SandboxException, lambda S, b: S.create(mcp={"exa": {"apiKey": "x"}})),
    "a bad name of a snapshot": ((SandboxException, "400", "name"), lambda S, b: b.create_snapshot("Not A Name")),
    "a snapshot without memory": ((SandboxException, "400", "memory"), lambda S, b: b.create_snapshot(mode="filesystem")),
    "too many forks": (InvalidArgumentException, lambda S, b: b.fork(count=21)),
    "a bad idempotency key": (InvalidArgumentException, lambda S, b: S.create(idempotency_key="Not A Key")),
    "more sandboxes than there is memory": (RateLimitException, lambda S, b: S.create(retries=0)),
    # Files.
    "read of nothing": (FileNotFoundException, lambda S, b: b.files.read("/no/such")),
    "list of nothing": (FileNotFoundException, lambda S, b: b.files.list("/no/such")),
    "info of nothing": (FileNotFoundException, lambda S, b: b.files.get_info("/no/such")),
    "rename of nothing": (FileNotFoundException, lambda S, b: b.files.rename("/no/such", "/tmp/x")),
    "watch of nothing": (NotFoundException, lambda S, b: watch(b, "/no/such")),
    "read of a directory": (InvalidArgumentException, lambda S, b: b.files.read("/tmp")),
    "list of a file": (InvalidArgumentException, lambda S, b: b.files.list("/etc/hostname")),
    "watch of a file": (InvalidArgumentException, lambda S, b: watch(b, "/etc/hostname")),
    "write to a directory": (InvalidArgumentException, lambda S, b: b.files.write("/tmp", "x")),
    "a directory below a file": (InvalidArgumentException, lambda S, b: b.files.make_dir("/etc/hostname/x")),
    "a depth of nothing": (InvalidArgumentException, lambda S, b: b.files.list("/tmp", depth=0)),
    "files of no user": (AuthenticationException, lambda S, b: b.files.read("/etc/hostname", user="nobody-here")),
    "list of no user": (AuthenticationException, lambda S, b: b.files.list("/", user="nobody-here")),
    "a full disk": (NotEnoughSpaceException, lambda S, b: full(b)),
    # Commands and terminals.
    "a command that fails": (CommandExitException, lambda S, b: b.commands.run("exit 3")),
    "a command of no user": (AuthenticationException, lambda S, b: b.commands.run("true", user="nobody-here")),
    "a command in no directory": (InvalidArgumentException, lambda S, b: b.commands.run("true", cwd="/no/such")),
    "a command that takes too long": (TimeoutException, lambda S, b: b.commands.run("sleep 60", timeout=1)),
    "a request that takes too long": (TimeoutException, lambda S, b: b.commands.list(request_timeout=0.0001)),
    "no such process": (NotFoundException, lambda S, b: waited(b.commands.connect(999999))),
    "input to no process": (NotFoundException, lambda S, b: b.commands.send_stdin(999999, "x")),
    "end of input to no process": (NotFoundException, lambda S, b: b.commands.close_stdin(999999)),
    "size of no terminal": (NotFoundException, lambda S, b: b.pty.resize(999999, PtySize(rows=1, cols=1))),
    "terminal of no user": (AuthenticationException, lambda S, b: terminal(b, user="nobody-here")),
    "terminal in no directory": (InvalidArgumentException, lambda S, b: terminal(b, cwd="/no/such")),
    # The wrong sandbox's token.
    "files with a wrong token": (AuthenticationException, lambda S, b: with_a_wrong_token(S, b).files.read("/etc/hostname")),
    "commands with a wrong token": (AuthenticationException, lambda S, b: with_a_wrong_token(S, b).commands.list()),
}


def silent(box):
    try:
        box.commands.list(request_timeout=5)
        return False
    except TimeoutException:
        return True


def watch(box, path):
    if isinstance(box, AsyncSandbox):
        return box.files.watch_dir(path, lambda e: None)
    return box.files.watch_dir(path)


def terminal(box, **o):
    if isinstance(box, AsyncSandbox):
        o["on_data"] = lambda data: None
    return box.pty.create(PtySize(rows=1, cols=1), **o)


def walk(S):
    box = settled(S.create(timeout=600))
    wrong = []
    try:
        for name, (kind, call) in TABLE.items():
            kind, *words = kind if isinstance(kind, tuple) else (kind,)
            try:
                got = settled(call(S, box))
            except kind as e:
                if not all(w in str(e) for w in words):
                    wrong.append(f"{name}: {type(e).__name__} {e} does not say {words}")
            except BaseException as e:
                wrong.append(f"{name}: {type(e).__name__} {e}, want {kind.__name__}")
            else:
                wrong.append(f"{name}: {got!r}, want {kind.__name__}")
        assert not wrong, "\n".join(wrong)
    finally:
        settled(box.kill())


@check
def every_bad_input_synchronous():
    walk(Sandbox)


@check
def every_bad_input_asynchronous():
    walk(AsyncSandbox)


@check
def a_sandbox_that_is_paused_or_gone():
    for S in (Sandbox, AsyncSandbox):
        box = settled(S.create(timeout=600))
        try:
            h = settled(box.commands.run("sleep 1000", background=True, timeout=0))
            settled(box.pause())
            raises(SandboxNotRunningException, lambda: settled(box.commands.run("true")))
            raises(SandboxNotRunningException, lambda: settled(box.files.read("/etc/hostname")))
            raises(SandboxNotRunningException, lambda: settled(box.files.list("/")))
            raises(SandboxNotFoundException, lambda: settled(box.set_timeout(10)))
            settled(box.connect(timeout=600))
        finally:
            settled(box.kill())
        raises(SandboxNotRunningException, lambda: settled(box.commands.run("true")))
        raises(TimeoutException, lambda: settled(h.wait()))
        raises(SandboxNotFoundException, lambda: settled(box.get_info()))
        assert settled(box.kill()) is False


@check
def a_guest_agent_that_does_not_answer():
    box = Sandbox.create(timeout=600)
    try:
        assert box.pause(strict=True) is True and box.pause(strict=True) is False
        box.connect(timeout=600)
        # A guest may stop its own agent, the parent of its commands; here once
        # the agent has said that the command runs.
        h = box.commands.run("read line; kill -STOP $PPID", background=True, user="root", stdin=True)
        try:
            h.send_stdin("now\n", request_timeout=5)
        except TimeoutException:
            pass
        eventually(lambda: silent(box))
        raises(ServiceBusyException, lambda: box.pause(strict=True, retries=0))
        assert box.get_info().state == "running"
    finally:
        box.kill()


async def flood():
    """Sends many requests under our key on one connection: the limit is one of
    requests in a second, which an SDK on a slow machine does not reach alone."""
    url = urllib.parse.urlsplit(os.environ["E2B_API_URL"])
    answers, s = await asyncio.open_connection(url.hostname, url.port)
    head = f"GET {url.path}/sandboxes/{NOBODY} HTTP/1.1\r\nHost: wrenn\r\nX-API-Key: {os.environ['E2B_API_KEY']}\r\n\r\n"
    s.write(head.encode() * 5000)

    async def listen():
        try:
            while await answers.read(1 << 16):
                pass
        finally:
            s.transport.abort()

    return asyncio.create_task(listen())


@check
def too_many_requests():
    async def many():
        others = [await flood() for _ in range(2)]
        last = None
        for _ in range(1000):
            if isinstance(last, RateLimitException):
                break
            last = await checks.araises((RateLimitException, SandboxNotFoundException), AsyncSandbox.get_info(NOBODY, retries=0))
        for o in others:
            o.cancel()
        assert isinstance(last, RateLimitException), "no request was one too many"
        # By itself the SDK waits as long as it is told to.
        await checks.araises(SandboxNotFoundException, AsyncSandbox.get_info(NOBODY))

    settled(many())


main()
