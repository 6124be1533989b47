"""gptoss beside llama.cpp, on the same random checkpoint and the same threads.

    python bench/compare_llama.py CHECKPOINT --llama-python VENV/bin/python
    python bench/compare_llama.py --small --llama-python VENV/bin/python

The first writes CHECKPOINT as GGUF and times both engines in turns, each run in a process of its
own, with the machine's limits measured between them if --bench-machine is given: medians, ratios,
peak memory. Only one model is in memory at a time. The second measures accuracy: on small models
that it makes, each engine's mean Kullback-Leibler divergence from the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKER = HERE / "engine_worker.py"
ENGINES = ("llama", "gptoss")
GIB = 1 << 30
SMALL_TOKENS, SMALL_SEQUENCES = 384, 2
SMALL_SHAPES = (
    {"seed": 1},
    {"seed": 2, "hidden_size": 256, "intermediate_size": 256, "n_layers": 6},
    {"seed": 3, "hidden_size": 512, "intermediate_size": 384, "n_experts": 16, "n_heads": 16},
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    counts = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("checkpoint", nargs="?", help="directory with config.json and safetensors")
    parser.add_argument("--small", action="store_true", help="accuracy on small models instead")
    parser.add_argument("--llama-python", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("--gguf", help="where the GGUF is or goes; default: CHECKPOINT.gguf")
    parser.add_argument("--precision", default="exact", help="of gptoss: exact or fast")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each engine")
    parser.add_argument("--prompt", default="512,2048", help="prompt lengths", **counts)
    parser.add_argument("--context", default="0,8192", help="contexts to decode at", **counts)
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded at each context")
    parser.add_argument("--bench-machine", help="the binary bench_machine")
    parser.add_argument("--json", help="file for all rows, one JSON object")
    arguments = parser.parse_args()
    if not arguments.small and not arguments.checkpoint:
        parser.error("give a checkpoint, or --small")
    return arguments


def run_worker(arguments: argparse.Namespace, engine: str, job: dict[str, Any]) -> dict[str, Any]:
    """Runs one engine in a process of its own. Raises RuntimeError if that fails."""
    python = arguments.llama_python if engine == "llama" else sys.executable
    job |= {"engine": engine, "threads": arguments.threads, "precision": arguments.precision}
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{engine} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_limits(arguments: argparse.Namespace) -> dict[str, float]:
    """GB/s, GFLOP/s and GOP/s of this machine now, by kind."""
    threads = f"threads:{arguments.threads}/"
    command = [
        arguments.bench_machine,
        f"--benchmark_filter=(memory/pages:huge|fma_f32/avx|dot).*{threads}",
        "--benchmark_min_time=0.2",
        "--benchmark_format=json",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    limits: dict[str, float] = {}
    for row in json.loads(done.stdout)["benchmarks"]:
        for unit in ("GB/s", "GFLOP/s", "GOP/s"):
            if unit in row:
                kind = f"{row['name'].split('/')[0]} {unit}"
                limits[kind] = max(limits.get(kind, 0), row[unit])
    return limits


# --- speed ----------------------------------------------------------------------------------------


def compare_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both engines in turns; prints every run, then medians and ratios."""
    checkpoint = Path(arguments.checkpoint).resolve()
    gguf = Path(arguments.gguf or f"{checkpoint}.gguf").resolve()
    if not gguf.exists():
        print(f"writing {gguf.name}", flush=True)
        command = [sys.executable, str(HERE / "write_gguf.py"), str(checkpoint), str(gguf)]
        subprocess.run(command, check=True)  # in a process of its own: its memory goes with it
    longest = max([*arguments.prompt, *arguments.context]) + arguments.decode + 2
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    limits = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            for engine in ENGINES if number % 2 == 0 else reversed(ENGINES):
                if arguments.bench_machine:
                    limits.append(measure_limits(arguments))
                    print("limits ", format_row(limits[-1]), flush=True)
                job = {
                    "model": str(gguf if engine == "llama" else checkpoint),
                    "max_context": math.ceil(longest / 256) * 256,
                    "prompts": arguments.prompt,
                    "contexts": arguments.context,
                    "decode": arguments.decode,
                    "state": f"{scratch}/state",
                }
                runs[engine].append(run_worker(arguments, engine, job))
                print(f"{engine:7}", format_row(runs[engine][-1]["rates"]), flush=True)
    print_medians(runs)
    return {"threads": arguments.threads} | {
        "limits": limits,
        "runs": runs,
    }


