"""Many clips one after the other, and memory that does not hold a pass, give the latents of each clip alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from shared.encoders.full_size import write_sd_vae
from shared.encoders.vae import VideoAutoencoder
from shared.encoders.vae_graphs import MAX_PIXELS, CudaCapture, PassGraphs, Run
from shared.errors import InputError
from shared.spec import Bucket


def clip(seed: int, num_frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """Returns random frames."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def test_a_clip_is_taken_only_when_those_before_it_are_yielded() -> None:
    taken = []

    def clips() -> Iterator[tuple[str, np.ndarray]]:
        for seed in "abc":
            taken.append(seed)
            yield seed, clip(0)

    vae = VideoAutoencoder.load("demo:vae", micro_batch=3)
    found = vae.encode_each(clips())
    assert next(found)[0] == "a"
    assert taken == ["a"]


@pytest.mark.parametrize("posterior", ["sample", "mean+logvar"])
def test_many_clips_are_encoded_as_each_alone_bit_for_bit(posterior: Any) -> None:
    vae = VideoAutoencoder.load("demo:vae", micro_batch=3, posterior=posterior)
    clips = [(str(seed), clip(seed)) for seed in range(4)]
    found = dict(vae.encode_each(clips))
    assert list(found) == ["0", "1", "2", "3"]
    for seed, frames in clips:
        assert torch.equal(found[seed], vae.encode(frames, seed=seed))
        assert found[seed].dtype == torch.float32


def test_no_clips_give_no_latents() -> None:
    assert list(VideoAutoencoder.load("demo:vae").encode_each([])) == []


def test_every_pass_is_measured_and_nothing_is_yielded_within() -> None:
    vae = VideoAutoencoder.load("demo:vae", micro_batch=3)
    seen: list[str] = []

    @contextlib.contextmanager
    def measure() -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    vae.measure = measure
    for seed, _ in vae.encode_each((str(seed), clip(seed)) for seed in range(2)):
        seen.append(seed)
    assert seen == ["begin", "end", "begin", "end", "0", "begin", "end", "begin", "end", "1"]


class SmallMemory:
    """Lets a model encode no more than so many frames or clips at once."""

    def __init__(self, model: Any, most: int) -> None:
        self.sizes: list[int] = []
        self._encode, self._most = model.encode, most
        model.encode = self

    def __call__(self, pixels: Tensor) -> Any:
        self.sizes.append(len(pixels))
        if len(pixels) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._encode(pixels)


def test_a_pass_that_the_memory_does_not_hold_is_halved() -> None:
    vae, frames = VideoAutoencoder.load("demo:vae", micro_batch=8), clip(0, 16)
    expected = vae.encode(frames, seed="a")
    assert not vae.halved
    memory = SmallMemory(vae._model, 3)
    found = vae.encode(frames, seed="a")
    assert memory.sizes == [8, 4, *[2] * 8]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert vae.halved


def test_what_does_not_fit_once_is_not_tried_again_and_later_latents_are_still_marked() -> None:
    vae = VideoAutoencoder.load("demo:vae", micro_batch=8)
    memory = SmallMemory(vae._model, 4)
    vae.encode(clip(0, 8), seed="a")
    memory.sizes.clear()
    vae.encode(clip(1, 8), seed="b")
    assert (memory.sizes, vae.halved) == ([4, 4], True)
    memory.sizes.clear()
    vae.encode(clip(2, 4, height=16), seed="c")  # another size
    assert (memory.sizes, vae.halved) == ([4], False)


def test_a_frame_that_the_memory_does_not_hold_is_refused_with_its_size() -> None:
    vae = VideoAutoencoder.load("demo:vae", micro_batch=4)
    SmallMemory(vae._model, 0)
    with pytest.raises(InputError, match="has not the memory for one frame of 32x48: use a smaller bucket"):
        vae.encode(clip(0), seed="a")


