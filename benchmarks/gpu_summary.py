"""What a run of gpu_check found, for people: how its sections ended, the bars that the engine and
training are held to, FPS beside peers, stages beside their floors, agreement, layers, training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import environment


def summary(folder: Path, outcomes: Sequence[dict[str, object]]) -> str:
    """What was found, for people."""
    where = environment()
    lines = [f"# {where['gpu']}", "", ", ".join(f"{key} {value}" for key, value in where.items())]
    lines += ["", "| section | result | seconds |", "|---|---|---|"]
    lines += [f"| {o['section']} | {o['result']} | {o.get('seconds', '')} |" for o in outcomes]
    lines += ["", "| bar | measured | holds |", "|---|---|---|"]
    lines += [
        f"| {bar.what} | {'not measured' if bar.value is None else f'{bar.value:.4g}'} | "
        f"{'' if bar.holds is None else 'yes' if bar.holds else 'NO'} |"
        for bar in bars(folder)
    ]
    for path in sorted(folder.glob("fps-*.json")):
        lines += fps_lines(json.loads(path.read_text()))
    if (folder / "agreement.json").is_file():
        lines += ["", "## Agreement of the sample model with float32", ""]
        lines += ["| precision | boxes | matched | IoU | score | mAP50 loss | holds |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in json.loads((folder / "agreement.json").read_text())["precisions"]:
            lines.append(
                f"| {row['precision']} | {row['boxes']} | {row['matched']} | "
                f"{row['worst_overlap']:.4f} | {row['worst_score']:.4f} | "
                f"{row['mAP50 loss']:+.4f} | {'yes' if row['holds'] else 'NO'} |"
            )
    for path in sorted(folder.glob("layers-*.json")):
        record = json.loads(path.read_text())
        lines += ["", f"## {record['benchmark']}", ""]
        for batch, rows in record["batches"].items():
            total, floor = (1e3 * sum(row[key] for row in rows) for key in ("seconds", "floor"))
            lines.append(
                f"Batch {batch}: {len(rows)} steps, {total:.3f} ms, floor {floor:.3f} ms, largest "
                f"error {max(row['error'] for row in rows):.1e} of a step's largest value."
            )
    for path in sorted(folder.glob("training-*.json")):
        lines += training_lines(json.loads(path.read_text()))
    return "\n".join(lines) + "\n"


def training_lines(record: dict[str, Any]) -> list[str]:
    """Normalisation and Mish of each shape, forward and backward, and the whole step."""
    lines = ["", f"## {record['benchmark']}", ""]
    lines += ["| maps | layers | fused ms | torch ms | times | of a copy's rate |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in record["layers"]["rows"]:
        fused, torch = (1e3 * row["timings"][name]["median"] for name in ("fused", "torch"))
        lines.append(
            f"| {'x'.join(map(str, row['shape']))} | {row['count']} | {fused:.4f} | {torch:.4f} | "
            f"{row['ratio']:.2f} | {row['rate'] / record['copy']:.2f} |"
        )
    total = record["layers"]["total"]
    lines.append(
        f"| all, batch {record['layers']['batch']} | | {1e3 * total['fused']:.4f} | "
        f"{1e3 * total['torch']:.4f} | {total['ratio']:.2f} | |"
    )
    step = record.get("step", {"timings": {}})
    for name, timing in step["timings"].items():
        peak = step["peak"][name]
        told = "" if peak is None else f", at most {peak / 2**30:.2f} GiB allocated"
        lines.append("")
        lines.append(
            f"Step of {step['batch']}, {name}: {1e3 * timing['median']:.1f} ms, "
            f"{step['kept'][name] / 2**30:.3g} GiB kept for the backward pass{told}."
        )
    return lines


def fps_lines(record: dict[str, Any]) -> list[str]:
    lines = ["", f"## {record['benchmark']}", ""]
    lines += ["| batch | program | median ms | images/s |", "|---|---|---|---|"]
    for entry in record["runs"]:
        batch, stages, rates = entry["batch"], entry["stages"], entry["rates"]
        rows = {name: timing["median"] for name, timing in entry["timings"].items()}
        rows["stream, overlapped"] = entry["streamed"]
        for name, seconds in rows.items():
            lines.append(f"| {batch} | {name} | {1e3 * seconds:.3f} | {batch / seconds:.0f} |")
        for name, seconds in stages["seconds"].items():
            floor = 1e3 * stages["floors"][name]
            lines.append(f"| {batch} | {name}, floor {floor:.4f} ms | {1e3 * seconds:.4f} | |")
        lines.append(
            f"| {batch} | floors at {rates['copy'] / 1e12:.2f} TB/s and "
            f"{rates['matrix'] / 1e12:.0f} TFLOP/s | | |"
        )
    return lines


@dataclass(frozen=True)
class Bar:
    """What engine and training are held to on an H200, yolov4 416. value: None: not measured."""

    what: str
    value: float | None
    holds: bool | None


def bars(folder: Path) -> list[Bar]:
    def entry(name: str, batch: int) -> dict[str, Any] | None:
        path = folder / f"fps-yolov4-416-{name}.json"
        runs = json.loads(path.read_text())["runs"] if path.is_file() else []
        return next((run for run in runs if run["batch"] == batch), None)

    def median_of(run: dict[str, Any] | None, start: str) -> float | None:
        found = [
            timing["median"]
            for name, timing in (run["timings"].items() if run else ())
            if name.startswith(start)
        ]
        return found[0] if found else None

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b is not None else None

    def least(what: str, value: float | None, bound: float) -> Bar:
        return Bar(f"{what}, at least {bound:g}", value, None if value is None else value >= bound)

    def most(what: str, value: float | None, bound: float) -> Bar:
        return Bar(f"{what}, at most {bound:g}", value, None if value is None else value <= bound)

    path = folder / "training-yolov4-416.json"
    training = json.loads(path.read_text()) if path.is_file() else {}
    layers, step = (
        part if part.get("batch") == 64 else None
        for part in (training.get("layers", {}), training.get("step", {}))
    )
    peak = step and step["peak"]
    one, many, fp8 = entry("fp16", 1), entry("fp16", 32), entry("fp8", 32)
    compiled = entry("fp16-compiled", 32)
    single = median_of(one, "detect")
    stages = many["stages"] if many else None
    return [
        most("batch 1, fp16, ms end to end", None if single is None else 1e3 * single, 1.2),
        least("batch 32, fp16, images/s streamed", many and 32 / many["streamed"], 4600),
        least(
            "times torch eager, batch 32",
            ratio(median_of(many, "torch eager"), median_of(many, "detect")),
            3,
        ),
        least(
            "times torch.compile, batch 32",
            ratio(median_of(compiled, "torch.compile"), median_of(compiled, "detect")),
            1.5,
        ),
        most(
            "share of resize, decode and NMS, batch 32",
            stages and stages["share of resize, decode and NMS"],
            0.06,
        ),
        most("NMS, batch 32, ms", stages and 1e3 * stages["seconds"]["NMS"], 0.1),
        least(
            "FP8 times fp16, batch 32",
            ratio(many and many["streamed"], fp8 and fp8["streamed"]),
            1.4,
        ),
        least(
            "fused normalisation and Mish times torch, batch 64",
            layers and layers["total"]["ratio"],
            2,
        ),
        least("training step times torch, batch 64", step and step["ratio"], 1.3),
        most(
            "share of torch's activation memory, batch 64",
            ratio(peak and peak["fused"], peak and peak["torch"]),
            0.7,
        ),
    ]
