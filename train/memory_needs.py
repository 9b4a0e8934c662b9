"""What a run needs memory for, and what to do where there is too little."""

from train.config import TrainConfig
from train.out_of_memory import Need


def need_of_building(config: TrainConfig) -> Need:
    """Of the model, its optimiser and its average."""
    parallel = config.parallel
    shards = "--zero-stage 3, " if parallel.zero_stage < 3 else "--offload all, " * (parallel.offload != "all")
    return Need(
        doing="building the model",
        wants="weights and optimiser",
        device_ways=f"use {shards}more ranks, or a smaller --model; see --dry-run",
        host_ways="use --offload none, or fewer ranks a node"
        if parallel.offload != "none"
        else "use fewer ranks a node",
    )


def need_of_batch(step: int, config: TrainConfig) -> Need:
    """Of a step's batch, which is read, or encoded.

    Args:
        step: Counted from 1.
        config: Of the run.
    """
    encoded = config.encoding.online is not None
    return Need(
        doing=f"the batch of step {step}",
        wants="it",
        device_ways=f"use a smaller {'--vae-micro-batch or ' * encoded}--batch-size",
        host_ways=_host_ways(config),
    )


def need_of_step(step: int, latents: tuple[int, ...], config: TrainConfig) -> Need:
    """Of a step.

    Args:
        step: Counted from 1.
        latents: Shape of this rank's, (B, C, T, H, W).
        config: Of the run.
    """
    graphs = config.parallel.cuda_graphs
    parts = "leave --cuda-graphs out" if graphs else "--gradient-accumulation"  # they do not go together
    return Need(
        doing=f"step {step}",
        wants=f"{latents[0]} samples with latents of {'x'.join(map(str, latents[2:]))}",
        device_ways=f"use a smaller --batch-size, {parts}, --activation-checkpointing auto or full, more ranks, or "
        "leave the bucket out by --buckets; see --dry-run",
        host_ways=_host_ways(config),
    )


def need_of_evaluation(step: int, config: TrainConfig) -> Need:
    """Of the evaluation after ``step`` steps."""
    levels = config.evaluation.evaluate_levels
    return Need(
        doing=f"the evaluation after step {step}",
        wants=f"a sample at {levels} noise levels",
        device_ways=f"{'use fewer --evaluate-levels, or ' * (levels > 1)}leave --evaluate-every out",
        host_ways=_host_ways(config),
    )


def need_of_previews(step: int | None, config: TrainConfig) -> Need:
    """Of the previews after ``step`` steps; None: of their captions, beforehand."""
    guided = config.evaluation.preview_guidance != 1 and step is not None
    return Need(
        doing="preparing previews" if step is None else f"the previews after step {step}",
        wants="the text encoder" if step is None else "a video and the autoencoder",
        device_ways=f"{'use --preview-guidance 1, or ' * guided}leave --preview-every out: python -m train.sample "
        "makes videos of checkpoints",
        host_ways=_host_ways(config),
    )


def _host_ways(config: TrainConfig) -> str:
    ways = ["fewer --num-workers"] * (config.data.num_workers > 1) + ["a smaller --batch-size"]
    ways += ["a smaller --decode-ahead-mb"] * (config.encoding.online is not None)
    ways += ["--offload none"] * (config.parallel.offload != "none")
    return f"use {', '.join(ways)}, or fewer ranks a node"
