"""Runs Python programs in forks of a process that has imported the large libraries already.

Most of what a short program takes is importing them. None of them reads a variable of Hugging Face's; what does is
imported by each program for itself, with the variables that it was given.
"""

import atexit
import contextlib
import importlib
import json
import os
import sys
import threading
import traceback

PRELOADED = ("torch.distributed.tensor", "scipy.stats", "sklearn.metrics", "pandas", "pyarrow.dataset",
             "pyarrow.parquet", "faiss", "numba", "PIL.Image", "pydantic", "jinja2", "httpx", "fsspec", "dill",
             "multiprocess")  # fmt: skip
FORBIDDEN = ("huggingface_hub", "transformers", "datasets", "rqmoe_hf")


def run(request: dict) -> None:
    """Becomes the program, as `python -c` would run it."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, (name, mode) in enumerate(((os.devnull, "r"), (request["output"], "w"), (request["errors"], "w"))):
        with open(name, mode) as opened:
            os.dup2(opened.fileno(), number)
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    status = 0
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Answers each request, a line of JSON, with the exit status."""
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):  # of an extra that is not installed
            importlib.import_module(name)
    assert not set(FORBIDDEN) & set(sys.modules)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
