"""FlashAttention 3 as an operator of ours: which library is taken, and what is asked of its kernels."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.errors import InputError
from tests.train.flash_attention_3_stand_in import RESULTS, StandIn, clear_caches, plain, standing_in
from train.model import attention as facade
from train.model import flash_attention_3 as ours
from train.model.attention import KeyMask, _varlen, automatic_backend, automatic_choice, preferred_backends
from train.model.checkpointing import checkpointed


@pytest.fixture(params=RESULTS)
def kernels(request: pytest.FixtureRequest, nothing_loaded: None) -> Iterator[StandIn]:
    with standing_in(request.param) as stand_in:
        yield stand_in


def assert_same_as_plain(attend, q: Tensor, k: Tensor, v: Tensor) -> None:
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    expected, _ = plain(*inputs, q.shape[-1] ** -0.5)
    weights = torch.randn(expected.shape)
    found = attend(q, k, v)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), inputs))


def test_queries_keys_and_values_are_read_where_they_lie_and_have_their_gradients(kernels: StandIn) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 3, 2, 8, requires_grad=True)
    assert_same_as_plain(ours.flash_attention_3, *qkv.unbind(2))
    assert {t.untyped_storage().data_ptr() for t in kernels.given[0][:3]} == {qkv.untyped_storage().data_ptr()}
    q, kv = torch.randn(2, 5, 2, 8, requires_grad=True), torch.randn(2, 8, 2, 2, 9, requires_grad=True)
    assert_same_as_plain(ours.flash_attention_3, q, *kv.transpose(1, 4).unbind(2))  # a head's values lie apart


def test_sequences_of_several_lengths_see_their_own_keys(kernels: StandIn) -> None:
    torch.manual_seed(0)
    q, kv = torch.randn(3, 5, 2, 8, requires_grad=True), torch.randn(3, 7, 2, 2, 8, requires_grad=True)
    lengths = [7, 1, 4]
    keys, _ = KeyMask.valid_first(torch.arange(7) < torch.tensor(lengths)[:, None])
    found = _varlen(ours.flash_attention_3_of_lengths, q, *kv.unbind(2), keys)
    for i, length in enumerate(lengths):
        expected, _ = plain(q[i], kv[i, :length, 0], kv[i, :length, 1], 8**-0.5)
        torch.testing.assert_close(found[i], expected)
    (grad,) = torch.autograd.grad(found.sum(), kv)
    assert (grad[1, 1:] == 0).all()
    assert (grad[0].abs().sum(dim=(1, 2, 3)) > 0).all()


def test_the_forward_pass_may_be_cudnns(kernels: StandIn) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 3, 2, 8, requires_grad=True)
    assert_same_as_plain(partial(ours.flash_attention_3, by_cudnn=True), *qkv.unbind(2))
    assert (len(kernels.by_cudnn), len(kernels.given), len(kernels.written)) == (1, 0, 1)
    q, kv = torch.randn(2, 5, 2, 8, requires_grad=True), torch.randn(2, 8, 2, 2, 9, requires_grad=True)
    assert_same_as_plain(partial(ours.flash_attention_3, by_cudnn=True), q, *kv.transpose(1, 4).unbind(2))


@pytest.mark.parametrize(
    ("length", "by_cudnn"),
    [(127, None), (128, True), (192, False), (256, True), (384, False), (512, True), (1024, True), (1152, False)],
)
def test_the_forward_pass_is_cudnns_where_its_tiles_are_fuller_unless_a_backend_is_asked_for(
    kernels: StandIn, monkeypatch: pytest.MonkeyPatch, length: int, by_cudnn: bool | None
) -> None:
    def preferred(*_, flash_3_suits: bool = False, **__) -> tuple[str, ...]:
        return ("flash-attn-3",) if flash_3_suits else ("math",)

    monkeypatch.setattr(facade, "preferred_backends", preferred)
    monkeypatch.setattr(ours, "usable", lambda _: True)
    monkeypatch.setattr(ours, "cudnn_takes", lambda *_: True)
    qkv = torch.randn(1, length, 3, 1, 8, dtype=torch.bfloat16)
    facade.attention(*qkv.unbind(2))
    assert (len(kernels.by_cudnn), len(kernels.given)) == {None: (0, 0), True: (1, 0), False: (0, 1)}[by_cudnn]
    monkeypatch.setattr(facade, "preferred_backends", lambda *_, **__: ("flash-attn-3",))
    facade.attention(*qkv.unbind(2), backend="flash-attn-3")
    assert len(kernels.given) == (2 if by_cudnn is False else 1)


def test_operators_say_of_their_results_what_a_compiler_must_know(kernels: StandIn) -> None:
    q, k, v = (torch.randn(2, n, 2, 8, requires_grad=True) for n in (5, 7, 7))
    for by_cudnn in (False, True):
        torch.library.opcheck(ours._flash_attention_3, (q, k, v, None, None, None, None, by_cudnn))
    borders = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 7, 14], dtype=torch.int32)
    flat = [t.detach().flatten(0, 1).requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(ours._flash_attention_3, (*flat, *borders, 5, 7, False))


def test_a_compiled_graph_is_not_broken(kernels: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facade, "preferred_backends", lambda *_, **__: ("flash-attn-3",))

    def attend(qkv: Tensor) -> Tensor:
        return facade.attention(*(qkv * 2).unbind(2))

    qkv = torch.randn(2, 6, 3, 2, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [(out := run(qkv), *torch.autograd.grad(out.square().sum(), qkv)) for run in (attend, compiled)]
    torch.testing.assert_close(results[0], results[1])
    assert len(kernels.given) == 2


def test_selective_checkpointing_keeps_what_it_computed(kernels: StandIn) -> None:
    qkv = torch.randn(2, 6, 3, 2, 8, requires_grad=True)
    for mode, times in (("selective", 1), ("attention", 1), ("full", 2)):
        kernels.given.clear()
        checkpointed(lambda t: ours.flash_attention_3(*t.sin().unbind(2)).exp(), mode)(qkv).sum().backward()
        assert len(kernels.given) == times


def test_attention_to_captions_is_kept_where_products_are(kernels: StandIn) -> None:
    keys, _ = KeyMask.valid_first(torch.ones(2, 6))
    qkv = torch.randn(2, 6, 3, 2, 8, requires_grad=True)

    def attend(t: Tensor) -> Tensor:
        return _varlen(ours.flash_attention_3_of_lengths, *t.sin().unbind(2), keys).exp()

    for mode, times in (("selective", 1), ("attention", 2), ("full", 2)):
        kernels.given.clear()
        checkpointed(attend, mode)(qkv).sum().backward()
        assert len(kernels.given) == times


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for packages, before those that are installed."""
    monkeypatch.syspath_prepend(tmp_path)
    clear_caches()
    yield tmp_path
    monkeypatch.undo()
    clear_caches()


