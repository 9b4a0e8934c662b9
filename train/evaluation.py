"""The loss on samples that are held out, by noise level: always the same samples, noise and levels.

Each sample is computed by itself, at all levels at once, so that its loss does not depend on who else is in a batch,
and sums are taken in the samples' order: any number of ranks gives the same figures.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from train.data import Batch
from train.diffusion.objective import Objective, bucket_draws
from train.draws import standard_normal
from train.held_out import FixedSamples
from train.loss import batch_loss
from train.ops.cpu_bfloat16 import bfloat16_products
from train.parallel.ranks import Ranks


class Evaluation:
    """Judges a model.

    Args:
        samples: What it is judged on.
        objective: What it is trained for.
        ranks: All of them call every method.
        num_levels: Noise levels.
    """

    def __init__(self, samples: FixedSamples, objective: Objective, ranks: Ranks, *, num_levels: int) -> None:
        self._samples, self._objective, self._ranks = samples, objective, ranks
        self._draws = bucket_draws(num_levels)

    @torch.no_grad()
    def losses(self, call: Callable[..., Tensor], model: nn.Module) -> dict[str, float]:
        """Returns the mean loss, its parts, and the loss in each share of the noise levels, by name.

        Args:
            call: The model, or the engine around it; in evaluation mode.
            model: The module itself.
        """
        ranks, own = self._ranks, self._samples.share(self._ranks.data_rank, self._ranks.num_data_ranks)
        rounds = math.ceil(self._samples.number / ranks.num_data_ranks)
        found: dict[int, list[list[float]]] = {}
        reading = self._samples.read(own if own else range(1))
        batch = None
        for turn in range(rounds):  # as many on every rank: a forward pass may need them all
            batch = ranks.agree(partial(next, reading, batch))
            assert batch is not None
            terms = self._at_all_levels(call, model, batch.to(ranks.device))
            if turn < len(own):
                found[own[turn]] = terms.tolist()
        everywhere = {number: each for part in ranks.gather(found) for number, each in part.items()}
        table = torch.tensor([everywhere[number] for number in range(self._samples.number)], dtype=torch.float64)
        return self._named(table.mean(0))

    def _at_all_levels(self, call: Callable[..., Tensor], model: nn.Module, sample: Batch) -> Tensor:
        """Returns the loss and its parts (1 + P, N) of one sample at N levels, float64, on the CPU."""
        levels = len(self._draws)
        keys = sample.noise_keys + torch.arange(levels)  # another noise at each level
        copies = _repeated(sample, levels)
        x0 = sample.clean_latents().expand(levels, -1, -1, -1, -1)
        noise = standard_normal(keys, tuple(x0.shape[1:]), x0.device)
        with bfloat16_products(x0.device):
            terms = batch_loss(
                call,
                self._objective,
                copies,
                wants_size=bool(getattr(model, "wants_size", False)),
                x0=x0,
                u=self._draws.to(x0.device),
                noise=noise,
            )
        return torch.stack([terms.loss, *(terms.parts[name] for name in self._objective.parts)]).double().cpu()

    def _named(self, means: Tensor) -> dict[str, float]:
        levels = len(self._draws)
        values = {"eval_loss": float(means[0].mean())}
        values |= {
            f"eval_{name}": float(row.mean()) for name, row in zip(self._objective.parts, means[1:], strict=True)
        }
        for level in range(levels):
            share = f"{100 * level // levels}-{100 * (level + 1) // levels}%"
            values[f"eval_loss_noise_{share}"] = float(means[0][level])
        return values


def _repeated(sample: Batch, copies: int) -> Batch:
    """Returns a batch of one sample as a batch of several of it, but for its latents and draws."""
    names = ("captions", "mask", "drop_caption", "fps", "height", "width")
    return replace(
        sample, **{name: getattr(sample, name).expand(copies, *getattr(sample, name).shape[1:]) for name in names}
    )
