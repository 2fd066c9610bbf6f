"""Templates from container images, of a registry that stands for Docker Hub."""

import os

from e2b import Sandbox, Template, wait_for_file
from e2b.exceptions import BuildException

from checks import check, main, raises

registry = os.environ["WRENN_TEST_REGISTRY"]
digest = os.environ["WRENN_TEST_DIGEST"]


@check
def a_private_image_by_its_digest():
    ref = f"{registry}/private/app@{digest}"
    e = raises(BuildException, lambda: Template.build(Template().from_image(ref), "by-image"))
    assert "fromImageRegistry" in str(e) and "credentials" in str(e), e
    e = raises(BuildException, lambda: Template.build(Template().from_image(ref, username="me", password="not-it"), "by-image"))
    assert "does not take" in str(e) and "not-it" not in str(e), e
    logs = []
    t = (
        Template()
        .from_image(ref, username="me", password="secret")
        .run_cmd("tool > built; id -un >> built; pwd >> built")
        .set_start_cmd("touch /tmp/up; sleep 100000", wait_for_file("/tmp/up"))
    )
    Template.build(t, "by-image", memory_mb=256, on_build_logs=logs.append)
    text = [m.message for m in logs]
    assert any(m.startswith("FROM " + ref + " (2 layers") for m in text), text
    assert "Layer 2 of 2 (1 KiB)" in text, text
    assert any(m.level == "warn" and "without sudo" in m.message for m in logs), text
    assert any("user (\"app\") and directory (\"/srv\") are not taken" in m for m in text), text


@check
def sandboxes_of_it_are_the_image_and_a_sandbox():
    # A machine that is busy boots slowly.
    slow = {"timeout": 900, "request_timeout": 500}
    box = Sandbox.create("by-image", **slow)
    try:
        got = box.commands.run("cat built; tool; echo $FLAVOUR; id -un; pwd").stdout
        assert got == "the tool\nuser\n/home/user\nthe tool\nfrom the image\nuser\n/home/user\n", got
        got = box.commands.run("id -u; id -u app; cat ~/.profile; ls /etc/gone 2>&1 || true").stdout
        assert got.startswith("1001\n1000\n# from the image\nls: "), got
        # Nothing of base is left, but what a sandbox has.
        got = box.commands.run("ls -A /; ls /usr/bin/python3 2>/dev/null || true").stdout.split()
        assert got == [
            "bin", "dev", "etc", "home", "lib", "lib64", "lost+found", "opt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var"], got
        assert box.commands.run("cat /etc/hostname /etc/resolv.conf", user="root").stdout.startswith(box.sandbox_id)
        box.files.write("hello.txt", "text")
        assert box.files.read("/home/user/hello.txt") == "text"
        # It goes through what every sandbox goes through.
        pid = box.commands.run("sleep 1000", background=True).pid
        box.pause()
        box = Sandbox.connect(box.sandbox_id, **slow)
        assert pid in [p.pid for p in box.commands.list()]
        box.pause(keep_memory=False, request_timeout=500)
        box = Sandbox.connect(box.sandbox_id, **slow)
        assert box.commands.run("cat hello.txt; tool").stdout == "textthe tool\n"
    finally:
        box.kill()


@check
def images_that_cannot_be_had_are_refused_by_name():
    def refused(t):
        e = raises(BuildException, lambda: Template.build(t, "refused"))
        assert "fromImage" in str(e), e
        return str(e)

    # From here on the registry stands for Docker Hub.
    assert "no image docker.io/library/python:4" in refused(Template().from_python_image("4"))
    assert "no image docker.io/library/python:5" in refused(Template().from_image("docker.io/python:5"))
    assert "no reference" in refused(Template().from_image("not a name"))
    assert "no bash" in refused(Template().from_image("bashless:1"))
    # Nothing on this machine is reached by naming it.
    for host in ("127.0.0.1:22", "localhost:8000", "169.254.169.254", "10.0.0.1"):
        assert "not allowed" in refused(Template().from_image(host + "/x:1")), host
    assert "aws" in refused(Template().from_aws_registry("1.dkr.ecr.eu-west-1.amazonaws.com/x:1", access_key_id="a", secret_access_key="b", region="eu-west-1"))


@check
def what_was_built_is_removed():
    assert Sandbox.delete_snapshot("by-image") is True


main()