def install(folder: Path, package: str, library: str, version: str) -> None:
    (folder / package / library).parent.mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / library).write_bytes(b"not a library")
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.mark.parametrize(("version", "found"), [("0.0.34", True), ("0.0.33.post2", False), ("0.0.35", False)])
def test_of_xformers_only_the_version_whose_library_suits_any_pytorch_is_taken(
    packages: Path, version: str, found: bool
) -> None:
    install(packages, "xformers", "flash_attn_3/_C.so", version)
    assert ours.find_library() == (packages / "xformers/flash_attn_3/_C.so" if found else None)


def test_the_library_of_its_own_package_comes_first(packages: Path) -> None:
    install(packages, "xformers", "flash_attn_3/_C.so", "0.0.34")
    install(packages, "flash_attn_3", "_C.abi3.so", "3.0.0")
    assert ours.find_library() == packages / "flash_attn_3/_C.abi3.so"


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("package", ["xformers", "flash_attn_3"])
def test_a_library_that_does_not_load_is_left_out_with_a_warning_and_is_an_error_by_name(
    packages: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    install(packages, package, "flash_attn_3/_C.so" if package == "xformers" else "_C.so", "0.0.34")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match=r"runs without FlashAttention 3: .*_C.so was not loaded: "):
        assert automatic_backend(device, torch.bfloat16, length=4096, head_width=72, packed=False) == "cudnn"
    assert not ours.usable(device)  # and says so once
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(InputError, match="backend 'flash-attn-3': .*_C.so was not loaded: "):
        ours.flash_attention_3(q, q, q)


