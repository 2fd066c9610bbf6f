"""The clients of the code interpreter against the template of examples/code-interpreter."""

import asyncio
import os
import sys

from e2b import NotFoundException, Template, TimeoutException
from e2b_code_interpreter import AsyncSandbox, Sandbox

from checks import check, main, raises

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../examples/code-interpreter"))
from build import template  # noqa: E402

box = None


@check
def the_template_is_built():
    global box
    Template.build(template, "code-interpreter-v1")
    box = Sandbox.create(timeout=600)
    assert box.get_info().template_id == "code-interpreter-v1"


@check
def cells_have_a_state_output_and_results():
    e = box.run_code("import sys\nx = 20\nprint('one')\nprint('two', file=sys.stderr)\nx + 1")
    assert (e.text, e.logs.stdout, e.logs.stderr, e.error) == ("21", ["one\n"], ["two\n"], None), e
    lines, results = [], []
    e = box.run_code("for i in range(3): print(i)\nx", on_stdout=lambda m: lines.append(m.line), on_result=results.append)
    assert "".join(lines) == "0\n1\n2\n" and results[0].text == "20" and e.execution_count == 2, (lines, results, e)
    e = box.run_code("class H:\n  def _repr_html_(self): return '<b>h</b>'\ndisplay(H())\nH()")
    assert [(r.html, r.is_main_result) for r in e.results] == [("<b>h</b>", False), ("<b>h</b>", True)], e.results
    assert box.run_code("!echo by a shell").logs.stdout == ["by a shell\n"]
    assert box.run_code("import asyncio\nawait asyncio.sleep(0.01)\n'awaited'").text == "'awaited'"
    assert box.run_code("import os; os.environ['A']", envs={"A": "b"}).text == "'b'"
    assert box.run_code("os.environ.get('A')").text is None
    assert box.run_code("print('ü' * 100_000)").logs.stdout != [] and box.run_code("len('ü')").text == "1"
    assert box.run_code("echo $0 $((6 * 7))", language="bash").logs.stdout == ["/bin/bash 42\n"]


@check
def errors_of_cells():
    seen = []
    e = box.run_code("def f():\n  return 1 / 0\nf()", on_error=seen.append)
    assert e.error.name == "ZeroDivisionError" and "return 1 / 0" in e.error.traceback and seen, e.error
    assert box.run_code("not python at all").error.name == "SyntaxError"
    assert box.run_code("import sys; sys.exit(3)").error.name == "SystemExit"
    raises(TimeoutException, lambda: box.run_code("while True: pass", timeout=2))
    assert box.run_code("x").text == "20", "a client that gives up ends its cell, not the interpreter"
    assert box.run_code("import os; os._exit(1)").error.name == "ContextDied"
    assert box.run_code("x").error.name == "NameError"
    raises(Exception, lambda: box.run_code("1", language="cobol"))


@check
def contexts_are_apart():
    box.run_code("y = 'default'")
    c = box.create_code_context(cwd="/tmp")
    assert (c.language, c.cwd) == ("python", "/tmp") and c.id in [o.id for o in box.list_code_contexts()]
    assert box.run_code("import os; os.getcwd()", context=c).text == "'/tmp'"
    assert box.run_code("y", context=c).error.name == "NameError" and box.run_code("y").text == "'default'"
    box.run_code("z = 1", context=c)
    box.restart_code_context(c)
    assert box.run_code("z", context=c).error.name == "NameError"
    box.remove_code_context(c)
    raises(NotFoundException, lambda: box.run_code("1", context=c))


@check
def interpreters_outlive_a_pause():
    box.run_code("kept = 'kept'")
    box.pause()
    box.connect(timeout=600)
    assert box.run_code("kept").text == "'kept'"


@check
async def asynchronous_cells():
    s = await AsyncSandbox.create(timeout=300)
    try:
        e, f = await asyncio.gather(s.run_code("import time; time.sleep(0.2); 1"), s.run_code("echo 2", language="bash"))
        assert e.text == "1" and f.logs.stdout == ["2\n"], (e, f)
        c = await s.create_code_context()
        assert (await s.run_code("3", context=c)).text == "3"
        await s.remove_code_context(c)
    finally:
        await s.kill()


@check
def the_sandbox_is_like_any_other():
    assert box.commands.run("id -un").stdout == "user\n"
    box.kill()
    raises(TimeoutException, lambda: box.commands.run("true"))


main()
