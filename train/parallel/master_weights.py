"""The float32 weights and moments inside DeepSpeed's engine, by parameter, whatever the ZeRO stage.

Each rank holds a part of every parameter, flat: all of it at stage 0, a range of it above. What is computed value by
value, such as an average, is computed on the parts. What is saved is put together one parameter at a time, so a
checkpoint knows neither stages nor ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, by PyTorch's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where this rank's part of a parameter lies."""

    flat: Tensor
    """The tensor that the optimiser steps: the parameter's, or one of many parameters' parts end to end."""
    offset: int
    """Of the part, in ``flat`` flattened."""
    start: int
    """Of the part, in the parameter flattened."""
    numel: int

    def of(self, values: Tensor) -> Tensor:
        """Returns the part's view of a tensor like ``flat``."""
        return values.detach().view(-1).narrow(0, self.offset, self.numel)


@dataclass(frozen=True, kw_only=True, slots=True)
class Following:
    """A moving average that is to follow a step, if it is taken."""

    averages: list[Tensor]
    """Like :meth:`MasterWeights.flats`."""
    weights: list[Tensor]
    """Those."""
    share: float
    """Of the way to the new weights by which the average moves."""

    def follow(self) -> None:
        """Lets the average follow a step that was taken."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self.weights, self.share)


class MasterWeights:
    """The float32 masters of a model, and which part of them this rank holds.

    Args:
        engine: DeepSpeed's, with PyTorch's Adam in it.
        model: The module inside the engine.
        device: The rank's: where ranks exchange values. Parameters that are offloaded may lie elsewhere.
    """

    def __init__(self, engine: Any, model: nn.Module, device: torch.device) -> None:
        self._parameters = dict(model.named_parameters())
        self._device = device
        self._stage: int = engine.zero_optimization_stage()
        zero = engine.optimizer
        self._optimizer: torch.optim.Optimizer = getattr(zero, "optimizer", zero)
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._places: dict[str, _Place] = {}
        if self._stage == 3:
            self._places = {name: _place_at_stage_3(zero, p) for name, p in trained.items()}
            self._places = {name: place for name, place in self._places.items() if place.numel}
        elif self._stage:
            links = {name: p._hp_mapping for name, p in trained.items()}  # type: ignore[attr-defined]
            self._places = {name: self._linked(link) for name, link in links.items() if link is not None}
        else:
            masters = _masters_at_stage_0(zero)
            self._places = {
                name: _Place(flat=masters.get(p, p), offset=0, start=0, numel=p.numel()) for name, p in trained.items()
            }
        self._make_moments()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the parameters, in order; those that are not trained too."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()}

    @property
    def trained(self) -> list[str]:
        """The names of the parameters that are trained, in order."""
        return [name for name, p in self._parameters.items() if p.requires_grad]

    def parts(self) -> dict[str, Tensor]:
        """Returns this rank's part of the weights by parameter: flat views, in float32."""
        return {name: place.of(place.flat) for name, place in self._places.items()}

    def flats(self) -> list[Tensor]:
        """Returns the tensors in which this rank's parts lie, flat, in float32: few at stage 1 and above."""
        distinct = {id(place.flat): place.flat for place in self._places.values()}
        return [flat.detach().view(-1) for flat in distinct.values()]

    def parts_in(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns this rank's parts by parameter, in tensors like :meth:`flats`: views of them."""
        numbers = {key: n for n, key in enumerate({id(place.flat): None for place in self._places.values()})}
        return {name: place.of(flats[numbers[id(place.flat)]]) for name, place in self._places.items()}

    def moments(self, key: str) -> dict[str, Tensor]:
        """Returns this rank's part of one of the :data:`MOMENTS`, likewise."""
        return {name: place.of(self._optimizer.state[place.flat][key]) for name, place in self._places.items()}

    def fill(self, parts: Mapping[str, Tensor], name: str, whole: Tensor) -> None:
        """Copies this rank's part of a parameter's ``whole`` values into ``parts``."""
        place = self._places.get(name)
        if place is not None:
            parts[name].copy_(whole.reshape(-1).narrow(0, place.start, place.numel))

    def steps(self) -> int:
        """Returns how many steps the moments have seen; those that were skipped are not among them."""
        for place in self._places.values():
            return int(self._optimizer.state[place.flat]["step"])
        return 0

    def set_steps(self, steps: int) -> None:
        """Says how many steps the moments have seen."""
        for place in self._places.values():
            counter = self._optimizer.state[place.flat]["step"]
            counter.fill_(steps)

    def gather(self, parts: Mapping[str, Tensor], name: str, *, to: int | None) -> Tensor | None:
        """Returns the whole of a parameter's values, on rank ``to``, or on all if None; None elsewhere.

        All ranks call it. The result is on the CPU if one rank wants it; a parameter that is not trained is what the
        model has, in float32.
        """
        wanted = to is None or dist.get_rank() == to
        if name not in self._parameters or not self._parameters[name].requires_grad:
            return self._untrained(name, wanted)
        if self._stage == 0:
            whole = parts[name] if wanted else None
        else:
            whole = self._joined(parts, name, to)
        if not wanted or whole is None:
            return None
        whole = whole.view(self.shapes[name])
        return whole if to is None else whole.to("cpu", copy=True)

    @torch.no_grad()
    def put_into_model(self, parts: Mapping[str, Tensor]) -> None:
        """Makes the model compute with these values, in its own precision. All ranks call it."""
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad or (self._stage == 0 and self._places[name].flat is parameter):
                continue  # at stage 0 in float32 the masters are the weights
            whole = self.gather(parts, name, to=None)
            assert whole is not None
            self.set_weight(name, whole)

    @torch.no_grad()
    def set_weight(self, name: str, whole: Tensor) -> None:
        """Puts a whole value into the model itself, in its precision; the masters stay. All ranks call it."""
        parameter = self._parameters[name]
        if self._stage != 3:
            parameter.data.copy_(whole)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(whole)

    def _joined(self, parts: Mapping[str, Tensor], name: str, to: int | None) -> Tensor:
        bits = torch.zeros(self.shapes[name].numel(), dtype=torch.int32, device=self._device)
        place = self._places.get(name)
        if place is not None:
            bits[place.start : place.start + place.numel] = parts[name].view(torch.int32)
        # Sums of bit patterns and zeros are exact; sums of floats would lose the sign of zeros.
        if to is None:
            dist.all_reduce(bits)
        else:
            dist.reduce(bits, to)
        return bits.view(torch.float32)

    def _untrained(self, name: str, wanted: bool) -> Tensor | None:
        parameter = self._parameters[name]
        if self._stage != 3:
            return parameter.detach().to("cpu", torch.float32, copy=True) if wanted else None
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", torch.float32, copy=True) if wanted else None

    def _linked(self, link: Any) -> _Place:
        (flat,) = self._optimizer.param_groups[link.param_group_index]["params"]
        at, inside = link.lp_fragment_address, link.hp_fragment_address
        return _Place(flat=flat, offset=inside.start, start=at.start, numel=at.numel)

    def _make_moments(self) -> None:
        """Makes the state that the optimiser would make at its first step, so that it can be read and filled.

        DeepSpeed takes a step with zeros as it starts at some stages: that step is not counted.
        """
        fused = bool(self._optimizer.defaults.get("fused"))
        for place in self._places.values():
            state = self._optimizer.state[place.flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=place.flat.device if fused else "cpu")
                for key in MOMENTS:
                    state[key] = torch.zeros_like(place.flat, memory_format=torch.preserve_format, requires_grad=False)
        self.set_steps(0)


def _place_at_stage_3(zero: Any, parameter: nn.Parameter) -> _Place:
    group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
    start = dist.get_rank() * padded
    numel = max(0, min(padded, parameter.ds_numel - start))  # type: ignore[attr-defined]
    return _Place(flat=zero.fp32_partitioned_groups_flat[group], offset=offset, start=start, numel=numel)


def _masters_at_stage_0(optimizer: Any) -> dict[Tensor, Tensor]:
    """Returns the float32 master of each bfloat16 parameter; nothing for a float32 model, which is its own master."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {p: master for low, high in pairs for p, master in zip(low, high, strict=True)}
