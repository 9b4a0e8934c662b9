"""The captions of samples as texts, which training itself does not read."""

import numpy as np

from shared.cache.fragments import read_fragment
from shared.cache.identity import identity_texts
from train.draws import draw_captions, sample_keys
from train.held_out import FixedSamples
from train.sample_index import TEXT


def caption_of(samples: FixedSamples, number: int) -> str:
    """Returns the caption with which a sample is read.

    Of a sample whose texts are shared, or were encoded anew, it is the identity of the sample: the index says their
    words elsewhere.
    """
    columns = samples.index.folder.columns()
    planned = samples.plan.batch(number)
    identity = columns.identity[planned.rows]
    (name,) = identity_texts(np.asarray(identity))
    starts, ends = columns.caption_start[planned.rows], columns.caption_start[planned.rows + 1]
    chosen = int(draw_captions(sample_keys(samples.config.seed, planned.epochs, identity), ends - starts)[0])
    for path in samples.index.cache.index_files().paths():
        table = read_fragment(samples.index.cache.store, path, ["sample", f"{TEXT}.captions"])
        if TEXT not in table.schema.names:
            continue
        for row in table.to_pylist():
            texts = (row[TEXT] or {}).get("captions") or []
            if row["sample"] == name and len(texts) == int(ends[0] - starts[0]):
                return str(texts[chosen]["caption"])
    return name
