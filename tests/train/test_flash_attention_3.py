"""FlashAttention 3 as operators of ours: which library is taken, and what is asked of its kernels.

Its kernels need a GPU; here operators of the same declaration compute the same in plain PyTorch.
"""

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.errors import InputError
from train.model import attention as facade
from train.model import flash_attention_3 as ours
from train.model.attention import KeyMask, _varlen, automatic_backend, automatic_choice, preferred_backends
from train.model.checkpointing import checkpointed

FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0., bool deterministic=False, int sm_margin=0) -> "
)
RESULTS = {  # those of the library in xformers, and those that later ones declare
    "gradients too": "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)",
    "without gradients": "(Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns attention and the logarithms of the sums, (..., N, H, D) and (..., H, N)."""
    scores = torch.einsum("...nhd,...mhd->...hnm", q, k) * scale
    return torch.einsum("...hnm,...mhd->...nhd", scores.softmax(-1), v), scores.logsumexp(-1)


class StandIn:
    """What the kernels do with what they are given, sequence by sequence."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, ...]] = []

    def forward(self, q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, **_):
        self.given.append((q, k, v))
        out, sums = torch.empty_like(q), q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3])
        for queries, keys in self._sequences(cu_seqlens_q, cu_seqlens_k):
            out[queries], one = plain(q[queries], k[keys], v[keys], softmax_scale)
            sums[..., queries[-1]] = one
        return out, sums, q.new_empty(0), q.new_empty(0)

    def backward(self, dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, **to):
        for queries, keys in self._sequences(cu_seqlens_q, cu_seqlens_k):
            scores = torch.einsum("...nhd,...mhd->...hnm", q[queries], k[keys]) * softmax_scale
            weights = (scores - softmax_lse[..., queries[-1], None]).exp()
            of_weights = torch.einsum("...nhd,...mhd->...hnm", dout[queries], v[keys])
            shift = (dout[queries] * out[queries]).sum(-1).transpose(-1, -2)[..., None]
            of_scores = weights * (of_weights - shift) * softmax_scale
            to["dq"][queries] = torch.einsum("...hnm,...mhd->...nhd", of_scores, k[keys])
            to["dk"][keys] = torch.einsum("...hnm,...nhd->...mhd", of_scores, q[queries])
            to["dv"][keys] = torch.einsum("...hnm,...nhd->...mhd", weights, dout[queries])
        return to["dq"], to["dk"], to["dv"]

    def _sequences(self, query_borders, key_borders):
        """Yields where the queries and the keys of each sequence lie."""
        if query_borders is None:
            yield (slice(None),), (slice(None),)
        else:
            for queries, keys in zip(pairwise(query_borders.tolist()), pairwise(key_borders.tolist()), strict=True):
                yield (slice(*queries),), (slice(*keys),)


@pytest.fixture
def nothing_loaded() -> None:
    """PyTorch keeps a library's operators for good, so none can stand in for them in a process that has loaded it."""
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        pytest.skip("the library itself is loaded")


@pytest.fixture(params=RESULTS)
def kernels(request: pytest.FixtureRequest, nothing_loaded: None) -> Iterator[StandIn]:
    stand_in = StandIn()
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    library.define(FORWARD)
    library.define(BACKWARD + RESULTS[request.param])

    def named(operator, args, kwargs):
        names = [argument.name for argument in operator.default._schema.arguments]
        return dict(zip(names, args, strict=False)) | kwargs

    def backward(*args, **kwargs):
        gradients = stand_in.backward(**named(torch.ops.flash_attn_3.bwd, args, kwargs))
        others = [gradients[0].new_empty(0)] * 5
        return (*gradients, *others) if request.param == "gradients too" else tuple(others)

    library.impl("fwd", lambda *args, **kw: stand_in.forward(**named(torch.ops.flash_attn_3.fwd, args, kw)), "CPU")
    library.impl("bwd", backward, "CPU")
    clear_caches()
    yield stand_in
    library._destroy()
    clear_caches()


def clear_caches() -> None:
    for cached in (ours.find_library, ours._failure, ours._warn, facade._installed):
        cached.cache_clear()


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
    assert {t.untyped_storage().data_ptr() for t in kernels.given[0]} == {qkv.untyped_storage().data_ptr()}
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


def test_operators_say_of_their_results_what_a_compiler_must_know(kernels: StandIn) -> None:
    q, k, v = (torch.randn(2, n, 2, 8, requires_grad=True) for n in (5, 7, 7))
    torch.library.opcheck(ours._flash_attention_3, (q, k, v, None, None, None, None))
    borders = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 7, 14], dtype=torch.int32)
    flat = [t.detach().flatten(0, 1).requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(ours._flash_attention_3, (*flat, *borders, 5, 7))


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
    for mode, times in (("selective", 1), ("full", 2)):
        kernels.given.clear()
        checkpointed(lambda t: ours.flash_attention_3(*t.sin().unbind(2)).exp(), mode)(qkv).sum().backward()
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
        assert automatic_backend(device, torch.bfloat16, length=4096, head_width=72) == "cudnn"
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
    assert automatic_backend(device, half, length=65536, head_width=72) == "cudnn"  # not installed
    install(packages, "flash_attn_3", "_C.so", "3.0.0")
    clear_caches()
    assert automatic_backend(device, half, length=1024, head_width=72) == "flash-attn-3"
    assert automatic_backend(device, half, length=1023, head_width=72) == "cudnn"
    assert automatic_backend(device, half, length=1024, head_width=68) == "cudnn"
    assert automatic_backend(device, torch.float32, length=1024, head_width=72) == "efficient"
    assert automatic_backend(torch.device("cpu"), half, length=1024, head_width=72) == "flash"
    assert automatic_choice(device, half, head_width=72) == "cudnn, flash-attn-3 from 1,024 tokens on"
    capability[0] = (8, 0)
    assert automatic_choice(device, half, head_width=72) == "cudnn"
    assert automatic_backend(device, half, length=1024, head_width=72) == "cudnn"
    for masked in (True, False):
        assert preferred_backends("cuda", half, masked=masked)[0] == "cudnn"
        assert "flash-attn-3" in preferred_backends("cuda", half, masked=masked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_hopper_long_sequences_take_it_compiled_or_not() -> None:
    device = torch.device("cuda", 0)
    if ours.find_library() is None or torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("FlashAttention 3 is not installed, or the GPU is no Hopper")
    assert automatic_backend(device, torch.bfloat16, length=1024, head_width=72) == "flash-attn-3"
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
