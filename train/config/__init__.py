"""What a training run is told: options in groups by topic, flat on the command line and in files.

A new option is a field of one group, with its docstring, its check in the group's ``__post_init__``, and
:data:`~train.config.settings.MayChange` or :data:`~train.config.settings.Adjustable` around its type if a run may go on
with another value. Its name is unique over all groups: it is the flag, and the key in ``run.json``.
"""

from train.config.architecture import ArchitectureOptions
from train.config.checkpoints import CheckpointOptions
from train.config.data import DataOptions
from train.config.diffusion import DiffusionOptions
from train.config.evaluation import EvaluationOptions
from train.config.finetuning import FinetuningOptions
from train.config.log import LogOptions
from train.config.optimiser import OptimiserOptions
from train.config.parallel import ParallelOptions, Precision
from train.config.run import ADJUSTABLES, DEFAULTS, FREE_TO_CHANGE, TrainConfig

__all__ = [
    "ADJUSTABLES",
    "DEFAULTS",
    "FREE_TO_CHANGE",
    "ArchitectureOptions",
    "CheckpointOptions",
    "DataOptions",
    "DiffusionOptions",
    "EvaluationOptions",
    "FinetuningOptions",
    "LogOptions",
    "OptimiserOptions",
    "ParallelOptions",
    "Precision",
    "TrainConfig",
]
