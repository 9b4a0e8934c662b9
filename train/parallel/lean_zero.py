"""Gradients and steps of ZeRO stages 1 and 2 in a few large operations, inside DeepSpeed's engine.

DeepSpeed handles each parameter by itself: a hook that copies, divides, cuts and looks at it, hundreds of small
operations whose launches cost more than their work, and it asks the device whether the norm is finite before it goes
on. Here DeepSpeed keeps the engine, the flat weights, the ranks' parts and the exchange of new weights; what lies
between the backward pass and those is this module's:

- Gradients are gathered by buckets of neighbouring parameters, one copy each. On several ranks each bucket is summed
  where its owner is, or on all where ranks are so many that a bucket has several owners; at stage 2 while the backward
  pass goes on, and what other ranks own is freed. The sum becomes a mean in the step itself.
- The norm is computed over buckets, and stays on the device, as does the decision whether a step is taken.
- The step is one kernel a bucket (:mod:`train.ops.adamw`): gradient, master weights, moments, the weights' moving
  average, the model's weights.

Gradients that are computed in parts, and an optimiser on the CPU, stay with DeepSpeed.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor

from train.ops.adamw import AdamWSettings, adamw_step, step_factors
from train.parallel.buckets import BUCKET_ELEMENTS, SHARED_BELOW, STAGING_BUFFERS, Slice, cut_into_buckets
from train.parallel.master_weights import Following
from train.parallel.verdict import Verdict

Gathered = tuple[tuple[int, Tensor], ...]
"""Gradients of what a rank owns, and where each begins in that."""


class LeanZero:
    """Takes the place of what DeepSpeed's optimiser of stage 1 or 2 does with gradients, and of its step.

    Args:
        engine: Just built, with one group of parameters and PyTorch's AdamW.
        max_norm: To which gradients are clipped.
    """

    def __init__(self, engine: Any, *, max_norm: float) -> None:
        zero = engine.optimizer
        assert len(zero.bit16_groups) == 1
        self._zero, self._max_norm = zero, max_norm
        self._group = zero.dp_process_group
        self._rank, self._num_ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._parameters: list[Tensor] = list(zero.bit16_groups[0])
        sizes = [parameter.numel() for parameter in self._parameters]
        self._part = int(zero.partition_size[0])
        buckets = cut_into_buckets(sizes, part=self._part, largest=BUCKET_ELEMENTS, shared_below=SHARED_BELOW)
        self._buckets = buckets[::-1]  # gradients come from the last layer to the first
        self._freed_after = self._last_bucket_of_each()
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()
        for parameter in self._parameters:
            link = parameter._hp_mapping  # type: ignore[attr-defined]
            if link is not None:  # a view there would keep autograd's node of the parameter, and that its first stream
                link.lp_fragment = link.lp_fragment.detach()
        zero.reduce_gradients = lambda pipeline_parallel=False: None
        zero.overlapping_partition_gradients_reduce_epilogue = lambda: None
        zero.step = self._step
        if self._num_ranks > 1 and engine.zero_optimization_stage() == 2:
            zero.overlapping_partition_gradients_reduce_epilogue = self.gather_rest
            self._gather_as_they_come()
        self._places: dict[int, Tensor] = {}
        """By bucket, where what this rank owns of it is gathered; the others get new memory each time."""
        self._begin()
        self.norm = torch.zeros(())
        """Of the last step's gradient before clipping, over all ranks."""
        self.verdict: Verdict | None = None
        """On the last step."""
        self.following: Following | None = None
        """What is to follow the next step."""

    def _begin(self) -> None:
        """Makes ready for the next backward pass."""
        self._num_gathered = 0
        self._missing = [len(bucket.slices) for bucket in self._buckets]
        self._pieces: list[tuple[int, Tensor]] = []
        """Gradients of what this rank owns, and where they begin in that."""
        self._under_way: deque[tuple[dist.Work, Tensor | None, int]] = deque()
        """Sums that have begun; the buffer that is free after them; and the bucket's number."""
        self._staging: list[Tensor] = []

    def keep_places(self) -> None:
        """From here on gathers what this rank owns to the same places, so that what is recorded writes there."""
        like = self._parameters[0]
        for number, bucket in enumerate(self._buckets):
            own = bucket.held(self._rank, self._part)
            if own.start < own.stop and number not in self._places:
                self._places[number] = torch.empty(own.stop - own.start, dtype=like.dtype, device=like.device)

    def free_places(self) -> None:
        """From here on gathers to new memory again."""
        self._places.clear()

    def gathered(self) -> Gathered:
        """Returns the gradients that are gathered: all that this rank owns once :meth:`gather_rest` has run."""
        return tuple(self._pieces)

    def have_gathered(self, gathered: Gathered) -> None:
        """Takes it that gradients have come to their places without hooks and gathering here."""
        self._pieces = list(gathered)
        self._num_gathered = len(self._buckets)

    def _last_bucket_of_each(self) -> list[list[Tensor]]:
        """Returns, by bucket, the parameters whose gradients are wholly gathered with it."""
        last = {part.parameter: n for n, bucket in enumerate(self._buckets) for part in bucket.slices}
        freed: list[list[Tensor]] = [[] for _ in self._buckets]
        for parameter, number in last.items():
            freed[number].append(self._parameters[parameter])
        return freed

    def _gather_as_they_come(self) -> None:
        buckets_of: list[list[int]] = [[] for _ in self._parameters]
        for number, bucket in enumerate(self._buckets):
            for part in bucket.slices:
                buckets_of[part.parameter].append(number)
        for parameter, numbers in zip(self._parameters, buckets_of, strict=True):

            def arrived(_: Tensor, numbers: list[int] = numbers) -> None:
                for number in numbers:
                    self._missing[number] -= 1
                while self._num_gathered < len(self._buckets) and not self._missing[self._num_gathered]:
                    self._gather_next()

            parameter.register_post_accumulate_grad_hook(arrived)

    def gather_rest(self) -> None:
        """Gathers the gradients that are not yet, and lets the device wait for all sums."""
        while self._num_gathered < len(self._buckets):
            self._gather_next()
        while self._under_way:
            self._finish_next()
        self._staging.clear()

    @torch.no_grad()
    def _gather_next(self) -> None:
        """Gathers a bucket, and begins to sum it on its owners: all ranks in the same order."""
        number = self._num_gathered
        bucket = self._buckets[number]
        parts = [self._gradient(part) for part in bucket.slices]
        if bucket.owner == self._rank:
            values, staged = torch.cat(parts, out=self._places.get(number)), None
            self._pieces.append((bucket.start - self._rank * self._part, values))
        else:
            staged = self._free_buffer(parts[0])
            values = torch.cat(parts, out=staged[: bucket.numel])
        del parts
        for parameter in self._freed_after[number]:
            parameter.grad = None
        self._num_gathered += 1
        if self._num_ranks > 1:
            if bucket.owner is None:
                work = dist.all_reduce(values, group=self._group, async_op=True)
            else:
                owner = bucket.owner if self._group is None else dist.get_global_rank(self._group, bucket.owner)
                work = dist.reduce(values, owner, group=self._group, async_op=True)
            assert work is not None
            self._under_way.append((work, staged, number))

    def _finish_next(self) -> None:
        """Lets the device wait for the oldest sum; of a bucket of several ranks, takes out what this one owns."""
        work, staged, number = self._under_way.popleft()
        work.wait()
        if staged is None:
            return
        bucket = self._buckets[number]
        own = bucket.held(self._rank, self._part)
        if bucket.owner is None and own.start < own.stop:
            place = self._places.get(number)
            values = staged[own].clone() if place is None else place.copy_(staged[own])
            self._pieces.append((bucket.start + own.start - self._rank * self._part, values))
        self._staging.append(staged)

    def _gradient(self, part: Slice) -> Tensor:
        parameter = self._parameters[part.parameter]
        if parameter.grad is None:  # what this batch did not use
            return torch.zeros(part.numel, dtype=parameter.dtype, device=parameter.device)
        flat = parameter.grad.reshape(-1)
        return flat if part.numel == flat.numel() else flat.narrow(0, part.start, part.numel)

    def _free_buffer(self, like: Tensor) -> Tensor:
        """Returns a buffer that nothing reads any more; the device waits for it, not the host."""
        while self._under_way and not (self._staging or self._num_staged() < STAGING_BUFFERS):
            self._finish_next()
        if self._staging:
            return self._staging.pop()
        return like.new_empty(max(bucket.numel for bucket in self._buckets))

    def _num_staged(self) -> int:
        return sum(staged is not None for _, staged, _ in self._under_way)

    @torch.no_grad()
    def _step(self, closure: None = None) -> None:
        """Takes the step, if the gradient's norm is finite; leaves :attr:`norm` and :attr:`verdict`."""
        self.gather_rest()
        zero, (options,) = self._zero, self._zero.optimizer.param_groups
        settings = AdamWSettings(
            lr=options["lr"], betas=options["betas"], eps=options["eps"], weight_decay=options["weight_decay"]
        )
        master = zero.single_partition_of_fp32_groups[0].detach()
        model_weights = zero.parallel_partitioned_bit16_groups[0][self._rank]
        state = zero.optimizer.state[zero.single_partition_of_fp32_groups[0]]
        self.norm = self._norm(master.device)
        factors = step_factors(self.norm, state["step"], settings, max_norm=self._max_norm, num_summed=self._num_ranks)
        self.verdict = Verdict(factors[3])
        while self._pieces:
            offset, gradient = self._pieces.pop()
            own, average, share = slice(offset, offset + gradient.numel()), None, 0.0
            if self.following is not None:
                (flat,), share = self.following.averages, self.following.share
                average = flat[own]
            adamw_step(
                gradient,
                master[own],
                state["exp_avg"][own],
                state["exp_avg_sq"][own],
                model_weights[own],
                factors,
                settings,
                average,
                share,
            )
        self.following = None
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        self._begin()

    def _norm(self, device: torch.device) -> Tensor:
        """Returns the norm of the mean gradient, over all ranks: in float32, not finite where any value is not."""
        total = torch.zeros((), device=device)
        if self._pieces:
            norms = torch._foreach_norm([gradient for _, gradient in self._pieces], 2.0, dtype=torch.float32)
            total = torch.stack(norms).square().sum()
        if self._num_ranks > 1:
            dist.all_reduce(total, group=self._group)
        return total.sqrt() / self._num_ranks
