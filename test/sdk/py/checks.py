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


class _Recorder:
    """Stands in a class in place of one of its methods and notes who asks for it."""

    def __init__(self, inner, name, asked):
        self.inner, self.name, self.asked = inner, name, asked

    def __get__(self, obj, owner=None):
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("e2b"):
            self.asked.add(self.name)
        return self.inner.__get__(obj, owner)


def every_method_of(*classes, but=()):
    """Makes a function that gives the public methods of classes that no check used.

    but names those that have nothing to do with a server of ours.
    """
    every, asked = set(), set()
    for c in classes:
        for owner in c.__mro__[:-1]:
            for name, inner in list(vars(owner).items()):
                if name.startswith("_") or not callable(getattr(c, name)) or isinstance(inner, (type, _Recorder)):
                    continue
                full = f"{c.__name__}.{name}"
                every.add(full)
                setattr(owner, name, _Recorder(inner, full, asked))
    wrong = set(but) - every
    assert not wrong, f"there are no methods {wrong}"
    return lambda: sorted(every - asked - set(but))


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
