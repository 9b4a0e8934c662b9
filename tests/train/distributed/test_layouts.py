"""The layouts of sequence parallelism, on two ranks and, slow, on three: heads and parts of unequal numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.distributed.check_names import LAYOUT_CHECKS, LAYOUT_MODULE
from tests.train.distributed.launch import run_checks
from tests.train.small_models import inputs, small_model
from train.model import attention_layers
from train.ops.parcels import parcelled_shape
from train.parallel import pieces
from train.parallel.exchange import Group, _pack, _unpack, _wide, part_sizes
from train.parallel.sequence import FramesLayout, busiest_layout

WIDTH = 72
"""Of models whose positions no other test finds made."""
CHECKS = [*LAYOUT_CHECKS, "compiled_blocks_exchange_what_others_do"]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(LAYOUT_MODULE, CHECKS, tmp_path_factory.mktemp("layouts"), num_ranks=2)


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(on_two_ranks, check):
    assert on_two_ranks[check] == "ok"


@pytest.mark.slow
def test_on_three_ranks_layouts_change_no_value_and_no_gradient(tmp_path: Path):
    assert run_checks(LAYOUT_MODULE, LAYOUT_CHECKS[:1], tmp_path, num_ranks=3) == {LAYOUT_CHECKS[0]: "ok"}


@pytest.mark.parametrize("frames", [4, 5])
def test_frames_of_one_sample_travel_from_and_to_where_they_lie(frames: int):
    x, sizes = torch.randn(1, frames, 6, 8), part_sizes(frames, 2)
    sent, numels = _pack(x, 1, sizes)
    received = _unpack(sent, [[1, size, 6, 8] for size in sizes], numels, 1)
    assert sent.data_ptr() == received.data_ptr() == x.data_ptr()
    assert torch.equal(received, x)
    assert numels == [size * 6 * 8 for size in sizes]


class _Copies(TorchDispatchMode):
    """Counts the bytes that copies write, and how many at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.widths: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() in ("aten::clone", "aten::copy_", "aten::cat", "aten::stack"):
            self.nbytes += out.nbytes
            self.widths.add(out.itemsize)
        return out


