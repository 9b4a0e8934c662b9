"""The end of a process that may be one of several ranks."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def end_process(main: Callable[[], int]) -> NoReturn:
    """Runs a program and ends this process, with its exit code, without taking the interpreter down.

    That would wait for the other ranks if their group was not left. And now and then a process of this program has
    aborted at that point ("terminate called without an active exception"), most likely for a thread of a process group
    that wants Python's lock. Then the exit code is lost.
    """
    try:
        code = main()
    except SystemExit as ended:  # of the command line's parser, and of ranks that leave after the first has said why
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whoever reads them may be gone
        os._exit(code)
