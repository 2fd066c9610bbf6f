"""Rules of outgoing requests: headers that the guest never has."""

import hashlib
import os

from e2b import CommandExitException, Sandbox
from e2b.exceptions import InvalidArgumentException

from checks import check, main, raises

API, EVIL = os.environ["API_ADDR"], os.environ["EVIL_ADDR"]
KEY = "top-" + "secret-" + "key"
SEEN = hashlib.sha256(KEY.encode()).hexdigest()


def rules(key=KEY):
    return {"*.rules.test": [{"transform": {"headers": {"x-api-key": key}}}]}


def closed(key=KEY):
    return {"allow_out": lambda ctx: list(ctx.rules), "deny_out": lambda ctx: [ctx.all_traffic], "rules": rules(key)}


box = Sandbox.create(timeout=900, network=closed())


def curl(s, args):
    return s.commands.run("curl -sS --max-time 60 " + args, timeout=120).stdout.split()


@check
def requests_get_the_headers():
    assert curl(box, "https://api.rules.test/") == ["api.rules.test", SEEN, "HTTP/2.0"]
    assert curl(box, "-H 'X-Api-Key: mine' https://api.rules.test/")[1] == SEEN
    assert curl(box, "http://api.rules.test/") == ["api.rules.test", SEEN, "HTTP/1.1"]
    out = box.commands.run("""python3 -c 'import urllib.request as u; print(u.urlopen("https://api.rules.test/").read().decode())'""", timeout=120).stdout
    assert out.split()[1] == SEEN, out
    assert box.get_info().network["rules"] == {"*.rules.test": [{"transform": {"headers": {"X-Api-Key": KEY}}}]} or \
        box.get_info().network["rules"] == rules(), box.get_info().network


@check
def the_guest_has_no_secret():
    found = box.commands.run("grep -rslF %s-%s /proc/[0-9]*/environ /etc /home /run /tmp /var || true" % ("top", "secret"), user="root", timeout=120).stdout
    assert found == "", found


@check
def a_rule_opens_nothing_and_nobody_else_gets_the_headers():
    # A name with a private address is not reached, one whose host cannot prove it
    # gets nothing, and what no name has is closed.
    assert raises(CommandExitException, lambda: curl(box, "--fail http://inner.rules.test/")).exit_code != 0
    out = box.commands.run("curl -sS --max-time 60 https://rebound.rules.test/", timeout=120).stdout
    assert "certificate" in out and SEEN not in out, out
    raises(CommandExitException, lambda: curl(box, f"--connect-timeout 2 --resolve evil.example:443:{EVIL.replace(EVIL, '203.0.113.255')} -k https://evil.example/"))


@check
def an_open_sandbox_keeps_the_headers_from_others():
    s = Sandbox.create(timeout=300, network={"rules": rules()})
    try:
        # The guest's own idea of where the name is counts for nothing.
        for scheme, port in (("https", 443), ("http", 80)):
            assert curl(s, f"--resolve api.rules.test:{port}:{EVIL} {scheme}://api.rules.test/")[:2] == ["api.rules.test", SEEN]
        # What no rule is about arrives untouched.
        assert curl(s, f"-k --resolve evil.example:443:{EVIL} https://evil.example/")[:2] == ["evil.rules.test", "-"]
        assert curl(s, f"http://{EVIL}/")[:2] == ["evil.rules.test", "-"]
    finally:
        s.kill()


@check
def rules_outlive_pauses_and_go_to_forks_alone():
    box.pause()
    box.connect(timeout=900)
    assert curl(box, "https://api.rules.test/")[1] == SEEN
    box.pause(keep_memory=False)
    box.connect(timeout=900)
    assert curl(box, "https://api.rules.test/")[1] == SEEN
    fork = box.fork(timeout=300)[0]
    snap = box.create_snapshot(name="rules-test")
    child = Sandbox.create(snap.snapshot_id, timeout=300)
    try:
        assert curl(fork, "https://api.rules.test/")[1] == SEEN
        assert child.get_info().network.get("rules") is None
        assert curl(child, f"-k --resolve api.rules.test:443:{API} https://api.rules.test/")[:2] == ["api.rules.test", "-"]
    finally:
        fork.kill()
        child.kill()


@check
def rules_change_at_once():
    box.update_network(closed("another"))
    assert curl(box, "https://api.rules.test/")[1] == hashlib.sha256(b"another").hexdigest()
    box.update_network({"allow_out": ["*.rules.test"], "deny_out": ["0.0.0.0/0"]})
    assert curl(box, "-k https://api.rules.test/")[:2] == ["api.rules.test", "-"]
    assert box.get_info().network.get("rules") is None
    for bad in ({"*": []}, {"192.0.2.1": []}, {"a.example": [{"transform": {"headers": {"Host": "b"}}}]},
                {"a.example": [{"transform": lambda ctx: {"headers": {"X": ctx.iam.tokens["aws"]}}}]}):
        e = raises(Exception, lambda: box.update_network({"rules": bad}))
        assert "rules" in str(e) and "400" in str(e) or isinstance(e, InvalidArgumentException), repr(e)
    box.kill()


main()
