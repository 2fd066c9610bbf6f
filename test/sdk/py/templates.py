"""Builds of templates: every kind of step, the start command, tags, logs, failures."""

import asyncio
import os
import tempfile
import traceback
import urllib.request

from e2b import (
    AsyncTemplate,
    Sandbox,
    Template,
    wait_for_file,
    wait_for_port,
    wait_for_process,
)
from e2b.exceptions import (
    AuthenticationException,
    BuildException,
    SandboxException,
    TemplateException,
)

from checks import check, eventually, main, raises

ctx = tempfile.mkdtemp()


def local(name, text, mode=0o644):
    path = os.path.join(ctx, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, mode)


local("app/index.html", "a page\n")
local("app/sub/data ü.txt", "data\n")
local("app/left-out.log", "no\n")
local("run.sh", "#!/bin/sh\necho $GREETING\n")
local("a.conf", "a\n")
local("b.conf", "b\n")
local(".dockerignore", "*.log\n**/*.log\n")
os.symlink("index.html", os.path.join(ctx, "app/link"))


def whole():
    return (
        Template(file_context_path=ctx)
        .from_base_image()
        .set_envs({"GREETING": "hello wörld $x", "PORT": "8000"})
        .copy("app", "/srv/app")
        .copy("run.sh", "/usr/local/bin/greet", user="root", mode=0o755)
        .copy(["a.conf", "b.conf"], "/etc/my/", user="root:root")
        .copy_items([{"src": "*.conf", "dest": "/srv/all/", "mode": 0o600}])
        .set_workdir("/srv/app")
        .run_cmd(["pwd > where", "echo $GREETING > env", "id -un > who"])
        .run_cmd("id -un > /root/who", user="root")
        .make_dir(["made/deep", "made/too"], mode=0o700)
        .make_symlink("index.html", "second")
        .rename("where", "moved")
        .run_cmd("touch gone")
        .remove("gone")
        .run_cmd("git init -q /tmp/repo && git -C /tmp/repo -c user.name=n -c user.email=e commit -q --allow-empty -m one")
        .git_clone("file:///tmp/repo", "/srv/app/clone", depth=1)
        .run_cmd("useradd -m worker && chown -R worker /srv/app", user="root")
        .set_user("worker")
        .run_cmd("echo to stdout; echo to stderr >&2")
        .set_start_cmd("python3 -m http.server $PORT", wait_for_port(8000))
    )


@check
def a_build_with_logs_tags_and_size():
    logs = []
    info = Template.build(whole(), "whole:v1", tags=["stable"], cpu_count=2, memory_mb=256, on_build_logs=logs.append)
    assert info.template_id == "whole" and info.build_id and sorted(info.tags) == ["stable", "v1"], info
    text = [e.message for e in logs]
    assert "to stdout" in text and "to stderr" in text, text
    assert any(m.startswith("Uploaded 'app'") for m in text), text
    assert any(m.startswith("RUN pwd > where") for m in text), text
    assert [e.level for e in logs if e.message == "to stdout"] == ["info"]


@check
def sandboxes_have_what_was_built():
    s = Sandbox.create("whole:v1", timeout=300)
    try:
        r = s.commands.run("pwd; id -un; echo $GREETING; greet")
        assert r.stdout == "/srv/app\nworker\nhello wörld $x\nhello wörld $x\n", r.stdout
        assert s.commands.run("cat moved env who; sudo cat /root/who 2>/dev/null || true").stdout.startswith("/srv/app\nhello wörld $x\nuser\n")
        assert s.commands.run("ls -A").stdout.split("\n")[:-1] == [
            "clone", "env", "index.html", "link", "made", "moved", "second", "sub", "who"], s.commands.run("ls -A").stdout
        assert s.commands.run("cat link; cat 'sub/data ü.txt'; readlink link second").stdout == "a page\ndata\nindex.html\nindex.html\n"
        assert s.commands.run("stat -c %a:%U made/deep /usr/local/bin/greet /etc/my/a.conf").stdout == "700:worker\n755:root\n644:root\n"
        assert s.commands.run("sudo stat -c %a:%U /srv/all/a.conf /srv/all/b.conf", user="user").stdout == "600:user\n600:user\n"
        assert s.commands.run("git -C clone log --format=%s").stdout == "one\n"
        info = s.get_info()
        assert (info.template_id, info.name, info.cpu_count, info.memory_mb) == ("whole", "whole", 2, 256), info
        page = s.commands.run("curl -s http://localhost:8000/index.html").stdout
        assert page == "a page\n", "the start command's process is in the template"
        url = os.environ["E2B_SANDBOX_URL"] + "/index.html"
        r = urllib.request.Request(url, headers={"E2b-Sandbox-Id": s.sandbox_id, "E2b-Sandbox-Port": "8000"})
        assert urllib.request.urlopen(r).read() == b"a page\n"
        # What a sandbox names itself comes first.
        other = Sandbox.create("whole:stable", timeout=300, envs={"GREETING": "mine"})
        try:
            assert other.commands.run("echo $GREETING; pwd", cwd="/tmp", user="user").stdout == "mine\n/tmp\n"
        finally:
            other.kill()
    finally:
        s.kill()


