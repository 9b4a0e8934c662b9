"""A training run: everything is checked and built, then the steps are taken."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from shared.errors import InputError
from shared.wording import counted
from train.batches import LEDGER_FILES, open_batches
from train.boards import open_boards
from train.building import begin_with, build_model
from train.checkpoint import Checkpointer
from train.checkpoint_files import list_checkpoints
from train.config import TrainConfig
from train.ema import Ema
from train.judging import Judge
from train.memory_needs import need_of_building, need_of_step
from train.metrics import MetricsLog, Totals
from train.model.attention import automatic_choice
from train.model.transformer import DiffusionTransformer
from train.not_finite import NotFiniteGuard
from train.open_index import prepare_source
from train.out_of_memory import enough_memory
from train.parallel.ranks import Ranks
from train.parallel.zero import build_engine
from train.pass_graphs import CudaRecorder
from train.peak import Peak, find_peak
from train.planning.dry_run import largest_buckets, plan_bucket, require_memory
from train.planning.fitting import device_memory, fit_checkpointing
from train.sample_sources import sources_of
from train.schedules import learning_rate
from train.setup import CheckedRun, begin_run, check_run, require_same_index
from train.step import TrainingStep
from train.stop import STOPPED, StopRequest


def train(config: TrainConfig, ranks: Ranks) -> int:
    """Trains, and returns the exit code. All ranks call it.

    Raises:
        InputError: for settings that do not fit, or a damaged cache.
    """
    stop = StopRequest()
    ranks.share_samples(config.parallel.sequence_parallel, zero_stage=config.parallel.zero_stage)
    ranks.agree(lambda: prepare_source(config, ranks))
    run = ranks.agree(lambda: check_run(config, ranks))
    require_same_index(run.index, ranks)
    fitted = _fit(run, ranks)
    with enough_memory(need_of_building(config), rank=ranks.rank):
        trainer = Trainer(fitted, ranks)
        adjusted = ranks.agree(lambda: begin_run(run) if ranks.is_first else [])
        first_step = trainer.checkpointer.restore_newest()
    ranks.agree(lambda: _require_steps_left(first_step, config))
    peak = find_peak(ranks.device, run.dtype, config.log.peak_tflops)
    if ranks.is_first:
        print(trainer.describe(peak, first_step), flush=True)
        if adjusted:
            print(f"from step {first_step} on: {', '.join(adjusted)}", flush=True)
        if first_step == config.steps:
            print(f"all {counted(config.steps, 'step')} are taken: more by --steps go on from here", flush=True)
    log = ranks.agree(partial(_open_log, config, first_step) if ranks.is_first else _nothing)
    try:
        with _garbage_sought_in_what_is_new():
            return trainer.take_steps(first_step, stop, peak, log)
    except BaseException:
        ranks.fail_alone()
        raise
    finally:
        if not ranks.ends_alone:  # else the device may wait for what others never send
            trainer.close()


@contextmanager
def _garbage_sought_in_what_is_new() -> Iterator[None]:
    """Within it, Python's collector passes by all objects that are there now.

    They last as long as the run, and going through half a million of them takes a quarter of a second and more, in
    which no kernel is launched: once in some 150 steps, in every rank.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _open_log(config: TrainConfig, first_step: int) -> MetricsLog:
    boards = open_boards(config.log, config.output, config.to_json(), first_step)
    return MetricsLog(config.output, steps=config.steps, first_step=first_step, boards=boards)


def _nothing() -> None:
    """What ranks but the first do where only that one writes."""


def _require_steps_left(first_step: int, config: TrainConfig) -> None:
    """Raises :class:`InputError` if a run has gone on for longer than it is asked to."""
    if first_step > config.steps:
        raise InputError(
            f"steps={config.steps}: the run in {config.output} has taken {first_step} already: use more, or begin "
            "another in a new --output"
        )


def _fit(run: CheckedRun, ranks: Ranks) -> CheckedRun:
    """Returns a run whose checkpointing is decided, the same on all ranks, which all call it.

    Raises:
        InputError: if the largest bucket does not fit on this rank's device.
    """
    device_bytes = ranks.agree(lambda: device_memory(run.config.parallel.device_memory_gib, ranks.device))
    least = ranks.gather(device_bytes)
    smallest = None if device_bytes is None else min(each for each in least if each is not None)

    def fit() -> CheckedRun:
        fitted = fit_checkpointing(run, ranks.world_size, smallest)
        if device_bytes is not None:
            (largest,) = largest_buckets(fitted, 1)
            require_memory(plan_bucket(fitted, largest, ranks.world_size), device_bytes)
        return fitted

    return ranks.agree(fit)


