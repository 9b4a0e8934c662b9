"""What a form of a model has to compute again to fit on a device, for rows that ask for ``auto``."""

from functools import cache
from pathlib import Path

from train.benchmark.step_settings import SPATIAL_STRIDE
from train.benchmark.variants import Variant, running_as
from train.config import TrainConfig
from train.diffusion.objective import create_objective
from train.model.checkpointing import Recomputation
from train.model.config import ModelConfig
from train.planning.activations import meta_model, step_memory
from train.planning.fitting import least_recomputation


@cache
def fitted_recomputation(
    config: ModelConfig,
    form: Variant,
    *,
    model: str,
    batch: int,
    latent_size: tuple[int, int, int],
    sequence_parallel: int,
    world_size: int,
    device_bytes: float,
) -> Recomputation:
    """Returns the least with which a step fits by count.

    Args:
        config: Of the whole model.
        form: How it runs.
        model: Its preset.
        batch: Samples of a rank, or of the ranks that share their samples.
        latent_size: Frames, rows and columns.
        sequence_parallel: Ranks that share a sample's tokens.
        world_size: Ranks.
        device_bytes: Of the smallest device.
    """
    run = TrainConfig.of(
        cache="memory",
        output=Path("unused"),
        model=model,
        batch_size=batch * world_size // sequence_parallel,
        sequence_parallel=sequence_parallel,
        cuda_graphs=form.graphs,
    )
    objective = create_objective(None, model=model, spatial_stride=SPATIAL_STRIDE)

    def needed(choice: Recomputation) -> int:
        options = run.changed(activation_checkpointing=choice.mode, checkpointed_blocks=choice.blocks)
        without_content = meta_model(config, options)
        with running_as(without_content, form):
            plan = step_memory(
                without_content,
                objective,
                options,
                num_samples=batch,
                latent_shape=(config.in_channels, *latent_size),
                captions=(config.model_max_length, config.caption_channels),
                world_size=world_size,
            )
        return plan.needed

    return least_recomputation(len(meta_model(config, run).transformer_blocks()), needed, device_bytes)
