"""The one exception type that reaches a user as a single line.

Entry points catch :class:`InputError` and print its text; every other exception is a defect of ours and keeps its
traceback.
"""

import os
import select
import sys
from collections.abc import Callable

from shared.redaction import without_credentials


class InputError(Exception):
    """Raised for what a user gave or left out. The text says what was found, what was expected and what to do.

    Not a ValueError: that would be caught by code which tries one thing after another, tyro's parser among it.
    """


def run_entry_point(main: Callable[[], int], *, debug: bool) -> int:
    """Returns the exit code of ``main``; an :class:`InputError` becomes one line on stderr and exit code 2.

    A Ctrl-C becomes the word "interrupted" and exit code 130; output that nobody reads to its end, exit code 141.

    The line has no credentials: URLs are shown without user, password and query.

    Args:
        main: The program's body.
        debug: Re-raise instead, so that the traceback is seen.
    """
    try:
        return main()
    except InputError as error:
        if debug:
            raise
        print(f"error: {' '.join(without_credentials(str(error)).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if debug or not _is_unread():
            raise
        return 141  # as a shell counts SIGPIPE


def _is_unread() -> bool:
    """Returns whether nobody reads stdout any more, as in ``... | head``; what is left of it then goes nowhere."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
    return True
