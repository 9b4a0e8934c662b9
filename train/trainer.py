"""A training run: everything is checked and built, then the steps are taken."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from train.checkpoint import Checkpointer
from train.config import TrainConfig
from train.data import Batch
from train.diffusion import iddpm
from train.ema import Ema
from train.loader import load_batches
from train.local_copies import LocalCopies
from train.metrics import MetricsLog, Totals
from train.model.stdit import STDiT
from train.ops.cpu_bfloat16 import bfloat16_products
from train.parallel.ranks import Ranks
from train.parallel.zero import MasterWeights, build_engine, take_step
from train.peak import Peak, find_peak
from train.rank_batches import LoaderJob
from train.setup import CheckedRun, check_run, require_same_index


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the learning rate of ``step``, counted from 0."""
    return config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))


class StopRequest:
    """Remembers SIGTERM, so that the trainer can finish its step, save, and end."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, _number: int, _frame: object) -> None:
        self.received = True


def train(config: TrainConfig, ranks: Ranks) -> int:
    """Trains, and returns the exit code. All ranks call it.

    Raises:
        InputError: for settings that do not fit, or a damaged cache.
    """
    stop = StopRequest()
    run = ranks.agree(lambda: check_run(config, ranks))
    require_same_index(run.index, ranks)
    trainer = Trainer(run, ranks)
    first_step = ranks.agree(trainer.checkpointer.restore_newest)
    ranks.barrier()
    peak = find_peak(ranks.device, run.dtype, config.peak_tflops)
    log = None
    if ranks.is_first:
        print(trainer.describe(peak, first_step), flush=True)
        log = MetricsLog(config.output, steps=config.steps, first_step=first_step, tensorboard=config.tensorboard)
    trainer.take_steps(first_step, stop, peak, log)
    return 0


class Trainer:
    """A model in DeepSpeed's engine, with its average and its checkpoints.

    Args:
        run: What to train, checked.
        ranks: All of them build a trainer and call its methods.
    """

    def __init__(self, run: CheckedRun, ranks: Ranks) -> None:
        self._run, self._ranks, self._schedule = run, ranks, iddpm.linear_schedule()
        config = run.config
        torch.manual_seed(config.seed)
        self._model = STDiT(
            run.model_config,
            attention_backend=config.attention_backend,
            activation_checkpointing="full" if config.activation_checkpointing else "none",
        )
        self._num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self._engine: Any = build_engine(self._model, config, ranks.device, ranks.world_size)
        self._ema = Ema(MasterWeights(self._model), config.ema_decay) if config.ema_decay is not None else None
        self.checkpointer = Checkpointer(
            config.output,
            engine=self._engine,
            model=self._model,
            ema=self._ema,
            ranks=ranks,
            keep=config.keep_checkpoints,
        )

    def describe(self, peak: Peak, first_step: int) -> str:
        """Returns the log's first line."""
        config, ranks = self._run.config, self._ranks
        return (
            f"{config.model}: {self._num_parameters / 1e6:.1f} M parameters, {config.precision}, "
            f"ZeRO {config.zero_stage}, {ranks.world_size} x {ranks.device.type}, batch {self._batch_sizes()}, "
            f"attention {config.attention_backend or 'by shape'}; {self._run.plan.num_samples} samples an epoch; "
            f"peak {peak.tflops:.3g} TFLOP/s a device ({peak.source}); steps {first_step} to {config.steps}"
        )

    def _batch_sizes(self) -> str:
        plan = self._run.plan
        if self._run.config.batch_tokens is None:
            return str(self._run.config.batch_size)
        return ", ".join(f"{plan.batch_size(bucket)} of {bucket}" for bucket in plan.buckets)

    def take_steps(self, first_step: int, stop: StopRequest, peak: Peak, log: MetricsLog | None) -> None:
        """Trains from ``first_step`` to the last, or until a stop is requested; saves at the end."""
        config, ranks = self._run.config, self._ranks
        totals = Totals(ranks.device)
        num_skipped = 0
        waiting_since = time.perf_counter()
        for step, batch in enumerate(self._batches(first_step), start=first_step):
            wait_seconds = time.perf_counter() - waiting_since
            lr = learning_rate(step, config)
            terms, norm = self._take_step(batch.to(ranks.device), lr)
            if self._ema is not None:
                self._ema.update(step)
            totals.add(terms, batch, self._run.model_config, wait_seconds)
            num_skipped += batch.num_skipped
            taken = step + 1
            stopping = ranks.any(stop.received)
            ending = stopping or taken == config.steps
            if ending or taken % config.log_every == 0:
                metrics = totals.metrics(step=taken, grad_norm=float(norm), lr=lr, ranks=ranks, peak=peak)
                if log is not None:
                    log.write(metrics)
                self._tell_skipped(num_skipped)
                num_skipped = 0
                ranks.agree(metrics.require_finite)
            if ending or taken % config.checkpoint_every == 0:
                saved = self.checkpointer.save(taken)
                if ranks.is_first:
                    print(f"saved {saved}", flush=True)
            if stopping:
                break
            if taken % config.log_every == 0:
                totals = Totals(ranks.device)
            waiting_since = time.perf_counter()

    def _tell_skipped(self, num_skipped: int) -> None:
        """Prints how many samples the ranks could not read since the line before. All ranks call it."""
        total = round(self._ranks.mean(torch.tensor(float(num_skipped))).item() * self._ranks.world_size)
        if total and self._ranks.is_first:
            print(f"{total} samples could not be read: others took their places; run preprocess.verify", flush=True)

    def _batches(self, first_step: int) -> Iterator[Batch]:
        run, config = self._run, self._run.config
        copies = None
        if config.local_cache is not None and run.index.cache.store.local_path("shards") is None:
            limit_bytes = int(config.local_cache_gb * 1e9)
            copies = LocalCopies(folder=config.local_cache, limit_bytes=limit_bytes, url=run.index.cache.url)
        job = LoaderJob.of_index(
            run.index,
            run.plan,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            seed=config.seed,
            num_levels=self._schedule.num_steps,
            caption_dropout=config.caption_dropout,
            on_corrupt=config.on_corrupt,
            copies=copies,
        )
        return load_batches(
            job,
            range(first_step, config.steps),
            num_workers=config.num_workers,
            pin_memory=self._ranks.device.type == "cuda",
        )

    def _take_step(self, batch: Batch, lr: float) -> tuple[iddpm.LossTerms, torch.Tensor]:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

        def denoise(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            prediction: torch.Tensor = self._engine(
                x, timestep, batch.captions, batch.mask, drop_caption=batch.drop_caption
            )
            return prediction

        with bfloat16_products(batch.latents.device):
            terms = iddpm.training_loss(self._schedule, denoise, batch.clean_latents(), batch.levels, batch.noise())
            self._engine.backward(terms.loss.mean())
        return terms, take_step(self._engine, self._model)
