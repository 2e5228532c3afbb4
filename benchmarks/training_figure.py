"""Draws what `benchmarks.training` measured: the parts of a step, and the loader beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from yolov4_fast.files import replacing

LOSS = "loss"  # the part that has a bar to keep under


def draw(path: Path, record: dict[str, Any]) -> None:
    """A PNG from the record that the benchmark writes as JSON."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _parts(left, record["timings"], record["results"])
    _loaders(right, record["results"])
    where = record["environment"]
    threads = f"{where['threads']} thread{'s' * (where['threads'] != 1)}"
    machine = where["gpu"] or f"{where['processor']}, {threads}"
    figure.suptitle(f"{record['benchmark']}\n{machine}, torch {where['torch']}", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _parts(axes: Any, timings: dict[str, Any], results: dict[str, Any]) -> None:
    shares = {name: share for name, share in results["share of the step"].items() if share}
    parts = [timings[f"step: {name}"] for name in shares]
    medians = [1e3 * part["median"] for part in parts]
    whiskers = [
        [1e3 * (part["median"] - part["p20"]) for part in parts],
        [1e3 * (part["p80"] - part["median"]) for part in parts],
    ]
    colours = ["tab:orange" if name == LOSS else "tab:blue" for name in shares]
    axes.barh(list(shares), medians, xerr=whiskers, color=colours, ecolor="0.3", capsize=2)
    for y, (part, share) in enumerate(zip(parts, shares.values(), strict=True)):
        text = f"  {1e3 * part['median']:.1f} ms, {100 * share:.1f} %"
        axes.text(1e3 * part["p80"], y, text, va="center", fontsize=8)
    axes.set_xlim(0, 1.35 * max(medians))
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step: median, p20 to p80")
    share, bar = results["assignment and loss / step"], results["bar: assignment and loss / step"]
    axes.set_title(f"assignment and loss {100 * share:.1f} % (bar {100 * bar:.0f} %)", fontsize=10)


def _loaders(axes: Any, results: dict[str, Any]) -> None:
    delivered = results["images/s of the loader alone, by workers"]
    consumed, bar = results["images/s consumed"], results["bar: loader / network"]
    rates = {"network": consumed}
    for workers, rate in delivered.items():
        rates[f"{workers} worker{'s' * (workers != '1')}"] = rate
    colours = ["tab:gray", *["tab:green"] * len(delivered)]
    axes.barh(list(rates), list(rates.values()), color=colours)
    for y, rate in enumerate(rates.values()):
        axes.text(rate, y, f"  {rate:.1f}", va="center", fontsize=8)
    axes.axvline(bar * consumed, color="tab:red", linestyle="--", label=f"{bar:g} x network")
    axes.set_xlim(0, 1.25 * max(*rates.values(), bar * consumed))
    axes.invert_yaxis()
    axes.set_xlabel("images/s")
    axes.legend(fontsize=8)
    axes.set_title(f"loader alone {results['loader / network']:.2f} x", fontsize=10)
