"""Whose weights are sampled, and which encoders belong to them: a training run's, or published ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache.dataset import Cache
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry
from train.config import DEFAULTS, ArchitectureOptions
from train.diffusion.objective import Objective, create_objective
from train.index_columns import IMAGE_FPS
from train.model import build_model, model_config
from train.model.config import DiTConfig, config_from_values
from train.model.published import load_state, stdit3_config
from train.model.transformer import DiffusionTransformer
from train.model.weight_files import read_weights
from train.run_folder import read_run
from train.run_weights import load_run_model, weights_file
from train.sample_index import LATENT, SampleIndex
from train.sampling.config import SampleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A trained model, before its weights are loaded."""

    name: str
    """The model's."""
    load: Callable[[], DiffusionTransformer]
    """Returns the model with its weights, float32, in evaluation mode. Raises InputError if they do not fit."""
    objective: Objective
    """What it was trained for."""
    bfloat16: bool
    """Whether it computes in bfloat16 where that is fast."""
    null_caption: bool
    """Whether the null caption was trained, so that there is guidance."""
    frame_masks: bool | None
    """Whether it was trained with frames that are given; None if that is not known."""
    provenance: Mapping[str, Mapping[str, Any]]
    """Of the encoders, by stream."""
    buckets: Mapping[Bucket, tuple[int, float]]
    """Samples and frames a second by bucket."""

    @property
    def usual_bucket(self) -> Bucket:
        """The most common one; of clips, if there are any."""
        return max(self.buckets, key=lambda bucket: (bucket.num_frames > 1, self.buckets[bucket][0]))

    def rate(self, bucket: Bucket) -> float:
        """Returns the frames a second at which clips of a size are made.

        Raises:
            InputError: if only images are known, which have none.
        """
        if bucket.num_frames == 1:
            return IMAGE_FPS
        known = bucket if bucket in self.buckets else self.usual_bucket
        if known.num_frames == 1:
            raise InputError(f"{bucket}: only images are known here, so no rate is: give --fps")
        return self.buckets[known][1]

    @property
    def geometry(self) -> VaeGeometry:
        """Of the autoencoder."""
        return VaeGeometry.recorded(self.provenance[LATENT])


def open_source(config: SampleConfig) -> Source:
    """Returns the model that a configuration names.

    Raises:
        InputError: if there is none, or what belongs to it is missing.
    """
    return _published(config) if config.run is None else _of_run(config, config.run)


def _of_run(config: SampleConfig, folder: Path) -> Source:
    run = read_run(folder)
    options = DEFAULTS | run.config
    file = weights_file(folder, config.checkpoint, config.weights)
    return Source(
        name=options["model"],
        load=lambda: load_run_model(run, file),
        objective=create_objective(
            options["objective"],
            model=options["model"],
            spatial_stride=VaeGeometry.recorded(run.provenance[LATENT]).spatial_stride,
            min_snr_gamma=options["min_snr_gamma"],
            flow_times=options["flow_times"],
            flow_shift=options["flow_shift"],
        ),
        bfloat16=options["precision"] == "bfloat16",
        null_caption=options["caption_dropout"] > 0,
        frame_masks=bool(options["mask_ratios"]),
        provenance=run.provenance,
        buckets={Bucket.parse(name): (held["samples"], float(held["fps"])) for name, held in run.buckets.items()},
    )


def _published(config: SampleConfig) -> Source:
    assert config.checkpoint is not None
    assert config.cache is not None
    index = SampleIndex.open(Cache.open(config.cache))
    file = read_weights(config.checkpoint)
    decided = {
        "in_channels": index.geometry.latent_channels,
        "caption_channels": index.caption_channels,
        "model_max_length": index.max_tokens,
    }
    options = ArchitectureOptions(model=config.model or "", model_settings=config.model_settings)
    if config.model is not None:
        architecture, name = model_config(config.model, **(decided | options.overrides)), config.model
    elif file.config is None:
        raise InputError(f"{file.source}: a file does not say whose weights it holds: give --model, e.g. stdit-xl/2")
    else:
        architecture, name = config_from_values(decided | options.overrides, stdit3_config(file)), "stdit3"

    if isinstance(architecture, DiTConfig) and architecture.num_classes is not None:
        raise InputError(
            f"num_classes={architecture.num_classes}: a model of labels has no prompts: choose one of captions"
        )

    def load() -> DiffusionTransformer:
        model = build_model(architecture)
        print(load_state(model, file).line(), flush=True)
        return model.eval()

    return Source(
        name=name,
        load=load,
        objective=create_objective(config.objective, model=name, spatial_stride=index.geometry.spatial_stride),
        bfloat16=True,
        null_caption=architecture.class_dropout_prob > 0,
        frame_masks=None,
        provenance=index.provenance,
        buckets={bucket: (rows.num_samples, index.fps(bucket)) for bucket, rows in index.buckets.items()},
    )