@pytest.mark.usefixtures("nothing_loaded")
def test_the_runtime_of_cuda_12_is_loaded_first_where_a_package_brings_it(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(packages, "flash_attn_3", "_C.so", "3.0.0")
    library, runtime = packages / "flash_attn_3/_C.so", packages / "nvidia/cuda_runtime/lib/libcudart.so.12"
    monkeypatch.setattr(sys, "path", [str(packages)])
    loaded = []

    def load(path: str) -> None:
        if path == str(library) and str(runtime) not in loaded:
            raise OSError("libcudart.so.12: cannot open shared object file")
        loaded.append(path)

    monkeypatch.setattr(ours.ctypes, "CDLL", load)
    assert "libcudart.so.12: cannot open shared object file; pip install nvidia-cuda-runtime-cu12" in ours._failure()
    assert loaded == []
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    clear_caches()
    assert ours._failure() is None
    assert loaded == [str(runtime), str(library)]


def test_it_is_chosen_for_long_sequences_on_hopper_and_never_for_others(
    kernels: StandIn, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, half = torch.device("cuda", 0), torch.bfloat16
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    monkeypatch.setattr(ours, "_cudnn_takes", lambda *_: True)
    assert automatic_backend(device, half, length=65536, head_width=72, packed=False) == "cudnn"  # not installed
    install(packages, "flash_attn_3", "_C.so", "3.0.0")
    clear_caches()
    assert automatic_backend(device, half, length=128, head_width=72, packed=False) == "flash-attn-3"
    assert automatic_backend(device, half, length=127, head_width=72, packed=False) == "cudnn"
    assert automatic_backend(device, half, length=1024, head_width=68, packed=False) == "cudnn"
    assert automatic_backend(device, torch.float32, length=1024, head_width=72, packed=False) == "efficient"
    assert automatic_backend(torch.device("cpu"), half, length=1024, head_width=72, packed=False) == "flash"
    assert automatic_choice(device, half, head_width=72, packed=False) == (
        "cudnn, flash-attn-3 from 128 tokens on (forward by cudnn up to 1,024 where its tiles are fuller)"
    )
    assert automatic_choice(device, half, head_width=72, packed=True) == (
        "cudnn, flash-attn-3 from 96 tokens on (forward by cudnn up to 1,024 where its tiles are fuller)"
    )
    assert automatic_backend(device, half, length=96, head_width=72, packed=True) == "flash-attn-3"
    assert automatic_backend(device, half, length=95, head_width=72, packed=True) == "cudnn"
    capability[0] = (8, 0)
    assert automatic_choice(device, half, head_width=72, packed=False) == "cudnn"
    assert automatic_backend(device, half, length=1024, head_width=72, packed=False) == "cudnn"
    for masked in (True, False):
        assert preferred_backends("cuda", half, masked=masked)[0] == "cudnn"
        assert "flash-attn-3" in preferred_backends("cuda", half, masked=masked)


@pytest.mark.gpu
def test_on_hopper_cudnns_forward_pass_leaves_what_the_backward_pass_reads() -> None:
    device = torch.device("cuda", 0)
    if not ours.usable(device):
        pytest.skip("FlashAttention 3 is not installed, or the GPU is no Hopper")
    torch.manual_seed(0)
    product = torch.randn(150, 3, 3, 4, 72, device=device, dtype=torch.bfloat16)  # tokens of three sequences in turn
    for views in (product.unbind(2), product.transpose(0, 1).unbind(2), product.transpose(0, 1).contiguous().unbind(2)):
        q, k, v = (t.requires_grad_() for t in (t.detach() for t in views))
        torch.library.opcheck(
            ours._flash_attention_3, (q, k, v, None, None, None, None, True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"), rtol=3e-2, atol=3e-2,
        )  # fmt: skip
        results = []
        for by_cudnn in (True, False):
            out, sums = ours._flash_attention_3(q, k, v, None, None, None, None, by_cudnn)
            results.append((out, sums, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        for found, expected in zip(*results, strict=True):
            assert found.stride() == expected.stride()
            assert (found - expected).float().norm() < 1e-2 * expected.float().norm()


@pytest.mark.gpu
def test_on_hopper_long_sequences_take_it_compiled_or_not() -> None:
    device = torch.device("cuda", 0)
    if ours.find_library() is None or torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("FlashAttention 3 is not installed, or the GPU is no Hopper")
    assert automatic_backend(device, torch.bfloat16, length=1024, head_width=72, packed=False) == "flash-attn-3"
    torch.manual_seed(0)
    qkv = torch.randn(2, 1024, 3, 4, 72, device=device, dtype=torch.bfloat16, requires_grad=True)
    exact = qkv.detach().double().requires_grad_()
    expected, _ = plain(*exact.unbind(2), 72**-0.5)
    (gradient,) = torch.autograd.grad(expected.square().sum(), exact)

    def attend(qkv: Tensor) -> Tensor:
        return facade.attention(*qkv.unbind(2))

    torch._dynamo.reset()
    with torch.profiler.profile() as profile:
        for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
            out = run(qkv)
            (found,) = torch.autograd.grad(out.float().square().sum(), qkv)
            torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
            assert (found - gradient).norm() < 2e-2 * gradient.norm()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["latentmill_attention::flash_attention_3"] >= 2  # PyTorch counts its wrappers by the same name
    assert calls["latentmill_attention::flash_attention_3_backward"] >= 2
