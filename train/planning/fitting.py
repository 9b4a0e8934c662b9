"""The least that the backward pass has to compute again so that a step fits on a device: ``auto``.

Keeping more is always faster, and what a step takes is counted, so the choice is a search over counts: from everything
kept, over ``selective`` in more and more blocks, then ``attention`` in more and more, to ``full`` in all of them.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable

import torch

from shared.errors import InputError
from train.model.checkpointing import ACTIVATION_CHECKPOINTING, Recomputation
from train.planning.activations import meta_model
from train.planning.dry_run import largest_buckets, plan_bucket
from train.setup import CheckedRun


def ladder(num_blocks: int) -> list[Recomputation]:
    """Returns the choices from keeping everything to keeping least; each fits wherever the one before does.

    ``selective`` in all blocks is not among them: the last block's backward pass comes first, and what it computes
    again lies beside all that the others keep, so that it frees nothing.

    Args:
        num_blocks: Of the model.
    """
    choices = [Recomputation(mode="none")]
    for mode in ACTIVATION_CHECKPOINTING[1:]:
        choices += [Recomputation(mode=mode, blocks=blocks) for blocks in range(1, num_blocks)]
        if mode != "selective":
            choices.append(Recomputation(mode=mode))
    return choices


def least_recomputation(num_blocks: int, needed: Callable[[Recomputation], int], device_bytes: float) -> Recomputation:
    """Returns the first of the :func:`ladder` that fits, or its last if nothing does.

    Args:
        num_blocks: Of the model.
        needed: Returns the bytes of a device that a choice takes. It is called about log2(3 num_blocks) times.
        device_bytes: What there is.
    """
    choices = ladder(num_blocks)

    def fits(choice: Recomputation) -> bool:
        return needed(choice) <= device_bytes

    if fits(choices[0]):  # most often
        return choices[0]
    return choices[bisect_left(choices, True, lo=1, hi=len(choices) - 1, key=fits)]


def fit_checkpointing(run: CheckedRun, world_size: int, device_bytes: float | None) -> CheckedRun:
    """Returns a run whose checkpointing is decided: as it was, or for ``auto`` by its largest bucket.

    Args:
        run: A checked run of ``world_size`` ranks.
        world_size: Ranks.
        device_bytes: Of the smallest device; None if that is not known.

    Raises:
        InputError: for ``auto`` where it is not known.
    """
    if run.config.parallel.activation_checkpointing != "auto":
        return run
    if device_bytes is None:
        raise InputError("activation_checkpointing=auto: there is no GPU here to ask: give --device-memory-gib too")
    (bucket,) = largest_buckets(run, 1)

    def fitted(choice: Recomputation) -> CheckedRun:
        config = run.config.changed(activation_checkpointing=choice.mode, checkpointed_blocks=choice.blocks)
        return dataclasses.replace(run, config=config)

    def needed(choice: Recomputation) -> int:
        return plan_bucket(fitted(choice), bucket, world_size).memory.needed

    model = meta_model(run.model_config, fitted(Recomputation(mode="none")).config)
    return fitted(least_recomputation(len(model.transformer_blocks()), needed, device_bytes))


def device_memory(given_gib: float | None, device: torch.device) -> float | None:
    """Returns the bytes of a device that a run may take: what is given, else what a GPU has besides what lies there."""
    if given_gib is not None:
        return given_gib * 2**30
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
