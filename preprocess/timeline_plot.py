"""The picture of a timeline: of some workers what each did, of many how busy each was."""

import io

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from preprocess.timeline import DrawnWorker, Kind, Stored
from shared.wording import counted

_MOST_STRIPS = 12
"""Workers that get a strip of their own."""
_MOST_NAMES = 32
_MOST_LINES = 400
"""Of a heat map: of more workers, neighbours share one."""
_COLOURS: dict[Kind, str] = {"vae": "#2a6f97", "text": "#7fb7d6", "commit": "#b8c0c8", "wait": "#e07a5f"}
_NAMES: dict[Kind, str] = {
    "vae": "autoencoder",
    "text": "T5",
    "commit": "commits a shard, encoders idle",
    "wait": "waits for frames, encoders idle",
}
_UNITS = ((3 * 86_400, 86_400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))


def draw(stored: Stored) -> bytes:
    """Returns a PNG of a timeline: a strip a worker that shows what it did; of many, a heat map and their mean."""
    figure = _heat_map(stored) if len(stored.workers) > _MOST_STRIPS else _strips(stored)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _strips(stored: Stored) -> Figure:
    workers = stored.workers
    figure = Figure(figsize=(11, 1.5 + max(0.75 * len(workers), 1.6)), layout="constrained")
    figure.suptitle(_title(stored), x=0.01, ha="left", fontsize=11)
    if not workers:
        figure.text(0.5, 0.5, "no worker was started", ha="center")
        return figure
    axes = figure.subplots(len(workers), 1, sharex=True, squeeze=False)[:, 0]
    scale, unit = _unit(stored.seconds)
    edges = np.arange(stored.num_bins + 1) * stored.bin_seconds / scale
    for axis, worker in zip(axes, workers, strict=True):
        shown = _stacked(worker)
        axis.stackplot(
            np.repeat(edges, 2)[1:-1],
            *(np.repeat(shown[kind], 2) for kind in _COLOURS),
            colors=_COLOURS.values(),
            labels=[_NAMES[kind] for kind in _COLOURS],
            linewidth=0,
        )
        _shade_absence(axis, worker, edges)
        axis.set(ylim=(0, 100), yticks=(0, 100), xlim=(0, stored.seconds / scale))
        axis.tick_params(labelsize=8)
        busy = np.nanmean(_busy(worker)) if worker.alive.any() else 0.0
        axis.set_ylabel(f"{_short(worker.name)}\nbusy {busy:.0f}%", rotation=0, ha="right", va="center", fontsize=8)
    axes[-1].set_xlabel(unit)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_COLOURS), fontsize=9, frameon=False
    )
    return figure


def _heat_map(stored: Stored) -> Figure:
    rows = np.stack([_busy(worker) for worker in stored.workers])
    together = -(-len(rows) // _MOST_LINES)
    lines = np.stack([_mean(rows[start : start + together]) for start in range(0, len(rows), together)])
    scale, unit = _unit(stored.seconds)
    end = stored.num_bins * stored.bin_seconds / scale
    figure = Figure(figsize=(11, 3.2 + min(max(0.16 * len(lines), 2.0), 5.5)), layout="constrained")
    figure.suptitle(_title(stored), x=0.01, ha="left", fontsize=11)
    heat, mean = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    # From dark for idle to light for busy: read in grey and by all eyes; white is no worker.
    image = heat.imshow(
        lines, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=100, extent=(0, end, len(rows), 0)
    )
    heat.set_facecolor("white")
    if len(rows) <= _MOST_NAMES:
        heat.set_yticks(np.arange(len(rows)) + 0.5, [_short(worker.name) for worker in stored.workers], fontsize=8)
    else:
        heat.set_ylabel(counted(len(rows), "worker") + (f", {together} a line" if together > 1 else ""))
    figure.colorbar(image, ax=heat, label="encoders busy, %", pad=0.01)
    middles = (np.arange(stored.num_bins) + 0.5) * stored.bin_seconds / scale
    mean.plot(middles, _mean(rows), color=_COLOURS["vae"], label="encoders busy, mean")
    waits = np.stack([np.where(worker.alive, _stacked(worker)["wait"], np.nan) for worker in stored.workers])
    mean.plot(middles, _mean(waits), color=_COLOURS["wait"], label="waits for frames, mean")
    mean.set(ylim=(0, 102), xlim=(0, stored.seconds / scale), xlabel=unit, ylabel="%")
    mean.grid(alpha=0.3)
    figure.legend(*mean.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _busy(worker: DrawnWorker) -> npt.NDArray[np.float32]:
    """Returns (N,) percent of each bin in which kernels ran; NaN where the worker was not alive."""
    return np.where(worker.alive, np.minimum(worker.percent["text"] + worker.percent["vae"], 100), np.nan)


def _stacked(worker: DrawnWorker) -> dict[Kind, npt.NDArray[np.float32]]:
    """Returns percents (N,) that add up to 100 at most: commits and waiting count where no kernel ran."""
    left = np.full(len(worker.alive), 100, np.float32)
    shown: dict[Kind, npt.NDArray[np.float32]] = {}
    for kind in _COLOURS:
        shown[kind] = np.minimum(worker.percent[kind], left)
        left = left - shown[kind]
    return shown


def _mean(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns the mean (N,) of rows (R, N), NaN where all are."""
    present = ~np.isnan(rows)
    count = present.sum(axis=0)
    return np.where(count, np.where(present, rows, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _shade_absence(axis: Axes, worker: DrawnWorker, edges: npt.NDArray[np.floating]) -> None:
    """Hatches the time in which a worker was not alive."""
    absent = np.repeat(~worker.alive, 2)
    axis.fill_between(
        np.repeat(edges, 2)[1:-1], 0, 100, where=absent.tolist(), facecolor="none", edgecolor="#cccccc", hatch="///",
        linewidth=0,
    )  # fmt: skip


def _unit(seconds: float) -> tuple[float, str]:
    return next((scale, name) for least, scale, name in _UNITS if seconds >= least)


def _title(stored: Stored) -> str:
    count = len(stored.workers)
    return f"{count:,} worker{'s' if count != 1 else ''} from {stored.start}, a bin of {stored.bin_seconds:g} s"


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"
