"""Draws what the benchmarks measured: docs/performance-ops.svg and docs/performance-speed.svg.

    bench_ops --benchmark_format=json > exact.json
    bench_ops --precision=fast --benchmark_format=json > fast.json
    bench_forward --prompt 128,512,2048 --context 0,2048,8192 --json > forward.jsonl
    python bench/plot.py --ops exact.json fast.json --forward forward.jsonl [--compare compare.json]

Each figure is drawn from the files given for it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SEQUENCES = ", many sequences"
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#e0e0e0",
    "legend.frameon": False,
    "lines.marker": "o",
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "gptoss",  # the same numbers give the same file
}
Lines = dict[str, dict[int, list[float]]]  # label -> x -> values, of which the median is drawn


def parse_name(name: str) -> dict[str, str]:
    """The parts of a row's name: op/shape/isa/key:value/..."""
    op, shape, isa, *rest = name.split("/")
    keys = dict(part.split(":", 1) for part in rest if ":" in part)
    return {"op": op, "shape": shape, "isa": isa} | keys


def read_ops(paths: list[Path], shape: str, isa: str) -> tuple[dict[str, Lines], str]:
    """Percent of limit by tokens, of a panel each: products of a precision, and attention (which
    the precisions share); and what the rows were measured on."""
    panels: dict[str, Lines] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    threads = ""
    rows = [row for path in paths for row in json.loads(path.read_text("utf-8"))["benchmarks"]]
    for row in rows:
        key = parse_name(row["name"])
        if row.get("run_type") != "iteration" or "percent" not in row:
            continue
        if (key["shape"], key["isa"]) != (shape, isa):
            continue
        panel, label, threads = "products, exact", key["op"], key["threads"]
        if key.get("precision") == "fast":
            panel = "products, fast"
        if key["op"] == "attention":
            panel, label = "attention", f"context {key['context']}"
            label += f", window {key['window']}" if key["window"] != "0" else ""
            label += SEQUENCES if key["sequences"] != "1" else ""
        panels[panel][label][int(key["tokens"])].append(row["percent"])
    if not panels:
        raise SystemExit(f"{', '.join(map(str, paths))}: no rows of {shape} with {isa}")
    return panels, f"{shape}, {isa}, {threads} threads"


def read_forward(path: Path) -> tuple[Lines, Lines]:
    """Tokens per second of prompts by length, and of decoding (one sequence) by context."""
    speeds: dict[str, Lines] = {
        kind: defaultdict(lambda: defaultdict(list)) for kind in ("prompt", "decode")
    }
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["batch"] != 1:
            continue
        label = f"{row['shape']}, {row['isa'] or row['device']}, {row['threads']} threads"
        speeds[row["bench"]][label][row["tokens"]].append(row["tokens_per_second"])
    return speeds["prompt"], speeds["decode"]


def add_comparison(path: Path, prompt: Lines, decode: Lines) -> None:
    """Adds the rows of compare_llama.py."""
    result = json.loads(path.read_text(encoding="utf-8"))
    for engine, runs in result["runs"].items():
        name = {"llama": "llama.cpp", "ik": "ik_llama.cpp"}.get(engine, f"gptoss, {engine}")
        label = f"{name}, {result['threads']} threads"
        for run in runs:
            for what, rate in run["rates"].items():
                kind, n = re.fullmatch(r"(prompt|decode at) (\d+)", what).groups()
                lines = prompt if kind == "prompt" else decode
                lines.setdefault(label, defaultdict(list))[int(n)].append(rate)


def draw(axes: Axes, lines: Lines, title: str, x_label: str, y_label: str) -> None:
    """One panel."""
    colors: dict[str, str] = {}  # a dashed line has the color of its solid one
    for label, points in sorted(lines.items()):
        xs = sorted(points)
        color = colors.setdefault(label.removesuffix(SEQUENCES), COLORS[len(colors) % len(COLORS)])
        style = "--" if label.endswith(SEQUENCES) else "-"
        ys = [statistics.median(points[x]) for x in xs]
        axes.plot(xs, ys, linestyle=style, color=color, label=label)
    ticks = sorted({x for points in lines.values() for x in points})
    axes.set_xscale("symlog", base=2, linthresh=max(1, min((x for x in ticks if x), default=1)))
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if lines:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(path)


def main() -> None:
    """Draws the figures whose files are given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ops", type=Path, nargs="+", help="JSON of bench_ops, a file a precision")
    parser.add_argument("--shape", default="20b", help="of --ops")
    parser.add_argument("--isa", default="avx512bf16", help="of --ops")
    parser.add_argument("--forward", type=Path, help="JSON rows of bench_forward")
    parser.add_argument("--compare", type=Path, help="JSON of compare_llama.py")
    parser.add_argument("--out", type=Path, default=DOCS, help="directory for the figures")
    arguments = parser.parse_args()
    pyplot.rcParams.update(STYLE)
    if arguments.ops:
        panels, measured = read_ops(arguments.ops, arguments.shape, arguments.isa)
        figure, axes = pyplot.subplots(
            1, len(panels), squeeze=False, figsize=(4.6 * len(panels), 4.6), sharey=True
        )
        for axis, name in zip(axes.flat, sorted(panels, reverse=True), strict=True):
            draw(axis, panels[name], f"{name} ({measured})", "tokens", "")
            axis.axhline(100, color="#808080", linewidth=1, marker="")
        axes[0, 0].set_ylim(0, 105)
        axes[0, 0].set_ylabel("percent of this machine's limit")
        save(figure, arguments.out / "performance-ops.svg")
    if arguments.forward or arguments.compare:
        prompt, decode = read_forward(arguments.forward) if arguments.forward else ({}, {})
        if arguments.compare:
            add_comparison(arguments.compare, prompt, decode)
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.6))
        draw(panels[0], prompt, "prompt", "tokens of prompt", "tokens a second")
        draw(panels[1], decode, "decode, one sequence", "tokens of context", "")
        save(figure, arguments.out / "performance-speed.svg")


if __name__ == "__main__":
    main()
