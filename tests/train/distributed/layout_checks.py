"""Checks of the layouts alone, against one process that has all tokens: values, gradients, weights' gradients."""

import itertools
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError
from tests.train.small_models import inputs, small_model
from train.model.checkpointing import ACTIVATION_CHECKPOINTING
from train.model.layout import LayoutFor, whole_layout
from train.parallel.pieces import PIECE_TOKENS
from train.parallel.ranks import Ranks
from train.parallel.sequence import FramesLayout, PlacesLayout, SequenceParallel

WIDTH, HEADS = 12, 3
SIZES = (
    (2, 4, 6),  # all divisible
    (2, 5, 7),  # nothing divisible
    (1, 3, 1),  # one place: some rank has nothing along time
    (1, 1, 5),  # an image alone: some rank has no frame within space
    (3, 1, 4),  # images
    (2, 3, 8),  # places spread, frames would leave more idle
)


class Mixer(nn.Module):
    """Every operation of a layout once, each with weights of its own, and some outside of the spread part."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.frames = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.space, self.time, self.qkv = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))

    def forward(self, x: Tensor, frame_values: Tensor, layout_for: LayoutFor) -> Tensor:
        layout = layout_for(*x.shape[:3])
        x = layout.split(self.before(x))
        x = x * (1 + layout.split_frames(self.frames(frame_values))[:, :, None])
        x = x + layout.along_space(x, lambda t: _attend(self.space(t), 2))
        x = x + layout.along_time(x, lambda t: _attend(self.time(t), 1))
        x = x + layout.along_all(self.qkv(x).unflatten(3, (3, HEADS, -1)), _attend_heads).flatten(3)
        return self.after(layout.merge(x))


def _attend(qkv: Tensor, dim: int) -> Tensor:
    q, k, v = (t.movedim(dim, -2) for t in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).movedim(-2, dim)


def _attend_heads(qkv: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _results(layout_for: LayoutFor, size: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
    """Returns output and gradients, those of weights as the mean over the ranks, as an engine takes it."""
    torch.manual_seed(sum(size))
    model = Mixer().to(device, torch.float64)
    x = torch.randn(*size, WIDTH, dtype=torch.float64).to(device).requires_grad_()
    frame_values = torch.randn(*size[:2], WIDTH, dtype=torch.float64).to(device).requires_grad_()
    target = torch.randn(*size, WIDTH, dtype=torch.float64).to(device)
    out = model(x, frame_values, layout_for)
    (out - target).square().mean().backward()
    gradients = {"x": x.grad, "frame_values": frame_values.grad} | {n: p.grad for n, p in model.named_parameters()}
    for gradient in gradients.values():
        assert gradient is not None
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return {"out": out.detach()} | gradients  # type: ignore[return-value]


def layouts_change_no_value_and_no_gradient(ranks: Ranks, _folder: Path) -> None:
    parallel = SequenceParallel(ranks.world_size)
    kinds = set()
    for size in SIZES:
        if max(size[1:]) < ranks.world_size or ranks.world_size > HEADS:
            continue
        kinds.add(type(parallel.layout_for(*size)))
        expected = _results(whole_layout, size, ranks.device)
        for piece_tokens in (PIECE_TOKENS, 0):  # places are swapped at once, or in pieces where there are enough
            with mock.patch("train.parallel.pieces.PIECE_TOKENS", piece_tokens):
                found = _results(parallel.layout_for, size, ranks.device)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert kinds == {FramesLayout, PlacesLayout}


def tokens_that_travel_in_parcels_change_no_bit(ranks: Ranks, _folder: Path) -> None:
    """Nor how often anything is sent; with parts of unequal numbers of frames, and in order where places do not divide.

    On CPUs plain PyTorch writes parcels and reads them; on GPUs kernels do.
    """
    ways = (*((8, 0, mode) for mode in ACTIVATION_CHECKPOINTING), (8, PIECE_TOKENS, "selective"), (6, 0, "none"))
    for kind, (columns, piece_tokens, mode) in itertools.product(("stdit-ti/2", "stdit3-ti/2"), ways):
        results, sent, orders = [], [], []
        for parcelled in (False, True):
            parallel = SequenceParallel(ranks.world_size)
            model = small_model(kind, activation_checkpointing=mode).to(ranks.device)
            model.layout_for = parallel.layout_for
            size = (5, 4, columns)
            given = {name: value.to(ranks.device) for name, value in inputs(kind, size=size).items()}
            if kind.startswith("stdit3"):
                given["x_mask"] = torch.arange(10, device=ranks.device).view(2, 5) % 3 > 0  # frames' own modulation
            with (
                mock.patch("train.parallel.sequence.spread_places", return_value=False),
                mock.patch("train.parallel.pieces.PIECE_TOKENS", piece_tokens),
                mock.patch("train.model.attention_layers.writes_parcels", return_value=parcelled),
                mock.patch("torch.distributed.all_to_all_single", wraps=dist.all_to_all_single) as exchanges,
            ):
                orders.append(parallel.layout_for(2, 5, columns).parcels_along_time)
                out = model(**given)
                out.square().mean().backward()
            results.append([out.detach(), *(parameter.grad for parameter in model.parameters())])
            sent.append(exchanges.call_count)
        num_pieces = 1 if piece_tokens else 2
        divides = columns % (num_pieces * ranks.world_size) == 0
        assert set(orders) == {num_pieces * ranks.world_size if divides else None}, orders
        assert sent[0] == sent[1] > 0
        tolerance = {"rtol": 1e-3, "atol": 1e-5} if ranks.device.type == "cuda" else {"rtol": 0, "atol": 0}
        for one, other in zip(*results, strict=True):  # attention within frames may add in any order on GPUs
            torch.testing.assert_close(other, one, **tolerance, msg=lambda m, w=(kind, mode, columns): f"{w}: {m}")


def what_cannot_be_spread_is_told(ranks: Ranks, _folder: Path) -> None:
    for call, message in (
        (lambda: SequenceParallel(ranks.world_size + 1), f"does not divide the {ranks.world_size} ranks: use 1 or"),
        (lambda: SequenceParallel(ranks.world_size).layout_for(5, 1, 1), "cannot spread 1 frame of 1 token"),
        (lambda: _one_head(ranks), "this model has 1: use at most 1"),
    ):
        try:
            call()
        except InputError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


def compiled_blocks_exchange_what_others_do(ranks: Ranks, _folder: Path) -> None:
    layout_for = SequenceParallel(ranks.world_size).layout_for
    for kind, mode, size in (
        ("stdit-ti/2", "none", (4, 4, 6)),
        ("stdit-ti/2", "selective", (1, 4, 6)),
        ("dit-ti/2", "attention", (4, 4, 6)),
    ):
        results = []
        for compiled in (False, True):
            model = small_model(kind, activation_checkpointing=mode).to(ranks.device)
            model.layout_for = layout_for
            for block in model.transformer_blocks() if compiled else ():
                block.compile(backend="aot_eager", fullgraph=True)
            given = {name: value.to(ranks.device) for name, value in inputs(kind, size=size).items()}
            with mock.patch("train.parallel.pieces.PIECE_TOKENS", 0):
                out = model(**given)
                out.square().mean().backward()
            results.append([out.detach(), *(parameter.grad for parameter in model.parameters())])
            for result in results[-1]:
                dist.all_reduce(result)  # which rank has which places is another matter
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=lambda m, w=(kind, mode): f"{w}: {m}")


def _one_head(ranks: Ranks) -> None:
    x = torch.zeros(1, ranks.world_size, 1, 1, 8, device=ranks.device)
    layout = SequenceParallel(ranks.world_size).layout_for(1, ranks.world_size, 1)
    part = layout.split(x.flatten(3)).unflatten(3, (1, 8))
    layout.along_all(torch.stack([part] * 3, dim=3), _attend_heads)
