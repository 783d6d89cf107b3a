"""Forks a process for each piece of code that standard input names, with what the code of cards needs imported.

A line of input names a folder with ``code.py``; a line of output is the exit code of that process, whose own output is
in the folder.
"""

import gc
import json
import os
import runpy
import sys
import traceback

import peft  # noqa: F401
import PIL.Image  # noqa: F401
import torch  # noqa: F401
import transformers

# What from_pretrained would import, once instead of in each process.
transformers.AutoModelForImageTextToText, transformers.AutoModel, transformers.AutoProcessor  # noqa: B018


def run(folder, path):
    """Run the code of a folder to its end."""
    os.chdir(folder)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(encoding="utf-8")
    sys.path.insert(0, os.path.abspath(path) if path else folder)
    runpy.run_path("code.py")
    assert not [name for name in sys.modules if name.partition(".")[0] == "finetune"], "a reader has it not"


def main():
    """Answer until the input ends."""
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                run(**json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]
    main()
