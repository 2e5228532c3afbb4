"""The tables of the seed's experiments, as Markdown, JSON and a drawn chart.

All of it is read from what the rows left in their folders, so it can be shown at any time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from yolov4_fast.commands.arguments import write_json
from yolov4_fast.files import replacing

NMS, DIOU_NMS = "iou", "diou"  # kinds, as the validation's settings and records name them
OF_THE_SEED = ("ciou", "ciou-ca")  # rows of its table of DIoU-NMS; the others are ours
SETTINGS = "settings.json"  # in the output folder
NOTHING = "?"  # a cell that is not measured yet, as the seed has it

Settings = dict[str, Any]  # what all rows have in common, by name
Record = dict[str, Any]  # of one row and seed, as row.json holds it


class Cell(NamedTuple):
    """mAP50 in % over the seeds that are there."""

    mean: float
    spread: float | None  # standard deviation; None of one seed
    seeds: int


def read_settings(output: Path) -> Settings:
    return _read(output / SETTINGS, f"{output}: holds no experiments")


def read_records(output: Path) -> list[Record]:
    """The rows that are done, in the order of their folders' names."""
    return [_read(path) for path in sorted(output.glob("*/row.json"))]


def _read(path: Path, missing: str = "") -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(missing or f"{path}: is gone") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: should hold an object")
    return value


def cell(records: Sequence[Record], row: str, size: Sequence[int], nms: str) -> Cell | None:
    """What was measured of a row at (width, height); None where nothing was."""
    values = [
        100 * found["mAP50"]
        for record in records
        for found in record["evaluations"]
        if record["row"] == row
        and [found["width"], found["height"]] == list(size)
        and found["nms"] == nms
        and found["mAP50"] is not None
    ]
    if not values:
        return None
    return Cell(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def markdown(settings: Settings, records: Sequence[Record], titles: Mapping[str, str]) -> str:
    """Both tables of the seed. titles: of the rows, by name, in their order."""
    extension = [name for name in titles if name not in OF_THE_SEED]
    lines = [caption(settings, records), "", "### NMS", "", *_head(settings)]
    lines += [_line(titles[name], settings, records, name, NMS) for name in titles]
    lines += ["", "### DIoU-NMS", "", *_head(settings)]
    lines += [
        _line(titles[name] + mark, settings, records, name, DIOU_NMS)
        for names, mark in ((OF_THE_SEED, ""), (extension, " \\*"))
        for name in names
    ]
    lines += ["", "\\* not in the seed's table"]
    return "\n".join(lines) + "\n"


def caption(settings: Settings, records: Sequence[Record]) -> str:
    """What the figures are of, in a line."""
    data = " + ".join(Path(path).stem for path in settings["data"])
    images = {found["images"] for record in records for found in record["evaluations"]}
    counted = f" ({', '.join(map(str, sorted(images)))} images)" if images else ""
    seeds = sorted({record["seed"] for record in records})
    told = ", ".join(map(str, seeds)) or "none yet"
    several = " (mean ± standard deviation)" if len(seeds) > 1 else ""
    weights = {"last": "after the last epoch", "best": "of the best epoch on these very images"}
    start = f"from {Path(settings['weights']).name}" if settings["weights"] else "from scratch"
    return (
        f"{Path(settings['model']).name} {start} on {data}, {settings['split']}; "
        f"{_length(settings)} of batches of {settings['batch_size']} at "
        f"{settings['width']}x{settings['height']}, {settings['optimizer']} "
        f"{settings['learning_rate']:g}; seed{'s' * (len(seeds) > 1)} {told}{several}. mAP50 in % "
        f"on {settings['val_split']}{counted}: area under the curve, IoU 0.5, confidence "
        f"{settings['confidence']:g}, NMS at {settings['nms_iou']:g}; "
        f"{'averaged ' if settings['ema_decay'] else ''}weights {weights[settings['checkpoint']]}."
    )


def _length(settings: Settings) -> str:
    steps = settings["max_batches"]
    return f"{steps} steps" if steps else f"{settings['epochs']} epochs"


def _head(settings: Settings) -> list[str]:
    sizes = [f"{width} x {height}" for width, height in settings["sizes"]]
    return [f"|{'|'.join(['Detection', *sizes])}|", f"|{'|'.join(['--'] * (1 + len(sizes)))}|"]


def _line(title: str, settings: Settings, records: Sequence[Record], row: str, nms: str) -> str:
    most = len({record["seed"] for record in records})
    cells = [_text(cell(records, row, size, nms), most) for size in settings["sizes"]]
    return f"|{'|'.join([title, *cells])}|"


def _text(found: Cell | None, most: int) -> str:
    """most: seeds of the row that has most."""
    if found is None:
        return NOTHING
    text = f"{found.mean:.1f}"
    if found.spread is not None:
        text += f" ± {found.spread:.1f}"
    return text + (f" ({found.seeds} of {most} seeds)" if found.seeds < most else "")


def write_results(output: Path, titles: Mapping[str, str]) -> str:
    """Write tables.md, results.json and tables.png from what is there. -> the tables.

    Raises ValueError where OUTPUT holds no experiments.
    """
    settings, records = read_settings(output), read_records(output)
    text = markdown(settings, records, titles)
    with replacing(output / "tables.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    results = {"settings": settings, "rows": dict(titles), "records": records}
    write_json(output / "results.json", results)
    if records:
        draw(output / "tables.png", settings, records, titles)
    return text


def draw(
    path: Path, settings: Settings, records: Sequence[Record], titles: Mapping[str, str]
) -> None:
    """Both tables as points, a line of them for each row; whiskers: standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.4 + 0.4 * len(titles)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, nms, name in zip(panels, (NMS, DIOU_NMS), ("NMS", "DIoU-NMS"), strict=True):
        for number, size in enumerate(settings["sizes"]):
            shift = 0.2 * (number - (len(settings["sizes"]) - 1) / 2)
            cells = [cell(records, row, size, nms) for row in titles]
            points = [(y + shift, found) for y, found in enumerate(cells) if found]
            axes.errorbar(
                [found.mean for _, found in points],
                [y for y, _ in points],
                xerr=[found.spread or 0.0 for _, found in points],
                fmt="o",
                markersize=5,
                capsize=2,
                label=f"{size[0]} x {size[1]}",
            )
        axes.set_title(name)
        axes.set_xlabel("mAP50, %")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(titles)), list(titles.values()))
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    data = " + ".join(Path(given).stem for given in settings["data"])
    figure.suptitle(
        f"{Path(settings['model']).name} on {data}, {_length(settings)} at "
        f"{settings['width']}x{settings['height']}"
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