def test_a_whole_clip_that_the_memory_does_not_hold_is_refused_with_its_size(tmp_path: Path) -> None:
    AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).save_pretrained(tmp_path)
    vae = VideoAutoencoder.load(str(tmp_path), micro_batch=20)
    SmallMemory(vae._model, 0)
    with pytest.raises(InputError, match="has not the memory for a whole clip of 5 frames of 32x48"):
        vae.encode(clip(0), seed="a")


class Recorder:
    """Stands for a GPU that records passes: its graphs write to one place, as CUDA's do."""

    def __init__(self, most: int = 99) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._most = most

    def __call__(self, run: Run, units: Tensor) -> Run:
        if len(self.shapes) == self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.shapes.append(tuple(units.shape))
        given = run(units)

        def replay(units: Tensor) -> Tensor:
            return given.copy_(run(units))

        return replay


def test_a_shape_is_recorded_when_it_comes_again_and_its_latents_stay_the_same() -> None:
    vae, recorder = VideoAutoencoder.load("demo:vae", micro_batch=3), Recorder()
    clips = [(str(seed), clip(seed, 6)) for seed in range(3)]
    expected = [vae.encode(frames, seed=seed) for seed, frames in clips]
    vae._graphs = PassGraphs(lambda units: vae._moments(units, len(units)), recorder)
    assert all(map(torch.equal, [latent for _, latent in vae.encode_each(clips)], expected))
    assert recorder.shapes == [(3, 32, 48, 3)]
    vae.encode(clip(0, 4), seed="a")  # passes of 3 and of 1
    assert len(recorder.shapes) == 1


def test_large_passes_and_those_for_which_the_memory_lacks_are_not_recorded() -> None:
    recorder, ran = Recorder(most=1), []

    def run(units: Tensor) -> Tensor:
        ran.append(len(units))
        return units + 1

    graphs = PassGraphs(run, recorder)
    large = torch.zeros(MAX_PIXELS // 64 + 1, 8, 8, 3)
    for _ in range(3):
        graphs(large)
    assert recorder.shapes == []
    small, other = torch.zeros(2, 8, 8, 3), torch.zeros(3, 8, 8, 3)
    for units in (small, small, other, other, small, small):  # the second graph finds no memory
        assert torch.equal(graphs(units), units + 1)
    assert recorder.shapes == [tuple(small.shape)]
    assert not graphs.give_up()


def test_a_pass_that_the_memory_does_not_hold_gets_that_of_the_graphs_before_it_is_halved() -> None:
    vae = VideoAutoencoder.load("demo:vae", micro_batch=4)
    vae._graphs = PassGraphs(lambda units: vae._moments(units, len(units)), Recorder())
    for seed in range(2):
        vae.encode(clip(seed, 4), seed="a")
    memory, most = SmallMemory(vae._model, 3), []
    give_up = vae._graphs.give_up

    def freed() -> bool:
        most.append(memory._most)
        memory._most = 4
        return give_up()

    vae._graphs.give_up = freed  # type: ignore[method-assign]
    vae.encode(clip(2, 4), seed="a")
    assert (most, memory.sizes, vae.halved) == ([3], [4, 4], False)


def test_smaller_frames_go_through_in_larger_numbers() -> None:
    vae = VideoAutoencoder.load("demo:vae", micro_batch=2, micro_batch_pixels=32 * 48)
    memory = SmallMemory(vae._model, 99)
    vae.encode(clip(0, 8), seed="a")
    vae.encode(clip(0, 8, 32, 24), seed="a")
    vae.encode(clip(0, 2, 64, 192), seed="a")
    assert memory.sizes == [2, 2, 2, 2, 4, 4, 1, 1]
    made = vae.provenance()
    assert (made["micro_batch"], made["micro_batch_pixels"]) == (2, 32 * 48)
    assert "micro_batch_pixels" not in VideoAutoencoder.load("demo:vae").provenance()


def test_the_micro_batch_of_a_cpu_is_not_searched() -> None:
    vae = VideoAutoencoder.load("demo:vae", micro_batch=7)
    vae.fit_micro_batch(Bucket(16, 256, 256))
    assert (vae.micro_batch, vae.micro_batch_pixels) == (7, None)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image autoencoder of Stable Diffusion's shape and a quarter of its width, with random weights."""
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.gpu
def test_passes_as_graphs_give_the_same_latents_bit_for_bit(tmp_path: Path) -> None:
    write_sd_vae(tmp_path)
    options: Any = {"device": "cuda", "dtype": torch.bfloat16, "micro_batch": 16, "compile": True}
    plain, graphs = (VideoAutoencoder.load(str(tmp_path), graphs=graphs, **options) for graphs in (False, True))
    # 24 frames of the second size are passes of 16 and of 8: the third clip of each size is the second graph's first.
    clips = [(str(seed), clip(seed, *size)) for seed in range(4) for size in ((16, 256, 256), (24, 128, 192))]
    for seed, frames in clips:
        assert torch.equal(graphs.encode(frames, seed=seed), plain.encode(frames, seed=seed)), (seed, frames.shape)
    assert graphs._graphs is not None
    assert sorted(tuple(shape)[:3] for shape in graphs._graphs._graphs) == [
        (8, 128, 192),
        (16, 128, 192),
        (16, 256, 256),
    ]

    together = [latent.cpu() for _, latent in graphs.encode_each(clips[::2] * 8)]  # none waits for the one before
    assert all(map(torch.equal, together, [plain.encode(frames, seed=seed).cpu() for seed, frames in clips[::2]] * 8))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(graphs.encode_each(clips[::2]))) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphs._graphs.give_up()
    assert torch.equal(graphs.encode(clips[0][1], seed="0").cpu(), together[0])


