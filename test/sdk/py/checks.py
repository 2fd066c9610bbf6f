"""Names checks, runs them one after the other and prints a line for each.

The Go test that starts a script makes a subtest of every line.
"""

import asyncio
import inspect
import json
import sys
import time
import traceback

_checks = []


def check(f):
    _checks.append(f)
    return f


def main():
    failed = False
    for f in _checks:
        start = time.monotonic()
        try:
            if inspect.iscoroutinefunction(f):
                _loop.run_until_complete(f())
            else:
                f()
            out = {"name": f.__name__, "ok": True}
        except BaseException:
            failed = True
            out = {"name": f.__name__, "ok": False, "why": traceback.format_exc()}
        out["seconds"] = round(time.monotonic() - start, 2)
        print("CHECK " + json.dumps(out), flush=True)
    sys.exit(1 if failed else 0)


_loop = asyncio.new_event_loop()


def raises(kinds, call):
    """The exception of one of these classes that call raises."""
    try:
        got = call()
    except kinds as e:
        return e
    raise AssertionError(f"no {kinds} was raised; got {got!r}")


async def araises(kinds, awaitable):
    try:
        got = await awaitable
    except kinds as e:
        return e
    raise AssertionError(f"no {kinds} was raised; got {got!r}")


def eventually(ask, limit=60):
    """Asks until the answer is true: for facts that send no event."""
    end = time.monotonic() + limit
    while True:
        got = ask()
        if got:
            return got
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)