class Trainer:
    """A model in DeepSpeed's engine, with its average and its checkpoints.

    Args:
        run: What to train, checked.
        ranks: All of them build a trainer and call its methods.
    """

    def __init__(self, run: CheckedRun, ranks: Ranks) -> None:
        self._run, self._ranks = run, ranks
        config = run.config
        torch.manual_seed(config.seed)
        model = ranks.agree(self._begin_model)
        model.layout_for = ranks.sequence.layout_for
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
        accumulation = config.optimiser.gradient_accumulation
        self._step = TrainingStep(
            engine,
            model,
            run.objective,
            accumulation=accumulation,
            mask_ratios=config.diffusion.mask_shares,
            recorder=CudaRecorder() if config.parallel.cuda_graphs else None,
        )
        decay = config.optimiser.ema_decay
        self._ema = Ema(masters, decay) if decay is not None else None
        self._judge = Judge(run, ranks, engine=engine, model=model, ema=self._ema)
        self.checkpointer = Checkpointer(
            config.output,
            masters=masters,
            model=model,
            ema=self._ema,
            ranks=ranks,
            keep=config.checkpoints.keep_checkpoints,
            keep_every=config.checkpoints.keep_every,
        )

    def _begin_model(self) -> DiffusionTransformer:
        """Returns the model on the CPU, with the weights that a new run begins with."""
        run, config = self._run, self._run.config
        model = build_model(run.model_config, config)
        if config.finetuning.init_from is not None:
            told = f"--init-from {config.finetuning.init_from}: not read, the run goes on from its checkpoint"
            if not list_checkpoints(config.output):
                told = begin_with(model, config.finetuning, run.index.provenance).line()
            if self._ranks.is_first:
                print(told, flush=True)
        return model

    def describe(self, peak: Peak, first_step: int) -> str:
        """Returns the log's first line."""
        config, ranks = self._run.config, self._ranks
        parallel = config.parallel
        model, device, dtype = self._run.model_config, ranks.device, self._run.dtype
        attention = parallel.attention_backend or automatic_choice(
            device, dtype, head_width=model.head_size, packed=not model.normalises_queries
        )
        return (
            f"{config.architecture.model}: {self._num_parameters / 1e6:.1f} M parameters, {parallel.computed_in}, "
            f"ZeRO {parallel.zero_stage}, {ranks.world_size} x {ranks.device.type}{self._sharing()}, "
            f"batch {self._batch_sizes()}, "
            f"attention {attention}, activation checkpointing {parallel.recomputation}"
            f"{', CUDA graphs' * parallel.cuda_graphs}; "
            f"{counted(self._run.plan.num_samples, 'sample')} an epoch; "
            f"peak {peak.tflops:.3g} TFLOP/s a device ({peak.source}); steps {first_step} to {config.steps}"
        )

    def _sharing(self) -> str:
        degree, parts = self._run.config.parallel.sequence_parallel, self._run.config.optimiser.gradient_accumulation
        return f", {degree} ranks a sample" * (degree > 1) + f", {parts} parts a batch" * (parts > 1)

    def _batch_sizes(self) -> str:
        plan, data = self._run.plan, self._run.config.data
        if data.batch_tokens is None:
            return str(data.batch_size)
        return ", ".join(f"{plan.batch_size(bucket)} of {bucket}" for bucket in plan.buckets)

    def take_steps(self, first_step: int, stop: StopRequest, peak: Peak, log: MetricsLog | None) -> int:
        """Trains from ``first_step`` to the last, or until a stop is requested; saves at the end.

        Returns:
            The exit code: 0, or :data:`STOPPED` if steps are left, or an evaluation that a stop put off.
        """
        config, ranks = self._run.config, self._ranks
        guard = NotFiniteGuard(
            config.optimiser,
            ranks,
            sources=partial(sources_of, self._run.index),
            last_saved=self.checkpointer.newest_name,
        )
        self._judge.catch_up(first_step, log)
        batches = open_batches(self._run, ranks, first_step=first_step)
        totals = Totals(ranks.device, self._run.objective.parts)
        num_skipped, taken, unfinished = 0, first_step, False
        waiting_since = time.perf_counter()
        for step, batch in enumerate(batches, start=first_step):
            wait_seconds = time.perf_counter() - waiting_since - batch.encode_seconds
            stop_wanted = ranks.ask(lambda: stop.received)  # the answer comes while the step is being launched
            lr = learning_rate(step, config.optimiser, config.decay_steps)
            following = None if self._ema is None else self._ema.following(step)
            taken = step + 1
            with enough_memory(need_of_step(taken, tuple(batch.latents.shape), config), rank=ranks.rank):
                result = self._step.take(batch.to(ranks.device), lr, following)
            guard.check(taken, batch, result)
            totals.add(result, batch, self._run.model_config, wait_seconds)
            num_skipped += batch.num_skipped
            stopping = stop_wanted()
            ending = stopping or taken == config.steps
            logging = ending or taken % config.log.log_every == 0
            saving = ending or taken % config.checkpoints.checkpoint_every == 0
            if logging or saving or self._judge.is_due(taken):
                guard.settle()
            if logging:
                metrics = totals.metrics(step=taken, lr=lr, ranks=ranks, peak=peak)
                ranks.agree(partial(log.write, metrics) if log is not None else _nothing)
                self._tell_skipped(num_skipped)
                num_skipped = 0
            to_judge = self._judge.put_off(taken)  # what ends the run before it is judged loses nothing
            if saving:
                saved = self.checkpointer.save(taken)
                if ranks.is_first:
                    print(f"saved {saved}", flush=True)
            if stopping:
                unfinished = to_judge or taken < config.steps
                break
            if to_judge:
                self._step.give_memory_back()
                self._judge.after(taken, log)
            if taken % config.log.log_every == 0:
                totals = Totals(ranks.device, self._run.objective.parts)
            waiting_since = time.perf_counter()
        if unfinished and ranks.is_first:
            print(f"ended at a signal after {taken} of {config.steps} steps: run it again to go on", flush=True)
        return STOPPED if unfinished else 0

    def close(self) -> None:
        """Gives up what would keep the ranks from leaving their group: NCCL waits for the last graph that exchanges."""
        self._step.give_memory_back()

    def _tell_skipped(self, num_skipped: int) -> None:
        """Prints how many samples the ranks could not read since the line before. All ranks call it."""
        total = round(self._ranks.mean(torch.tensor(float(num_skipped))).item() * self._ranks.num_data_ranks)
        if total and self._ranks.is_first:
            see = "run preprocess.verify"
            if self._run.config.encoding.online is not None:
                see = f"see {self._run.config.output / LEDGER_FILES}"
            print(
                f"{counted(total, 'sample')} could not be read: the next good one was taken instead; {see}", flush=True
            )