@pytest.mark.gpu
def test_passes_for_whose_graph_the_memory_lacks_are_launched_kernel_by_kernel(sd: str) -> None:
    vae = VideoAutoencoder.load(sd, device="cuda", dtype=torch.bfloat16, micro_batch=12, compile=True, graphs=True)
    expected = [vae.encode(clip(seed, 12, 64, 96), seed="a") for seed in range(3)]
    assert vae._graphs is not None

    def lacks(units: Tensor) -> Tensor:
        moments = vae._moments(units, len(units))
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return moments

    vae._graphs = PassGraphs(lacks, CudaCapture(torch.device("cuda")))
    for _ in range(2):
        for seed in range(3):
            assert torch.equal(vae.encode(clip(seed, 12, 64, 96), seed="a"), expected[seed])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not vae._graphs.give_up()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_many_clips_are_encoded_on_a_gpu_as_each_alone_bit_for_bit(sd: str, compiled: bool) -> None:
    vae = VideoAutoencoder.load(sd, device="cuda", dtype=torch.bfloat16, micro_batch=12, compile=compiled)
    clips = [(str(seed), clip(seed, 16, 128, 192)) for seed in range(7)]
    together = [(seed, latent.cpu()) for seed, latent in vae.encode_each(clips)]
    for (seed, frames), (name, latent) in zip(clips, together, strict=True):
        assert seed == name
        assert torch.equal(vae.encode(frames, seed=seed).cpu(), latent)
    precise = VideoAutoencoder.load(sd, device="cuda", micro_batch=12).encode(clips[0][1], seed="0").cpu()
    assert (together[0][1] - precise).abs().max() < 0.05 * precise.std()


@pytest.mark.gpu
def test_encoding_on_a_gpu_never_waits_for_it(sd: str) -> None:
    vae = VideoAutoencoder.load(sd, device="cuda", dtype=torch.bfloat16, micro_batch=12)
    clips = [(str(seed), clip(seed, 16, 128, 192)) for seed in range(7)]
    list(vae.encode_each(clips))  # libraries wait while they warm up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(vae.encode_each(clips))) == 7
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_micro_batch_is_found_within_the_memory(sd: str) -> None:
    vae = VideoAutoencoder.load(sd, device="cuda", dtype=torch.bfloat16)
    vae.fit_micro_batch(Bucket(16, 512, 512))
    assert (vae.micro_batch, vae.micro_batch_pixels) == (16, 512 * 512)
    most = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(8e8 / most)
    try:
        assert not vae.halved
        vae.encode(clip(0, 16, 512, 512), seed="a")
        assert vae.halved
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