def format_row(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in values.items())


def print_medians(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians of both engines and their ratio."""

    def median(engine: str, value: Any) -> float:
        return statistics.median(value(run) for run in runs[engine])

    print(f"\n{'median of runs':<26}{'llama.cpp':>12}{'gptoss':>12}{'ratio':>8}")
    for name in runs["gptoss"][0]["rates"]:
        theirs, ours = (median(engine, lambda run, n=name: run["rates"][n]) for engine in ENGINES)
        print(f"{name + ', tok/s':<26}{theirs:>12.2f}{ours:>12.2f}{ours / theirs:>8.2f}")
    for label, value in (
        ("load, s", lambda run: run["load"]),
        ("peak resident, GiB", lambda run: run["memory"]["VmHWM"] / GIB),
        ("of its own, GiB", lambda run: run["memory"]["RssAnon"] / GIB),
    ):
        theirs, ours = (median(engine, value) for engine in ENGINES)
        print(f"{label:<26}{theirs:>12.2f}{ours:>12.2f}{ours / theirs:>8.2f}")


# --- accuracy -------------------------------------------------------------------------------------


def compare_accuracy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Mean KL(float64 || engine) over all tokens, on each small model."""
    from gptoss.synth import synthesize
    from write_gguf import write_gguf

    rows = []
    print(f"{'mean KL to float64':<44}{'llama.cpp':>12}{'gptoss':>12}{'ratio':>8}")
    for shape in SMALL_SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = synthesize(f"{scratch}/model", "tiny", progress=False, **shape)
            gguf = write_gguf(checkpoint, f"{scratch}/model.gguf")
            row: dict[str, Any] = {"shape": shape}
            row |= divergences(arguments, checkpoint, gguf)
        rows.append(row)
        theirs, ours = row["llama"], row["gptoss"]
        name = " ".join(f"{key}={value}" for key, value in shape.items())
        print(f"{name[:43]:<44}{theirs:>12.2e}{ours:>12.2e}{ours / theirs:>8.3f}", flush=True)
    return {"kl": rows}


def divergences(arguments: argparse.Namespace, checkpoint: Path, gguf: Path) -> dict[str, float]:
    """Each engine's mean KL on random sequences through this model."""
    import numpy as np

    config, tensors = read_reference(checkpoint)
    random.seed(1)
    vocabulary = range(config.vocab_size)
    sequences = [random.choices(vocabulary, k=SMALL_TOKENS) for _ in range(SMALL_SEQUENCES)]
    exact = [reference_logits(tokens, tensors, config) for tokens in sequences]
    found = {}
    for engine, model in (("llama", gguf), ("gptoss", checkpoint)):
        out = f"{checkpoint}.{engine}"
        job = {"model": str(model), "max_context": 512, "sequences": sequences, "out": out}
        run_worker(arguments, engine, job)
        logits = [np.load(f"{out}.{number}.npy") for number in range(len(sequences))]
        found[engine] = statistics.mean(map(mean_divergence, exact, logits))
    return found


def read_reference(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """The configuration and tensors as tests/reference.py takes them."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from dataclasses import fields

    from gptoss.checkpoint import open_checkpoint
    from reference import Config
    from safetensors.torch import load_file

    opened = open_checkpoint(checkpoint)
    values = {field.name: getattr(opened.config, field.name) for field in fields(Config)}
    files = {tensor.file for tensor in opened.tensors.values()}
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return Config(**values), tensors


def reference_logits(tokens: list[int], tensors: dict[str, Any], config: Any) -> Any:
    """float64 [n, V]"""
    import torch
    from reference import forward

    return forward(torch.tensor(tokens), tensors, config)


def mean_divergence(exact: Any, logits: Any) -> float:
    """Mean over tokens of KL(softmax(exact) || softmax(logits)), in nats; both [n, V]."""
    import torch

    p = exact.log_softmax(-1)
    q = torch.from_numpy(logits).double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def main() -> None:
    """Compares, and writes the JSON."""
    arguments = parse_arguments()
    result = compare_accuracy(arguments) if arguments.small else compare_speed(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
