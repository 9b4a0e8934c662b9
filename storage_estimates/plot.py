"""An answer as a picture: what each way of storing takes, and when each stream pays."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from shared.errors import InputError
from shared.wording import counted
from storage_estimates.answer import Answer
from storage_estimates.break_even import StreamCost, dollars
from storage_estimates.report import choice_name, terabytes

_LATENT, _TEXT, _OTHER, _ONLINE = "#2a6f97", "#e09f3e", "#9a9a9a", "#9e2a2b"


def draw(answer: Answer, path: Path) -> None:
    """Writes the picture.

    Raises:
        InputError: if the file cannot be written, or its ending names no format of pictures.
    """
    figure = plt.figure(figsize=(11, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.0, 1.15), hspace=0.04)
    _draw_sizes(above.subplots(), answer)
    for axes, cost in zip(below.subplots(1, 2), answer.costs, strict=True):
        _draw_cost(axes, cost, answer)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: not written: {error}") from None
    finally:
        plt.close(figure)


def _draw_sizes(axes: Any, answer: Answer) -> None:
    names = [choice_name(size.choice) for size in answer.sizes]
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
        if answer.sizes[0].total_bytes >= scale or unit == "kB"
    )
    left = [0.0] * len(names)
    for label, colour, parts in (
        ("latents", _LATENT, [size.latent_bytes for size in answer.sizes]),
        ("texts", _TEXT, [size.text_bytes for size in answer.sizes]),
        ("container and index", _OTHER, [size.overhead_bytes for size in answer.sizes]),
    ):
        widths = [part / scale for part in parts]
        axes.barh(names, widths, left=left, color=colour, label=label, height=0.62)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (end, size) in enumerate(zip(left, answer.sizes, strict=True)):
        chosen = size is answer.chosen
        axes.text(
            end + 0.008 * max(left),
            row,
            terabytes(size.total_bytes),
            va="center",
            fontweight="bold" if chosen else "normal",
        )
    for tick, size in zip(axes.get_yticklabels(), answer.sizes, strict=True):
        tick.set_fontweight("bold" if size is answer.chosen else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left))
    axes.set_xlabel(unit)
    num_samples = sum(group.num_samples for group in answer.groups)
    buckets = str(answer.groups[0].bucket) if len(answer.groups) == 1 else f"{len(answer.groups)} buckets"
    axes.set_title(
        f"What a cache of {counted(num_samples, 'sample')} of {buckets} takes ({answer.encoders.vae})", loc="left"
    )
    axes.set_ylabel("codec of latents | of texts")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_cost(axes: Any, cost: StreamCost, answer: Answer) -> None:
    terms, after = answer.terms, cost.break_even_epochs()
    end = 1.25 * max(terms.epochs, after if after is not None and after < 40 * terms.epochs else 0, 2)
    epochs = [end * step / 100 for step in range(101)]
    cached, online = ([way(each) for each in epochs] for way in (cost.cached, cost.online))
    colour = _LATENT if cost.stream == "latents" else _TEXT
    axes.plot(epochs, online, color=_ONLINE, lw=2, label="encode in every epoch")
    axes.plot(epochs, cached, color=colour, lw=2, label="encode once, store, read")
    axes.axvline(terms.epochs, color=_OTHER, lw=1, ls=":")
    axes.annotate(
        f"your {counted(terms.epochs, 'epoch')}",
        (terms.epochs, 0),
        (-4, 5),
        textcoords="offset points",
        ha="right",
        color="#555555",
    )
    axes.legend(loc="upper left", frameon=False)
    verdict = "a cache never pays"
    if after is not None:
        verdict = f"a cache pays after {after:.1f} epochs"
        if after <= end:
            axes.plot([after], [cost.online(after)], "o", color="black", zorder=3)
    axes.set_title(f"{cost.stream.capitalize()}: {verdict}", loc="left")
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.25 * max(*cached, *online))
    axes.set_xlabel(
        f"epochs ({terms.gpu} at {dollars(terms.gpu_hour)} an hour, {terms.months:g} months on {terms.storage.label})"
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"${value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
