"""Paths that users give, as they mean the same in every worker.

Inside a submitted job each worker's current folder is its own copy of the job's working directory: what is read may be
given relative to it, what is written there would be lost.
"""

import os
from pathlib import Path

from shared.errors import InputError

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entry point of a submitted job, and nowhere else."""


def resolved_url(url: str) -> str:
    """Returns what is read: a URL, or an absolute path outside of submitted jobs."""
    return url if "://" in url or _JOB_VARIABLE in os.environ else str(Path(url).absolute())


def written_url(option: str, url: str) -> str:
    """Returns what is written: a URL or an absolute path.

    Raises:
        InputError: if a submitted job was given a relative path.
    """
    if "://" not in url and not Path(url).is_absolute() and _JOB_VARIABLE in os.environ:
        raise InputError(
            f"--{option} {url}: inside a Ray job the current folder is a temporary copy: "
            "expected an absolute path on a file system that every node shares"
        )
    return url if "://" in url else str(Path(url).absolute())
