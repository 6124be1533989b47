"""gptoss beside llama.cpp and ik_llama.cpp, on the same random checkpoint and the same threads.

    python bench/compare_llama.py CHECKPOINT --llama-python VENV/bin/python
    python bench/compare_llama.py --small --llama-python VENV/bin/python

The first writes CHECKPOINT as GGUF and times llama.cpp and gptoss (precision "exact" and "fast") in
turns, each run in a process of its own, with the machine's limits measured between them if
--bench-machine is given: medians, ratios, peak memory. Only one model is in memory at a time. The
second measures accuracy: on small models that it makes, each engine's mean Kullback-Leibler
divergence from the float64 reference. ik_llama.cpp takes part through its own llama-bench, with
weights repacked at load, where --ik-bench names that binary.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKER = HERE / "engine_worker.py"
ENGINES = ("llama", "ik", "exact", "fast")  # the last two are precisions of gptoss
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
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each engine")
    parser.add_argument("--prompt", default="512,2048", help="prompt lengths", **counts)
    parser.add_argument("--context", default="0,8192", help="contexts to decode at", **counts)
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded at each context")
    parser.add_argument("--ik-bench", help="the binary llama-bench of ik_llama.cpp")
    engines = {"type": lambda text: text.split(","), "default": ["llama", "exact", "fast"]}
    parser.add_argument("--engines", help="of llama, ik, exact and fast", **engines)
    parser.add_argument("--bench-machine", help="the binary bench_machine")
    parser.add_argument("--json", help="file for all rows, one JSON object")
    arguments = parser.parse_args()
    if not arguments.small and not arguments.checkpoint:
        parser.error("give a checkpoint, or --small")
    if unknown := set(arguments.engines) - set(ENGINES):
        parser.error(f"--engines: {sorted(unknown)} are not among {ENGINES}")
    if "ik" in arguments.engines and (arguments.small or not arguments.ik_bench):
        parser.error("--engines: ik needs --ik-bench, and gives no logits for --small")
    return arguments


def run_worker(arguments: argparse.Namespace, engine: str, job: dict[str, Any]) -> dict[str, Any]:
    """Runs one engine in a process of its own. Raises RuntimeError if that fails."""
    python = arguments.llama_python if engine == "llama" else sys.executable
    job |= {"engine": "llama" if engine == "llama" else "gptoss", "precision": engine}
    job["threads"] = arguments.threads
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{engine} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_ik(arguments: argparse.Namespace, gguf: Path) -> dict[str, Any]:
    """Runs ik_llama.cpp's llama-bench once for all lengths, weights repacked as it loads.

    It does not time the loading. Raises RuntimeError if it fails.
    """
    command = [arguments.ik_bench, "-m", str(gguf), "-t", str(arguments.threads), "-o", "json"]
    command += ["-r", "1", "-fa", "1", "-rtr", "1", "-ub", "512", "-n", "0"]
    command += ["-p", ",".join(map(str, arguments.prompt))]
    for n in arguments.context:
        command += ["-gp", f"{n},{arguments.decode}"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"ik failed:\n{errors.read()[-2000:]}")
        rows = json.load(out)
    rates = {}
    for row in rows:
        name = f"decode at {row['n_prompt']}" if row["n_gen"] else f"prompt {row['n_prompt']}"
        rates[name] = row["avg_ts"]
    return {"engine": "ik", "rates": rates, "memory": {"VmHWM": usage.ru_maxrss * 1024}}


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
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in arguments.engines}
    limits = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            for engine in arguments.engines if number % 2 == 0 else reversed(arguments.engines):
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
                ik = engine == "ik"
                run = run_ik(arguments, gguf) if ik else run_worker(arguments, engine, job)
                runs[engine].append(run)
                print(f"{engine:7}", format_row(runs[engine][-1]["rates"]), flush=True)
    print_medians(runs)
    return {"threads": arguments.threads} | {
        "limits": limits,
        "runs": runs,
    }


def format_row(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in values.items())


def print_medians(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians of each engine, and how they stand to the first."""

    def line(label: str, value: Callable[[dict[str, Any]], float | None]) -> None:
        medians = []
        for rows in runs.values():
            found = [number for number in map(value, rows) if number is not None]
            medians.append(statistics.median(found) if found else math.nan)
        ratios = [median / medians[0] for median in medians[1:]]
        print(f"{label:<22}" + columns(medians, ".2f") + columns(ratios, ".2f"))

    def gibibytes(run: dict[str, Any], kind: str) -> float | None:
        return run["memory"][kind] / GIB if kind in run["memory"] else None

    print("\n" + heading("median of runs", list(runs), 22))
    for name in next(iter(runs.values()))[0]["rates"]:
        line(f"{name}, tok/s", lambda run, n=name: run["rates"][n])
    line("load, s", lambda run: run.get("load"))
    line("peak resident, GiB", lambda run: gibibytes(run, "VmHWM"))
    line("of its own, GiB", lambda run: gibibytes(run, "RssAnon"))


def heading(label: str, engines: list[str], width: int) -> str:
    ratios = [f"{engine} ratio" for engine in engines[1:]]
    return f"{label:<{width}}" + "".join(f"{name:>13}" for name in engines + ratios)


def columns(values: list[float], form: str) -> str:
    return "".join(f"{value:>13{form}}" for value in values)


# --- accuracy -------------------------------------------------------------------------------------


def compare_accuracy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Mean KL(float64 || engine) over all tokens, on each small model."""
    from gptoss.synth import synthesize
    from write_gguf import write_gguf

    rows = []
    print(heading("mean KL to float64", arguments.engines, 44))
    for shape in SMALL_SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = synthesize(f"{scratch}/model", "tiny", progress=False, **shape)
            gguf = write_gguf(checkpoint, f"{scratch}/model.gguf")
            row: dict[str, Any] = {"shape": shape}
            row |= divergences(arguments, checkpoint, gguf)
        rows.append(row)
        name = " ".join(f"{key}={value}" for key, value in shape.items())
        found = [row[engine] for engine in arguments.engines]
        ratios = columns([value / found[0] for value in found[1:]], ".3f")
        print(f"{name[:43]:<44}" + columns(found, ".2e") + ratios, flush=True)
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
    for engine in arguments.engines:
        out = f"{checkpoint}.{engine}"
        model = str(gguf if engine == "llama" else checkpoint)
        job = {"model": model, "max_context": 512, "sequences": sequences, "out": out}
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
