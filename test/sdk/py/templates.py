"""Template builds, synchronous and asynchronous."""

import os
import shutil
import tempfile

from e2b import AsyncTemplate, Sandbox, Template, wait_for_port
from e2b.exceptions import BuildException, SandboxException

from checks import check, main, raises

context = tempfile.mkdtemp()
for name, text in {"app/main.txt": "from the context", "app/sub/x.sh": "echo ran", "one.conf": "1", "two.conf": "2"}.items():
    path = os.path.join(context, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write(text)


def new():
    return Template(file_context_path=context)


@check
def build_with_files_and_start_command():
    t = (
        new()
        .from_base_image()
        .set_envs({"COLOR": "gr een", "PORT": "8123"})
        .copy("app", "/srv/app")
        .copy("*.conf", "/srv/conf/")
        .copy("app/sub/x.sh", "/usr/local/bin/x.sh", user="root", mode=0o755)
        .set_workdir("/srv/app")
        .run_cmd(["echo built >built.txt", "echo $COLOR >color.txt"])
        .run_cmd("id -un >/who", user="root")
        .set_start_cmd("python3 -m http.server $PORT", wait_for_port(8123))
    )
    logs = []
    info = Template.build(t, "sdk-py", on_build_logs=lambda e: logs.append(e.message))
    assert info.name == "sdk-py", info
    assert any("RUN echo built" in m for m in logs), logs
    assert Template.get_build_status(info).status.value == "ready"
    with Sandbox.create("sdk-py", timeout=120) as box:
        out = box.commands.run("pwd; cat built.txt color.txt /who main.txt; echo; x.sh; echo $COLOR; whoami; stat -c %U main.txt").stdout
        assert out == "/srv/app\nbuilt\ngr een\nroot\nfrom the context\nran\ngr een\nuser\nuser\n", out
        assert box.commands.run("cat /srv/conf/one.conf /srv/conf/two.conf").stdout == "12"
        # The start command has been running since before the sandbox was made.
        assert "built.txt" in box.commands.run("curl -s localhost:8123/").stdout
        assert box.commands.run("echo $COLOR", envs={"COLOR": "red"}).stdout == "red\n"


@check
def from_template_and_tags():
    t = new().from_template("sdk-py").run_cmd("echo second >/tmp/second").set_user("root")
    info = Template.build(t, "sdk-py-two:v1", tags=["stable"])
    assert sorted(info.tags) == ["stable", "v1"], info.tags
    assert Template.exists("sdk-py-two:v1") and not Template.exists("sdk-py-two:v2")
    tagged = Template.assign_tags("sdk-py-two:v1", ["prod"])
    assert tagged.build_id == info.build_id and tagged.tags == ["prod"], tagged
    assert sorted(x.tag for x in Template.get_tags("sdk-py-two")) == ["prod", "stable", "v1"]
    Template.remove_tags("sdk-py-two", ["stable"])
    assert sorted(x.tag for x in Template.get_tags("sdk-py-two")) == ["prod", "v1"]
    with Sandbox.create("sdk-py-two:prod", timeout=120) as box:
        assert box.commands.run("cat /tmp/second; echo $COLOR; whoami").stdout == "second\ngr een\nroot\n"
    raises(SandboxException, lambda: Sandbox.create("sdk-py-two:stable"))


@check
def failed_build_tells_and_leaves_nothing():
    t = new().from_base_image().run_cmd("echo before").run_cmd("echo the reason >&2; exit 7")
    logs = []
    e = raises(BuildException, lambda: Template.build(t, "sdk-py-bad", on_build_logs=lambda e: logs.append(e.message)))
    assert "exited with 7" in str(e) and "the reason" in str(e), e
    assert "the reason" in logs, logs
    assert not Template.exists("sdk-py-bad")
    assert not [s for s in Sandbox.list().next_items() if "wrenn.template-build" in (s.metadata or {})]


@check
def what_cannot_be_built():
    e = raises(BuildException, lambda: Template.build(new().from_image("alpine:3"), "sdk-py-no"))
    assert "fromTemplate" in str(e), e
    e = raises(BuildException, lambda: Template.build(new().from_base_image(), "Not A Name"))
    assert "name" in str(e), e
    e = raises(BuildException, lambda: Template.build(new().from_template("sdk-none"), "sdk-py-no"))
    assert "sdk-none" in str(e), e
    assert not Template.exists("sdk-py-no")


@check
async def asynchronous():
    t = AsyncTemplate(file_context_path=context).from_python_image("3.11").copy("one.conf", "/tmp/").run_cmd("cp /tmp/one.conf /tmp/three.conf")
    info = await AsyncTemplate.build(t, "sdk-py-async")
    assert await AsyncTemplate.exists("sdk-py-async")
    with Sandbox.create(info.template_id, timeout=120) as box:
        assert box.files.read("/tmp/three.conf") == "1"


try:
    main()
finally:
    shutil.rmtree(context)
