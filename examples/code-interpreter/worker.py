"""An interpreter that runs cells from its standard input, one line of JSON each.

Messages go to the file descriptor that its argument names; output goes where
the cell sends it, with the cell's mark behind it.
"""

import ast
import asyncio
import base64
import inspect
import json
import linecache
import os
import re
import subprocess
import sys
import traceback

# Methods by which objects show themselves, and what the clients call the forms.
FORMS = {
    "_repr_html_": "html", "_repr_markdown_": "markdown", "_repr_svg_": "svg", "_repr_png_": "png", "_repr_jpeg_": "jpeg",
    "_repr_pdf_": "pdf", "_repr_latex_": "latex", "_repr_json_": "json", "_repr_javascript_": "javascript",
}
out = os.fdopen(int(sys.argv[1]), "w", buffering=1)
cells = sys.stdin
sys.stdout.reconfigure(line_buffering=True)
sys.stdin = open(os.devnull)
scope = {"__name__": "__main__", "__builtins__": __builtins__}
count = 0
loop = asyncio.new_event_loop()


def tell(**message):
    out.write(json.dumps(message) + "\n")


def forms(value):
    shown = {"text": repr(value)}
    for method, form in FORMS.items():
        show = getattr(type(value), method, None)
        try:
            data = show(value) if show else None
        except Exception:
            continue
        if isinstance(data, tuple):
            data = data[0]
        if isinstance(data, bytes):
            data = base64.b64encode(data).decode()
        if data is not None:
            shown[form] = data
    return shown


def display(*values):
    """Shows values besides the cell's own result."""
    for v in values:
        tell(type="result", is_main_result=False, **forms(v))


scope["display"] = display


def run_line(line):
    """Runs a line of shell: what ! and % stand for in notebooks."""
    subprocess.run(["/bin/bash", "-c", line])


scope["__run_line__"] = run_line


def without_magics(code):
    """!command, %pip … as calls; for cells that are no Python as they stand."""
    return re.sub(
        r"(?m)^([ \t]*)(?:!|%(?=pip\b|conda\b|cd\b|ls\b))(.*)$",
        lambda m: f"{m[1]}__run_line__({('python3 -m ' if m[2].startswith('pip') else '') + m[2]!r})", code)


def compiled(code, name):
    try:
        tree = ast.parse(code, name)
    except SyntaxError:
        tree = ast.parse(without_magics(code), name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    body = compile(tree, name, "exec", flags)
    return body, last and compile(ast.Expression(last.value), name, "eval", flags)


def evaluated(code):
    value = eval(code, scope)
    return loop.run_until_complete(value) if inspect.iscoroutine(value) and code.co_flags & inspect.CO_COROUTINE else value


def figures():
    """Shows the open figures of matplotlib, if it is in use."""
    plt = sys.modules.get("matplotlib.pyplot")
    for n in plt.get_fignums() if plt else []:
        import io
        png = io.BytesIO()
        plt.figure(n).savefig(png, format="png")
        tell(type="result", is_main_result=False, text=repr(plt.figure(n)), png=base64.b64encode(png.getvalue()).decode())
        plt.close(n)


def run_python(code):
    name = f"<cell {count}>"
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    body, last = compiled(code, name)
    evaluated(body)
    value = evaluated(last) if last else None
    figures()
    if value is not None:
        scope["_"] = value
        tell(type="result", is_main_result=True, **forms(value))


def run(cell):
    before = dict(os.environ)
    os.environ.update(cell["envs"])
    try:
        if cell["language"] == "bash":
            code = subprocess.run(["/bin/bash", "-c", cell["code"]]).returncode
            if code != 0:
                tell(type="error", name="ExitCode", value=str(code), traceback="")
        else:
            run_python(cell["code"])
    except BaseException as e:  # an exit and an interrupt are ends of the cell, too
        here = [f for f in traceback.extract_tb(e.__traceback__) if f.filename != __file__]
        text = "".join(["Traceback (most recent call last):\n", *traceback.format_list(here), *traceback.format_exception_only(e)])
        tell(type="error", name=type(e).__name__, value=str(e), traceback=text)
    finally:
        os.environ.clear()
        os.environ.update(before)


os.environ.setdefault("MPLBACKEND", "Agg")
while True:
    try:
        line = cells.readline()
    except KeyboardInterrupt:
        continue
    if not line:
        break
    count += 1
    cell = json.loads(line)
    try:
        tell(type="number_of_executions", execution_count=count)
        run(cell)
    except KeyboardInterrupt:
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    mark = cell["mark"].encode()
    os.write(1, mark)
    os.write(2, mark)
    tell(type="end")
