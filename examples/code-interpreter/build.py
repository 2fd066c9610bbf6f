"""Builds the template code-interpreter-v1, from which e2b-code-interpreter starts its sandboxes."""

import os

from e2b import Template, default_build_logger, wait_for_port

template = (
    Template(file_context_path=os.path.dirname(os.path.abspath(__file__)))
    .from_base_image()
    .copy(["server.py", "worker.py"], "/opt/code-interpreter/", user="root")
    # What cells are to find is installed here, such as
    # .pip_install(["numpy", "pandas", "matplotlib"])
    .set_start_cmd("python3 /opt/code-interpreter/server.py", wait_for_port(49999))
)

if __name__ == "__main__":
    Template.build(template, "code-interpreter-v1", on_build_logs=default_build_logger())
