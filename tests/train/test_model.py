"""The models beyond the published tensors: ragged captions, sizes, dropout, initial weights, checkpointing."""

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.errors import InputError
from tests.train.small_models import KINDS, SMALL, inputs, one_of, small_model
from train.model import create_model, model_config
from train.model.checkpointing import ACTIVATION_CHECKPOINTING, Recomputation

WITH_CAPTIONS = [kind for kind in KINDS if not kind.endswith("labels")]


class HostsWork(TorchDispatchMode):
    """Counts operations whose result lies on the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += any(isinstance(each, torch.Tensor) and each.device.type == "cpu" for each in tree_leaves(result))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_came_before_needs_nothing_from_the_host_however_many_came_between(kind):
    """Where passes are recorded as graphs nothing can come from there, and what they read must stay where it is."""
    model = small_model(kind, hidden_size=60).to("meta")  # a width whose positions no other test makes
    values = {name: None if value is None else value.to("meta") for name, value in inputs(kind).items()}
    first, counts = 3 + 100 * KINDS.index(kind), []
    for size in (first, *range(first + 1, first + 81), first):
        x = values["x"].new_empty(2, values["x"].shape[1], 1 if kind.endswith("labels") else size, 2, 2 * size)
        with HostsWork() as work:
            model(**values | {"x": x})
        counts.append(work.count)
    assert min(counts[:-1]) > 0
    assert counts[-1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_a_batch_equals_its_run_alone(kind):
    model, values = small_model(kind), inputs(kind, batch=3)
    together = model(**values)
    for row in range(3):
        alone = one_of(values, row)
        if alone["mask"] is not None:
            length = int(alone["mask"].sum())
            alone |= {"y": alone["y"][:, :, :length], "mask": None}
        torch.testing.assert_close(together[row : row + 1], model(**alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", WITH_CAPTIONS)
def test_padding_has_no_influence_and_no_gradient_wherever_it_lies(kind):
    model, values = small_model(kind), inputs(kind)
    values["mask"] = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]])
    values["y"].requires_grad_()
    model(**values).square().sum().backward()
    is_valid = values["mask"].bool()
    gradients = values["y"].grad[:, 0].abs()
    assert gradients[is_valid].amax(-1).min() > 0
    assert gradients[~is_valid].max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_takes_any_size(kind):
    model = small_model(kind)
    for size in [(1, 4, 4), (3, 2, 8), (16, 6, 4), (2, 5, 7)]:
        values = inputs(kind, size=size)
        assert model(**values).shape == (2, 8, *values["x"].shape[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_the_patch_does_not_divide_is_padded_with_zeros_and_cropped(kind):
    model, values = small_model(kind), inputs(kind, size=(2, 5, 7))
    padded = values | {"x": torch.nn.functional.pad(values["x"], (0, 1, 0, 1))}
    torch.testing.assert_close(model(**values), model(**padded)[:, :, :, :5, :7])


@pytest.mark.parametrize("kind", WITH_CAPTIONS)
def test_a_dropped_caption_is_the_null_caption_under_the_same_mask(kind):
    model, values = small_model(kind), inputs(kind)
    dropped = model(**values, drop_caption=torch.tensor([False, True]))
    null = model.y_embedder.y_embedding[None, None].expand(2, -1, -1, -1)
    torch.testing.assert_close(dropped[0], model(**values)[0])
    torch.testing.assert_close(dropped[1], model(**values | {"y": null})[1])


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_timesteps_differ_in_bfloat16_too(kind):
    model, values = small_model(kind).bfloat16(), one_of(inputs(kind), 0)
    outputs = [model(**values | {"timestep": torch.tensor([t])}) for t in (900.0, 901.0)]
    assert outputs[0].dtype is torch.float32
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_draws_no_random_number(kind):
    model, values = small_model(kind, class_dropout_prob=0.5), inputs(kind)
    state = torch.get_rng_state()
    model.train()(**values)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_first_leaves_nothing_that_training_cannot_use(kind):
    model, values = small_model(kind), inputs(kind, size=(11, 4, 6))  # a size that no other test has
    with torch.inference_mode():
        model(**values)
    model(**values).square().mean().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_those_of_the_convolution_and_tokens_lie_one_after_the_other(kind):
    model, values = small_model(kind, patch_size=(1, 2, 3)), inputs(kind, size=(2, 4, 6))
    projection, seen = model.x_embedder.proj, []
    expected = torch.nn.Conv3d.forward(projection, values["x"]).flatten(3).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.x_embedder(values["x"]), expected, atol=1e-5, rtol=1e-5)
    for block in model.transformer_blocks():
        block.register_forward_pre_hook(lambda _, arguments: seen.extend(t for t in arguments[0] if t is not None))
    model(**values)
    assert all(tensor.is_contiguous() for tensor in seen if tensor.ndim == 4)
    assert len(seen) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_checkpointing_gives_the_same_gradients_and_keeps_less(kind):
    results, kept_bytes = {}, {}
    for mode in ACTIVATION_CHECKPOINTING:
        model, values = small_model(kind, activation_checkpointing=mode), inputs(kind, size=(4, 8, 8))
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(**values)
        output.square().mean().backward()
        results[mode] = [output, *(parameter.grad for parameter in model.parameters())]
        kept_bytes[mode] = sum(kept.values())
    for mode in ACTIVATION_CHECKPOINTING[1:]:
        torch.testing.assert_close(results[mode], results["none"], atol=1e-6, rtol=1e-5)
    assert kept_bytes["full"] < kept_bytes["none"] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_keep_less_than_others_change_no_bit_and_come_first(kind):
    settings = dict.fromkeys(ACTIVATION_CHECKPOINTING) | {f"mixed {mode}": 1 for mode in ACTIVATION_CHECKPOINTING[1:]}
    results = {}
    for name, blocks in settings.items():
        mode = name.removeprefix("mixed ")
        model, values = small_model(kind, activation_checkpointing=mode, checkpointed_blocks=blocks), inputs(kind)
        output = model(**values)
        output.square().mean().backward()
        results[name] = [output, *(parameter.grad for parameter in model.parameters())]
    for name, tensors in results.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, results["none"], strict=True)), name

    model, seen = small_model(kind, depth=3), []
    for block in model.transformer_blocks():
        block.register_forward_pre_hook(lambda block, _: seen.append(block.checkpointing))
    for mode, keeps_more in zip(ACTIVATION_CHECKPOINTING[1:], ACTIVATION_CHECKPOINTING, strict=False):
        seen.clear()
        model.checkpoint_blocks(Recomputation(mode=mode, blocks=2))
        model(**values)
        assert seen == [mode] * 2 + [keeps_more] * (len(seen) - 2)
        assert len(seen) > 2


def test_a_choice_of_recomputation_says_what_all_blocks_do():
    assert str(Recomputation(mode="full", blocks=2)) == "full in 2 blocks, attention in the others"
    assert str(Recomputation(mode="attention", blocks=1)) == "attention in 1 block, selective in the others"
    assert str(Recomputation(mode="selective", blocks=3)) == "selective in 3 blocks"
    assert str(Recomputation(mode="attention")) == "attention"


def test_blocks_to_checkpoint_that_are_not_there_are_an_error():
    with pytest.raises(InputError, match="checkpointed_blocks=9: the model has 2 blocks: use 1 to 2"):
        create_model("stdit-ti/2", **SMALL, activation_checkpointing="full", checkpointed_blocks=9)
    with pytest.raises(InputError, match="checkpointed_blocks=1 does nothing with activation_checkpointing=none"):
        create_model("stdit-ti/2", **SMALL, checkpointed_blocks=1)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_computes_again_what_it_does_not_keep(kind):
    products, attention = {}, {}
    for mode in ACTIVATION_CHECKPOINTING:
        model, values = small_model(kind, activation_checkpointing=mode), inputs(kind)
        loss = model(**values).square().mean()
        with Computed() as computed:
            loss.backward()
        products[mode], attention[mode] = computed.count("mm"), computed.count("attention_for_cpu")
    num_blocks = len(model.transformer_blocks())
    assert products["none"] == products["selective"] < products["attention"]
    assert products["attention"] == products["full"] - num_blocks  # the MLP's second
    to_captions = num_blocks * (kind in WITH_CAPTIONS)
    assert attention["none"] == attention["selective"] == 0
    assert attention["attention"] == to_captions < attention["full"]


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [4, 80])
@pytest.mark.parametrize("kind", WITH_CAPTIONS)
def test_on_a_gpu_kernels_that_are_kept_give_what_they_gave(kind, frames):
    results, attention = {}, {}
    for mode in ACTIVATION_CHECKPOINTING:
        model = small_model(kind, hidden_size=144, num_heads=2, activation_checkpointing=mode).cuda().bfloat16()
        output = model(**{name: value.cuda() for name, value in inputs(kind, size=(frames, 16, 16)).items()})
        with Computed() as computed:
            output.square().mean().backward()
        attention[mode] = sum(
            computed.count(end) for end in ("_cudnn_attention", "_flash_attention", "_3", "_3_packed")
        )
        results[mode] = [output, *(parameter.grad for parameter in model.parameters())]
    assert attention["none"] == attention["selective"] == attention["attention"] == 0 < attention["full"]
    for mode in ACTIVATION_CHECKPOINTING[1:]:
        assert torch.equal(results[mode][0], results["none"][0]), mode
        for found, expected in zip(results[mode], results["none"], strict=True):
            assert (found - expected).norm() <= 0.05 * expected.norm(), mode


class Computed(TorchDispatchMode):
    """Notes the operations that are computed."""

    def __init__(self):
        super().__init__()
        self._names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, end):
        """Returns how many have names that end so."""
        return sum(name.endswith(end) for name in self._names)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_is_right_with_the_linear_function_of_zero_stage_3(kind, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    gradients = []
    for mode in ("none", "selective", "attention"):
        model = small_model(kind, activation_checkpointing=mode)
        model(**inputs(kind)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*zip(KINDS, ("selective", "attention", "selective", "full"), strict=True), ("dit-ti/2", "attention")],
)
def test_blocks_compile_whole_with_their_checkpointing(kind, mode):
    torch.compiler.reset()
    expected = small_model(kind, activation_checkpointing=mode)
    model, values = small_model(kind, activation_checkpointing=mode), inputs(kind)
    for block in model.transformer_blocks():
        block.compile(backend="eager", fullgraph=True)
    for one in (model, expected):
        one(**values).square().mean().backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_initial_weights_are_those_of_the_published_recipe():
    model = create_model("stdit-ti/2", caption_channels=512)
    zero = ("bias", "attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
    for name, parameter in model.named_parameters():
        assert (parameter.abs().max() == 0) == (name.endswith(zero) and name != "x_embedder.proj.bias"), name
    assert model.t_block[1].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.y_embedder.y_proj.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    qkv = model.blocks[0].attn.qkv.weight
    assert qkv.abs().max().item() == pytest.approx((6 / (192 + 576)) ** 0.5, rel=0.01)
    patch = model.x_embedder.proj.weight
    assert patch.abs().max().item() == pytest.approx((6 / (192 + 16)) ** 0.5, rel=0.05)
    assert model.blocks[0].scale_shift_table.std().item() == pytest.approx(192**-0.5, rel=0.1)


def test_positions_by_size_are_the_published_ones_at_the_published_sizes():
    config = model_config("stdit-ti/2", space_scale=None, time_scale=None)
    assert config.space_scale_of(16, 16) == 0.5
    assert config.space_scale_of(32, 32) == 1.0
    assert config.time_scale_of(16) == config.time_scale_of(1) == 1.0
    assert config.time_scale_of(64) == config.time_scale_of(256) == pytest.approx(2 / 3)
    assert 2 / 3 < config.time_scale_of(32) < 1


def test_a_model_with_positions_by_size_equals_at_each_size_one_that_was_made_for_it():
    by_size = small_model("stdit-ti/2", space_scale=None, time_scale=None)
    for size, space, time in [((16, 32, 32), 0.5, 1.0), ((64, 32, 32), 0.5, 2 / 3)]:
        values = inputs("stdit-ti/2", size=size, batch=1)
        made_for_it = small_model("stdit-ti/2", space_scale=space, time_scale=time)
        torch.testing.assert_close(by_size(**values), made_for_it(**values))


@pytest.mark.parametrize(
    ("name", "millions"), [("stdit-xl/2", 760), ("stdit3-xl/2", 1210), ("stdit3-3b/2", 3182), ("dit-xl/2", 611)]
)
def test_the_large_presets_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.005)


def test_a_dit_with_labels_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = create_model("dit-xl/2", num_classes=1000)
    positions = 256 * 1152  # published as a parameter that is not trained
    assert sum(parameter.numel() for parameter in model.parameters()) + positions == 675_129_632


def test_published_weights_of_other_shapes_are_made_to_fit():
    model = small_model("stdit-ti/2")
    state = dict(small_model("stdit-ti/2").state_dict())
    state["pos_embed"], state["pos_embed_temporal"] = torch.zeros(1, 4, 48), torch.zeros(1, 2, 48)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    state["y_embedder.y_embedding"] = torch.arange(12.0)[:, None].expand(12, 16)
    model.load_state_dict(state)
    assert model.y_embedder.y_embedding[:, 0].tolist() == list(range(9))
    own = model.y_embedder.y_embedding.clone()
    state["y_embedder.y_embedding"] = torch.full((4, 16), -1.0)
    model.load_state_dict(state)
    assert torch.equal(model.y_embedder.y_embedding, torch.cat([torch.full((4, 16), -1.0), own[4:]]))


def test_unknown_models_and_settings_name_the_choices():
    with pytest.raises(InputError, match="unknown model 'dit': choose from stdit-xl/2, stdit-s/2, stdit-ti/2"):
        create_model("dit")
    with pytest.raises(InputError, match=r"unknown model setting 'width': choose from .*hidden_size"):
        create_model("stdit-ti/2", width=3)
    with pytest.raises(InputError, match="depth='two': expected a value like 6"):
        create_model("stdit-ti/2", depth="two")
    with pytest.raises(InputError, match="multiple of num_heads=3"):
        create_model("stdit-ti/2", hidden_size=200)
    with pytest.raises(InputError, match="space_scale=0.0: expected more than 0, or None"):
        create_model("stdit-ti/2", space_scale=0)
    with pytest.raises(InputError, match="unknown model setting 'space_scale'"):
        create_model("stdit3-ti/2", space_scale=0.5)
    with pytest.raises(InputError, match="heads of 15: expected an even width"):
        create_model("stdit3-ti/2", hidden_size=60, num_heads=4)
    with pytest.raises(
        InputError, match="activation_checkpointing='some': expected one of none, selective, attention, full"
    ):
        create_model("stdit-ti/2", **SMALL, activation_checkpointing="some")
    with pytest.raises(InputError, match="captions of 10 tokens, but model_max_length=9: cut them"):
        small_model("stdit-ti/2")(torch.zeros(1, 4, 1, 2, 2), torch.zeros(1), torch.zeros(1, 1, 10, 16))
