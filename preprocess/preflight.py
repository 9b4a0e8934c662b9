"""``python -m preprocess.preflight``: has every node what a job needs? It looks, and writes one small file.

What is looked at on a node is here; asking all nodes is ``preprocess.job.preflight``.
"""

import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import tyro

from shared.errors import InputError, run_entry_point
from shared.stores.open import open_store

_LEAST_TEMPORARY_BYTES = 4e9
"""Shards are written to a temporary file first, some at a time."""
_LEAST_OBJECT_BYTES = 2e9
"""Ray's objects hold the frames that are decoded ahead."""
_LIBRARIES = ("torch", "transformers", "diffusers", "av", "ray", "zstandard", "obstore")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightConfig:
    """Look on every node of a Ray cluster for what python -m preprocess needs, and say what is missing.

    Exit code 1: something is missing.
    """

    output: str
    """As for python -m preprocess. A small file is written there by each node, and taken away."""
    vae: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """As for python -m preprocess."""
    text_encoder: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """As for python -m preprocess."""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Ray cluster to join."""
    debug: bool = False
    """Show tracebacks of user errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    missing: str | None = None
    """What to do about it; None if all is well."""


def look(config: PreflightConfig, num_gpus: float) -> list[Finding]:
    """Returns what is found on this node.

    Args:
        config: What the job will use.
        num_gpus: That Ray counts here.
    """
    return [
        Finding(what="versions", found=_versions()),
        *_gpus(num_gpus),
        _shared_memory(),
        _disk(),
        *_weights(config),
        _output(config.output),
    ]


def differing(by_node: dict[str, Sequence[Finding]]) -> list[Finding]:
    """Returns whether nodes have other versions of the libraries than each other."""
    versions = {finding.found for findings in by_node.values() for finding in findings if finding.what == "versions"}
    if len(versions) < 2:
        return []
    advice = "install the same versions everywhere: bytes of shards depend on them"
    return [Finding(what="versions of all nodes", found=" | ".join(sorted(versions)), missing=advice)]


def table(by_node: dict[str, Sequence[Finding]]) -> str:
    """Returns what was found, a line each."""
    lines = []
    for node, findings in by_node.items():
        lines.append(node)
        for finding in findings:
            verdict = "ok     " if finding.missing is None else "MISSING"
            lines.append(f"  {verdict} {finding.what}: {finding.found}")
            if finding.missing is not None:
                lines.append(f"          {finding.missing}")
    return "\n".join(lines)


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} none")
    return ", ".join(found)


def _gpus(num_gpus: float) -> Iterator[Finding]:
    if not num_gpus:
        yield Finding(what="GPUs", found="none: this node decodes")
        return
    import torch  # slow, and not needed elsewhere

    if torch.cuda.is_available():
        found = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, driver answers"
        yield Finding(what="GPUs", found=f"{num_gpus:g}: {found}")
    else:
        advice = "install a driver for it, and a torch that was built for CUDA (see nvidia-smi)"
        yield Finding(what="GPUs", found=f"{num_gpus:g} by Ray's count, CUDA finds none", missing=advice)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    small = size < _LEAST_OBJECT_BYTES
    advice = f"give it {_LEAST_OBJECT_BYTES / 1e9:.0f} GB or more (in a container: --shm-size): Ray keeps frames there"
    return Finding(what="shared memory", found=f"{size / 1e9:.1f} GB", missing=advice if small else None)


def _disk() -> Finding:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    advice = f"make room, {_LEAST_TEMPORARY_BYTES / 1e9:.0f} GB or more, or set TMPDIR"
    found = f"{free / 1e9:.1f} GB free in {folder}"
    return Finding(what="disk", found=found, missing=advice if free < _LEAST_TEMPORARY_BYTES else None)


def _weights(config: PreflightConfig) -> Iterator[Finding]:
    from shared.encoders.text_width import read_text_channels  # slow, and not needed by --help
    from shared.encoders.vae_files import read_config

    for what, model in (("VAE", config.vae), ("text encoder", config.text_encoder)):
        if model is None:
            continue
        try:
            if what == "VAE":
                found = read_config(model).class_name
            else:
                found = f"T5 of width {read_text_channels(model)}"
        except InputError as error:
            yield Finding(what=what, found="cannot be read", missing=str(error))
        else:
            yield Finding(what=what, found=f"{model}: {found}")


def _output(url: str) -> Finding:
    name = f".tmp-{secrets.token_hex(8)}"
    try:
        store = open_store(url)
        store.write(name, b"preflight")
        try:
            is_right = store.read(name) == b"preflight"
        finally:
            store.delete(name)
    except InputError as error:
        return Finding(what="output", found="cannot be used", missing=str(error))
    if not is_right:
        return Finding(what="output", found="gives back other bytes", missing=f"check {url}")
    return Finding(what="output", found=f"{url} can be written and read by user {os.getuid()}")


def main() -> int:
    """Returns 0, or 1 if something is missing."""
    config = tyro.cli(PreflightConfig, prog="python -m preprocess.preflight")
    from preprocess.job.preflight import look_everywhere  # loads Ray: not for --help and mistyped options

    by_node = look_everywhere(config)
    print(table(by_node))
    missing = sum(finding.missing is not None for findings in by_node.values() for finding in findings)
    print(f"{missing} missing" if missing else "nothing is missing")
    return min(missing, 1)


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
