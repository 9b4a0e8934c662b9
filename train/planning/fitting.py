"""The least that the backward pass has to compute again so that a step fits on a device: ``auto``.

Keeping more is always faster, and what a step takes is counted, so the choice is a search over counts: from everything
kept, over ``selective`` in more and more blocks, to ``full`` in more and more and at last all of them.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable

import torch

from shared.errors import InputError
from train.model.checkpointing import ActivationCheckpointing, Recomputation
from train.planning.activations import meta_model
from train.planning.dry_run import largest_buckets, plan_bucket
from train.setup import CheckedRun


def least_recomputation(num_blocks: int, needed: Callable[[Recomputation], int], device_bytes: float) -> Recomputation:
    """Returns the least recomputation that fits, or all of it if nothing does.

    Args:
        num_blocks: Of the model.
        needed: Returns the bytes of a device that a choice takes; more recomputation takes less. It is called about
            log2(2 num_blocks) times.
        device_bytes: What there is.
    """

    def choice(rung: int) -> Recomputation:
        if rung == 0:
            return Recomputation(mode="none")
        mode: ActivationCheckpointing = "selective" if rung <= num_blocks else "full"
        blocks = rung if rung <= num_blocks else rung - num_blocks
        return Recomputation(mode=mode, blocks=None if blocks == num_blocks else blocks)

    def fits(rung: int) -> bool:
        return needed(choice(rung)) <= device_bytes

    if fits(0):  # most often
        return choice(0)
    return choice(bisect_left(range(2 * num_blocks), True, lo=1, key=fits))


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