@check
def names_and_tags():
    assert Template.exists("whole:v1") is True and Template.exists("whole:stable") is True
    assert Template.exists("whole") is True, "a template whose default tag was never given"
    assert Template.alias_exists("no-such") is False and Template.exists("whole:no") is False
    assert Template.exists("ns/no:such") is False
    got = Template.assign_tags("whole:v1", ["prod", "default"])
    tags = {t.tag: t.build_id for t in Template.get_tags("whole")}
    assert sorted(tags) == ["default", "prod", "stable", "v1"] and set(tags.values()) == {got.build_id}, tags
    Template.remove_tags("whole", "stable")
    Template.remove_tags("whole", ["prod", "never-there"])
    assert sorted(t.tag for t in Template.get_tags("whole")) == ["default", "v1"]
    assert Template.exists("whole:stable") is False
    assert "404" in str(raises(SandboxException, lambda: Sandbox.create("whole:stable")))
    raises(TemplateException, lambda: Template.assign_tags("no-such", "x"))
    raises(TemplateException, lambda: Template.assign_tags("whole:v1", "not a tag"))
    raises(TemplateException, lambda: Template.get_tags("no-such"))
    raises(TemplateException, lambda: Template.remove_tags("no-such", "x"))


@check
def a_build_from_a_template_in_the_background():
    t = (
        Template(file_context_path=ctx)
        .from_template("whole:v1")
        .run_cmd("echo $GREETING > child")
        .set_start_cmd("sleep 1000 & touch /tmp/up; wait", wait_for_file("/tmp/up"))
    )
    info = Template.build_in_background(t, "child")
    offset, lines = 0, []

    def ended():
        nonlocal offset
        s = Template.get_build_status(info, logs_offset=offset)
        offset += len(s.log_entries)
        lines.extend(e.message for e in s.log_entries)
        assert s.status != "error", s
        return s if s.status == "ready" else None

    s = eventually(ended, 240)
    assert s.build_id == info.build_id and s.template_id == "child", s
    assert "RUN echo $GREETING > child" in lines, lines
    box = Sandbox.create("child", timeout=300)
    try:
        assert box.commands.run("cat child; id -un; pgrep -c sleep").stdout == "hello wörld $x\nworker\n1\n"
    finally:
        box.kill()


@check
def a_build_that_fails_says_where_and_why():
    before = Template.get_tags("child")[0].build_id
    logs = []
    t = Template().from_template("child").run_cmd("true")
    t = t.run_cmd("echo the reason >&2; exit 7")  # the line that is to blame
    e = raises(BuildException, lambda: Template.build(t, "child", on_build_logs=logs.append))
    assert "exited with 7" in str(e) and "the reason" in str(e), e
    assert any("the line that is to blame" in (f.line or "") for f in traceback.extract_tb(e.__traceback__)), "the step's own line is named"
    assert any(m.level == "error" for m in logs), logs
    assert Template.get_tags("child")[0].build_id == before, "a failed build moves no name"


