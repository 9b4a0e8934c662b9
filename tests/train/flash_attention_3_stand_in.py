"""Operators of the declaration of FlashAttention 3's, computing the same in plain PyTorch: its kernels need a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from train.model import attention as facade
from train.model import flash_attention_3 as ours

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
        """Queries, keys, values and output of each call."""
        self.written: list[tuple[Tensor, ...]] = []
        """Gradients of queries, keys and values of each call."""
        self.by_cudnn: list[tuple[Tensor, ...]] = []
        """Queries, keys, values and output of each call of cuDNN's forward pass."""

    def forward(self, q, k, v, out, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, **_):
        self._require_neighbours(q, k, v, out)
        self.given.append((q, k, v, out))
        sums = q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3])
        for queries, keys in self._sequences(cu_seqlens_q, cu_seqlens_k):
            out[queries], one = plain(q[queries], k[keys], v[keys], softmax_scale)
            sums[..., queries[-1]] = one
        return out, sums, q.new_empty(0), q.new_empty(0)

    def cudnn(self, query, key, value, bias, compute_log_sumexp, *_, **__):
        """Of (B, H, N, D), with an output in the order in memory of the queries, as PyTorch allocates it for cuDNN."""
        assert bias is None
        assert compute_log_sumexp
        out, sums = plain(*(t.transpose(1, 2) for t in (query, key, value)), query.shape[-1] ** -0.5)
        to = torch.empty_like(query).copy_(out.transpose(1, 2))
        self.by_cudnn.append((query, key, value, to))
        seed = torch.zeros((), dtype=torch.int64)
        return to, sums[..., None], None, None, query.shape[2], key.shape[2], seed, seed, None

    def backward(self, dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, **to):
        self._require_neighbours(dout, q, k, v, out, to["dq"], to["dk"], to["dv"])
        self.written.append((to["dq"], to["dk"], to["dv"]))
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

    def _require_neighbours(self, *tensors: Tensor) -> None:
        """As the kernels do."""
        assert all(t.stride(-1) == 1 for t in tensors)

    def _sequences(self, query_borders, key_borders):
        """Yields where the queries and the keys of each sequence lie."""
        if query_borders is None:
            yield (slice(None),), (slice(None),)
        else:
            for queries, keys in zip(pairwise(query_borders.tolist()), pairwise(key_borders.tolist()), strict=True):
                yield (slice(*queries),), (slice(*keys),)


@contextmanager
def standing_in(results: str) -> Iterator[StandIn]:
    """Registers the operators, with results as :data:`RESULTS` names them; and cuDNN's forward pass for CPUs."""
    stand_in = StandIn()
    cudnn = torch.library.Library("aten", "IMPL")
    cudnn.impl("_scaled_dot_product_cudnn_attention", stand_in.cudnn, "CPU")
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    library.define(FORWARD)
    library.define(BACKWARD + RESULTS[results])

    def named(operator, args, kwargs):
        names = [argument.name for argument in operator.default._schema.arguments]
        return dict(zip(names, args, strict=False)) | kwargs

    def backward(*args, **kwargs):
        gradients = stand_in.backward(**named(torch.ops.flash_attn_3.bwd, args, kwargs))
        others = [gradients[0].new_empty(0)] * 5
        return (*gradients, *others) if results == "gradients too" else tuple(others)

    library.impl("fwd", lambda *args, **kw: stand_in.forward(**named(torch.ops.flash_attn_3.fwd, args, kw)), "CPU")
    library.impl("bwd", backward, "CPU")
    clear_caches()
    try:
        yield stand_in
    finally:
        library._destroy()
        cudnn._destroy()
        clear_caches()


def clear_caches() -> None:
    for cached in (ours.find_library, ours._failure, ours._warn, facade._installed):
        cached.cache_clear()
