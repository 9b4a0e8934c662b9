"""Prompts from a file."""

from pathlib import Path

from shared.errors import InputError


def read_prompts(file: Path) -> list[str]:
    """Returns the prompts of a file: one a line; empty lines, and those that begin with #, are left out.

    Raises:
        InputError: if it cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}): expected a text file of prompts, one a line"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected a UTF-8 text file of prompts, one a line ({error})") from None
    prompts = [line.strip() for line in lines]
    prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    if not prompts:
        raise InputError(f"{file}: found no prompt: expected one a line")
    return prompts