@pytest.mark.parametrize("piece_tokens", [pieces.PIECE_TOKENS, 0], ids=["at once", "in pieces"])
@pytest.mark.parametrize("size", [(1, 4, 6), (3, 4, 6), (1, 5, 7), (3, 5, 7)], ids=str)
def test_around_attention_along_time_tokens_are_copied_once_an_exchange(
    size: tuple[int, int, int], piece_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "PIECE_TOKENS", piece_tokens)
    layout = FramesLayout(Group(None, 0, 2), *size, in_pieces=True)
    x = torch.empty(size[0], part_sizes(size[1], 2)[0], size[2], 8, device="meta", requires_grad=True)
    with _Copies() as forward:
        out = layout.along_time(x, lambda places: places * 2)
    with _Copies() as backward:
        (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out.is_contiguous()
    assert gradient.is_contiguous()
    assert forward.nbytes == backward.nbytes == 2 * x.nbytes
    if not (size[1] % 2 or size[2] % 2):  # parts of one size: see the test of what is taken at once
        assert forward.widths == backward.widths == {16}


@pytest.mark.parametrize("piece_tokens", [pieces.PIECE_TOKENS, 0], ids=["at once", "in pieces"])
@pytest.mark.parametrize("size", [(1, 4, 8), (3, 5, 8)], ids=str)
def test_tokens_in_parcels_are_copied_nowhere(
    size: tuple[int, int, int], piece_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "PIECE_TOKENS", piece_tokens)
    layout = FramesLayout(Group(None, 0, 2), *size, in_pieces=True)
    parcels = layout.parcels_along_time
    assert parcels == (4 if piece_tokens == 0 else 2)
    shape = parcelled_shape((size[0], part_sizes(size[1], 2)[0], size[2], 8), parcels)
    x = torch.empty(shape, device="meta", requires_grad=True)
    with _Copies() as forward:
        out = layout.along_time(x, lambda places: places * 2)
    with _Copies() as backward:
        (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out.shape == gradient.shape == x.shape
    assert out.is_contiguous()
    assert gradient.is_contiguous()
    assert forward.nbytes == backward.nbytes == 0


def test_tokens_come_in_parcels_where_places_divide():
    group = Group(None, 0, 2)
    for places, in_pieces, parcels in ((1024, True, 4), (1024, False, 2), (1026, True, None), (1026, False, 2)):
        assert FramesLayout(group, 1, 256, places, in_pieces=in_pieces).parcels_along_time == parcels
    assert FramesLayout(group, 1, 16, 1026, in_pieces=True).parcels_along_time == 2
    assert FramesLayout(group, 1, 16, 1025, in_pieces=True).parcels_along_time is None


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (4, 2, 1, 2, 8)], ids=["in order", "in parcels"])
def test_one_piece_is_under_way_while_another_is_computed_in_the_backward_pass_too(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []

    class Recorded(pieces.Journey):
        def __init__(self, x: Tensor, *rest: Any, **options: Any) -> None:
            super().__init__(x, *rest, **options)
            events.append("sent")

        def arrived(self, *rest: Any) -> Tensor:
            events.append("arrived")
            return super().arrived(*rest)

    class Computed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            events.append("computed")
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            events.append("computed")
            return gradient * 2

    monkeypatch.setattr(pieces, "Journey", Recorded)
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 0)
    layout = FramesLayout(Group(None, 0, 2), 1, 4, 8, in_pieces=True)
    x = torch.empty(shape, device="meta", requires_grad=True)
    out = layout.along_time(x, Computed.apply)
    one_way = ["sent", "sent", "arrived", "computed", "sent", "arrived", "computed", "sent", "arrived", "arrived"]
    assert events == one_way
    events.clear()
    out.sum().backward()
    assert events == one_way


def test_few_tokens_or_places_are_swapped_at_once():
    group = Group(None, 0, 2)
    assert pieces.number_of_pieces(1, 256, 1024, group) == 2
    assert pieces.number_of_pieces(1, 16, 1024, group) == 1
    assert pieces.number_of_pieces(8, 4096, 3, group) == 1


def test_copies_take_sixteen_bytes_at_once_where_rows_are_made_of_them():
    x = torch.arange(3 * 8 * 16, dtype=torch.float32).view(3, 8, 16).bfloat16()
    for other, wide in (
        (x, True),
        (x.transpose(0, 1), True),
        (x[:, 2:6], True),
        (x[..., :12], False),
        (x[..., 2:10], False),
        (x.transpose(1, 2), False),
    ):
        assert (_wide(other).dtype == torch.complex128) == wide
        assert torch.equal(_wide(other).contiguous().view(torch.bfloat16), other.contiguous())


@pytest.mark.parametrize("piece_tokens", [pieces.PIECE_TOKENS, 0], ids=["at once", "in pieces"])
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("kind", ["stdit-ti/2", "stdit3-ti/2"])
def test_models_write_and_read_tokens_as_they_travel(
    kind: str, mode: str, piece_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "PIECE_TOKENS", piece_tokens)
    copied = {}
    for parcelled in (True, True, False):  # positions are made once
        monkeypatch.setattr(attention_layers, "writes_parcels", lambda _, p=parcelled: p)
        model = small_model(kind, hidden_size=WIDTH, activation_checkpointing=mode).to("meta")
        model.layout_for = busiest_layout(2, in_pieces=True)
        given = {name: value.to("meta") for name, value in inputs(kind, size=(4, 4, 8)).items()}
        with _Copies() as copies:
            model(**given).sum().backward()
        copied[parcelled] = copies.nbytes
    tokens = 2 * 2 * 8 * WIDTH * 4
    around_attention = 4 if mode == "none" else 6  # of each of two blocks, two of them again
    assert copied[False] - copied[True] == 2 * around_attention * tokens
