"""Numbers and nouns that go together."""

import numpy as np

from shared.wording import counted


def test_one_is_singular_and_others_are_not() -> None:
    assert [counted(number, "new shard") for number in (0, 1, 2, 12_000)] == [
        *("0 new shards", "1 new shard", "2 new shards", "12,000 new shards"),
    ]
    assert counted(np.int64(2_000_000), "sample") == "2,000,000 samples"
    assert [counted(number, "epoch") for number in (1.0, 1.5, 2.0)] == ["1 epoch", "1.5 epochs", "2 epochs"]
    assert [counted(number, "batch", "batches") for number in (1, 3)] == ["1 batch", "3 batches"]
