"""Training with products in 8 bits: which products, on what devices, in which company."""

import json
import re

import pytest
import torch
from torch import Tensor

from shared.errors import InputError
from tests.train.small_models import KINDS, inputs, small_model
from train.building import build_model
from train.config import ParallelOptions
from train.model import attention_layers, blocks, dit, layers, model_config, stdit
from train.model.checkpointing import Recomputation
from train.model.float8 import (
    TOKEN_PRODUCTS,
    compute_in_float8,
    require_float8_units,
    require_float8_widths,
    token_products,
)
from train.ops import float8_linear
from train.ops.float8 import empty_rows, rows_reference
from train.parallel.sequence import busiest_layout
from train.planning.dry_run import describe
from train.setup import check_run
from train.trainer import train


def losses(config) -> list[float]:
    return [json.loads(line)["loss"] for line in (config.output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_products_over_tokens_are_in_8_bits_and_no_others(kind):
    model = small_model(kind)
    chosen = {name for name, module in model.named_modules() if module in token_products(model)}
    in_blocks = {
        name for name, module in model.named_modules() if "blocks." in name and isinstance(module, torch.nn.Linear)
    }
    assert in_blocks - chosen == {
        name for name in in_blocks if name.endswith("kv_linear") or "adaLN_modulation" in name
    }
    assert chosen < in_blocks

    exact = model(**inputs(kind))
    compute_in_float8(model)
    rounded = model(**inputs(kind))
    assert 0.002 < ((rounded - exact).norm() / exact.norm()).item() < 0.1
    compute_in_float8(model, wanted=False)
    assert torch.equal(model(**inputs(kind)), exact)


def _results(kind: str, *, compiled: bool = False) -> list[Tensor]:
    """Returns what a model computes in 8 bits, and its gradients."""
    model = small_model(kind)
    compute_in_float8(model)
    for block in model.transformer_blocks() if compiled else ():
        block.compile(backend="eager", fullgraph=True)
    out = model(**inputs(kind))
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_converted_by_what_writes_them_and_read_so_by_the_product_behind(kind, monkeypatch):
    converted = []
    monkeypatch.setattr(float8_linear, "to_rows", lambda x: converted.append(x) or rows_reference(x))
    found = _results(kind)
    layers = [name for name, module in small_model(kind).named_modules() if "blocks." in name]
    products = [name for name in layers if name.endswith(TOKEN_PRODUCTS)]
    by_products = [name for name in products if name.endswith(".proj")]  # what attention gives
    by_products += ["blocks.0.attn_temp.qkv"] * kind.startswith("stdit-")  # positions are added in between
    assert len(converted) == len(products) + len(by_products)  # weights, and inputs

    for module in (attention_layers, blocks, dit, stdit):
        monkeypatch.setattr(module, "rows_for", lambda reader, x: None)
    for one, other in zip(found, _results(kind), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "size", "moved"),
    [
        ("stdit-ti/2", (4, 8, 8), r"blocks\.1\.attn_temp\.qkv"),
        ("stdit-ti/2", (1, 8, 8), r".*\.attn\.qkv"),
        ("stdit3-ti/2", (4, 8, 8), r"temporal_blocks\.\d\.attn\.qkv"),
        ("dit-ti/2", (4, 8, 8), None),
    ],
)
def test_what_other_ranks_send_is_not_written_in_8_bits_ahead(kind, size, moved, monkeypatch):
    """Of two ranks that share frames, or the places of one frame."""
    given, read = [], []
    monkeypatch.setattr(layers, "empty_rows", lambda *shape: given.append(empty_rows(*shape)) or given[-1])

    def noted(x, values, *rest):
        read.append(values)
        return forward(x, values, *rest)

    forward = float8_linear._forward
    monkeypatch.setattr(float8_linear, "_forward", noted)
    counts = []
    for degree in (1, 2):
        model = small_model(kind).to("meta")
        compute_in_float8(model)
        model.layout_for = busiest_layout(degree, in_pieces=False)
        model(**{name: value.to("meta") for name, value in inputs(kind, size=size).items()})
        assert given != []
        assert all(any(rows.values is values for values in read) for rows in given)
        counts.append(len(given))
        given.clear()
    moving = [name for name, _ in model.named_modules() if moved is not None and re.fullmatch(moved, name)]
    assert (moving == []) == (moved is None)
    assert counts[0] - counts[1] == len(moving)


def test_blocks_with_products_in_8_bits_compile_whole():
    torch.compiler.reset()
    for one, other in zip(_results("stdit-ti/2"), _results("stdit-ti/2", compiled=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "attention", "full"])
def test_a_checkpointed_model_has_the_same_gradients(mode):
    found = []
    for each in ("none", mode):
        model = small_model("stdit-ti/2")
        compute_in_float8(model)
        model.checkpoint_blocks(Recomputation(mode=each))
        model(**inputs("stdit-ti/2")).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_run_is_trained_in_8_bits_says_so_and_may_go_on_without(ranks, small_config, capsys):
    config = small_config.changed(products="float8")
    assert train(config, ranks) == 0
    assert "bfloat16 with products in float8, ZeRO 2" in capsys.readouterr().out
    exact = small_config.changed(output=small_config.output.with_name("exact"))
    train(exact, ranks)
    assert losses(config) == pytest.approx(losses(exact), rel=0.02)
    assert losses(config) != losses(exact)
    assert train(config.changed(products=None, steps=7), ranks) == 0
    assert "bfloat16, ZeRO 2" in capsys.readouterr().out


def test_the_dry_run_says_in_what_products_are_computed(ranks, small_config):
    told = {p: describe(check_run(small_config.changed(products=p), ranks), 1) for p in (None, "float8")}
    assert "ZeRO 2, bfloat16 with products in float8, activation" in told["float8"]
    assert "ZeRO 2, bfloat16, activation" in told[None]


@pytest.mark.parametrize("changes", [{"zero_stage": 0}, {"zero_stage": 3}, {"gradient_accumulation": 2}], ids=str)
def test_what_is_sharded_or_taken_in_parts_is_the_same_in_8_bits(ranks, small_config, changes):
    config = small_config.changed(products="float8", steps=3)
    other = config.changed(output=config.output.with_name("other"), **changes)
    for each in (config, other):
        train(each, ranks)
    assert losses(other) == pytest.approx(losses(config), rel=2e-3)


def test_low_rank_additions_go_with_a_base_in_8_bits(ranks, small_config):
    pytest.importorskip("peft")
    base = small_config.changed(steps=1, output=small_config.output.with_name("base"))
    train(base, ranks)
    for targets in (("qkv", "proj"), ("fc1",), ("fc2",)):
        folder = small_config.output.with_name("-".join(targets))
        tuned = {"init_from": str(base.output), "lora_rank": 2, "lora_targets": targets, "steps": 3}
        config = small_config.changed(products="float8", output=folder / "8", **tuned)
        model = build_model(check_run(config, ranks).model_config, config)
        layers = token_products(model)
        assert len(layers) == 16
        assert all(layer.float8 for layer in layers)
        assert any(name.endswith("base_layer") for name, module in model.named_modules() if module in layers)
        exact = config.changed(products=None, output=folder / "16")
        for each in (config, exact):
            assert train(each, ranks) == 0
        assert losses(config) == pytest.approx(losses(exact), rel=0.02)


def test_widths_that_do_not_suit_the_units_are_refused_by_name(ranks, small_config):
    odd = small_config.changed(products="float8", model_settings=("depth=1", "hidden_size=40", "num_heads=2"))
    with pytest.raises(InputError, match="products=float8: hidden_size=40 is not a multiple of 16"):
        check_run(odd, ranks)
    with pytest.raises(InputError, match="the MLP's width=72 is not a multiple of 16"):
        require_float8_widths(model_config("stdit-ti/2", hidden_size=48, mlp_ratio=1.5, num_heads=2))
    check_run(odd.changed(products=None), ranks)


def test_a_gpu_without_units_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(InputError, match=r"A100 has compute capability 8.0, products in 8 bits need 8.9 or more"):
        require_float8_units(torch.device("cuda", 0))
    require_float8_units(torch.device("cpu"))


def test_float32_and_products_in_8_bits_are_refused_together():
    with pytest.raises(InputError, match="products=float8 needs precision=bfloat16, found float32"):
        ParallelOptions(products="float8", precision="float32")
