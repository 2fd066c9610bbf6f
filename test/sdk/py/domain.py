"""Everything by names below a domain, over TLS."""

import os
import ssl
import urllib.error
import urllib.request

from e2b import Sandbox, TimeoutException

from checks import check, eventually, main, raises

box = Sandbox.create(timeout=300)
tls = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])


@check
def python_commands_and_files_over_tls():
    assert box.sandbox_domain == os.environ["E2B_DOMAIN"], box.sandbox_domain
    assert box.commands.run("echo tls").stdout == "tls\n"
    data = os.urandom(2 << 20)
    box.files.write("f", data)
    assert bytes(box.files.read("f", format="bytes")) == data
    assert urllib.request.urlopen(box.download_url("f"), context=tls).read() == data


@check
def python_published_ports():
    box.commands.run("echo page > index.html; python3 -m http.server 8080 >/dev/null 2>&1", background=True, timeout=0)
    url = f"https://{box.get_host(8080)}/index.html"

    def page():
        try:
            return urllib.request.urlopen(url, context=tls).read()
        except urllib.error.HTTPError as e:
            assert e.code == 502 and b"port is not open" in e.read(), e
            return None

    assert eventually(page) == b"page\n"


@check
def python_kill_while_streaming_over_http2():
    h = box.commands.run("sleep 1000", background=True, timeout=0)
    assert box.kill() is True
    e = raises(TimeoutException, h.wait)
    assert "sandbox was killed" in str(e), e
    assert not box.is_running()


main()
