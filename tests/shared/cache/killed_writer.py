"""Commits one shard and is killed in the midst of it: ``python killed_writer.py URL PHASE``; run by test_commit.py."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from shared.cache.commit import ShardWriter
from shared.cache.rows import sample_row
from shared.codec import Codec
from shared.stores import files
from shared.stores.open import open_store
from tests.shared.cache.conftest import BUCKET, make_sample


def die(*_: object, **__: object) -> None:
    """Ends this process at once: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(url: str, phase: str) -> None:
    """Writes samples 0 and 1 and dies in the phase."""
    store = open_store(url)
    codecs = {stream: Codec.parse("bfloat16") for stream in ("latent", "text.t5")}
    with ShardWriter(
        store, shard_id="5" * 32, folder=str(BUCKET), container="tar", record={"kind": "samples"}
    ) as writer:
        writer.add(*sample_row(make_sample(0), codecs, 0))
        if phase == "between samples":
            die()
        writer.add(*sample_row(make_sample(1), codecs, 0))
        if phase == "before the shard has its name":
            writer._file.publish = die
        elif phase == "before the fragment":
            type(store).write_if_absent = die
        elif phase == "before the fragment has its name":
            files.publish_if_absent = die
        writer.commit()
        die()


if __name__ == "__main__":
    main(*sys.argv[1:])