@check
def a_start_command_that_fails_ends_the_build():
    t = Template().from_template("child").set_start_cmd("echo no start >&2; exit 9", wait_for_process("never-there"))
    e = raises(BuildException, lambda: Template.build(t, "bad-start"))
    assert "start command" in str(e) and "no start" in str(e), e
    assert Template.exists("bad-start") is False


@check
def bad_input_is_refused_by_name():
    def build(t, name="refused", **o):
        return raises(BuildException, lambda: Template.build(t, name, **o))

    ok = Template().from_base_image()
    assert "fromImage" in str(build(Template().from_image("localhost:1/x"))), "an image that cannot be had"
    assert "fromImageRegistry" in str(build(Template().from_aws_registry("x/y", access_key_id="u", secret_access_key="p", region="r")))
    assert "no-such" in str(build(Template().from_template("no-such").run_cmd("true")))
    assert "name" in str(build(ok, "Not A Name"))
    assert "tags" in str(build(ok, "refused", tags=["not a tag"]))
    assert "cpuCount" in str(build(ok, cpu_count=1000))
    assert "memoryMB" in str(build(ok, memory_mb=1))
    assert "USER" in str(build(ok.set_user("not a user")))
    assert "no user nobody-here" in str(build(Template().from_base_image().set_user("nobody-here")))
    assert "snapshot" in str(build(ok, "base")), "a name that something else has"
    missing = Template(file_context_path=ctx).from_base_image().copy("no-such-file", "/x")
    raises((ValueError, BuildException), lambda: Template.build(missing, "refused"))
    raises(AuthenticationException, lambda: Template.build(ok, "refused", api_key="e2b_" + "0" * 40))
    raises(AuthenticationException, lambda: Template.exists("whole", api_key="e2b_" + "0" * 40))
    assert Template.exists("refused") is False


@check
def a_dockerfile():
    t = Template(file_context_path=ctx).from_dockerfile(
        'FROM e2bdev/base\nENV A="one two" B=2\nWORKDIR /work\nCOPY --chown=user:user a.conf ./copied\n'
        "RUN <<END\necho \"$A\" > out\nid -un >> out\nEND\nRUN [\"sh\", \"-c\", \"echo exec >> out\"]\n")
    Template.build(t, "by-dockerfile", skip_cache=True)
    box = Sandbox.create("by-dockerfile", timeout=300)
    try:
        assert box.commands.run("cat /work/out /work/copied; stat -c %U /work/copied; echo $A $B").stdout == (
            "one two\nroot\nexec\na\nuser\none two 2\n")
    finally:
        box.kill()


@check
async def asynchronous_builds():
    logs = []
    t = AsyncTemplate(file_context_path=ctx).from_template("child").copy("a.conf", "/srv/async.conf", user="root")
    one, two = await asyncio.gather(
        AsyncTemplate.build(t, "async-one", on_build_logs=logs.append),
        AsyncTemplate.build_in_background(AsyncTemplate().from_template("child").run_cmd("exit 3"), "async-two"),
    )
    assert one.template_id == "async-one" and await AsyncTemplate.exists("async-one")
    assert any(m.message.startswith("COPY a.conf") for m in logs), logs
    while (s := await AsyncTemplate.get_build_status(two)).status in ("building", "waiting"):
        await asyncio.sleep(0.2)
    assert s.status == "error" and s.reason.step == "1" and "exited with 3" in s.reason.message, s
    await AsyncTemplate.assign_tags("async-one", ["x"])
    assert sorted(t.tag for t in await AsyncTemplate.get_tags("async-one")) == ["default", "x"]
    await AsyncTemplate.remove_tags("async-one", "x")
    try:
        await AsyncTemplate.build(AsyncTemplate().from_image("localhost:1/x"), "async-three")
        raise AssertionError("an image that cannot be had was taken")
    except BuildException as e:
        assert "fromImage" in str(e), e


@check
def templates_are_removed():
    # The SDKs have no call for it; to the surface a template is deleted as a
    # snapshot is.
    for name in ("async-one", "child", "whole", "by-dockerfile"):
        assert Sandbox.delete_snapshot(name) is True, name
        assert Template.exists(name) is False
    assert Sandbox.delete_snapshot("whole") is False


main()
