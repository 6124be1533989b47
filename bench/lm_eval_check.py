"""lm-evaluation-harness against `gptoss serve`, checked against the model itself.

    python bench/lm_eval_check.py [--venv DIR]

Installs lm-eval in an environment of its own, makes a random checkpoint and a task of a few lines,
and runs lm-eval's local-completions on /v1/completions: log-likelihoods (echo and logprobs) and
generations (stop strings, greedy). Both must be what `Model.forward` and `Model.generate` give.
Nothing but the packages is downloaded. It takes one to two minutes, most of them the install.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from gptoss import Model, SamplingParams
from gptoss.synth import synthesize
from servers import running

PACKAGES = ["lm-eval[api]>=0.4.9", "transformers>=4.55"]
N_ROWS, MAX_NEW_TOKENS = 12, 24
UNTIL = "e"
TEXT = "a the model token text word answer question capital France weather city one two"
TASKS = {
    "gptoss_choice": """
task: gptoss_choice
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "gptoss_generate": """
task: gptoss_generate
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["UNTIL"], max_gen_toks: MAX_NEW_TOKENS, temperature: 0}
metric_list: [{metric: exact_match}]
""".replace("UNTIL", UNTIL).replace("MAX_NEW_TOKENS", str(MAX_NEW_TOKENS)),
}


def write_tasks(directory: Path) -> list[dict[str, Any]]:
    """The tasks' files; returns the rows that they read."""
    choose, words = random.Random(1).choices, TEXT.split()
    rows = [
        {
            "question": " ".join(choose(words, k=8 + row)),
            "choices": [" ".join(choose(words, k=k)) for k in (1, 2, 5)],
            "answer": row % 3,
        }
        for row in range(N_ROWS)
    ]
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(text % data, encoding="utf-8")
    return rows


def install(directory: Path) -> Path:
    """The Python of an environment with lm-eval; made if it is not there."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def evaluate(python: Path, checkpoint: Path, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs lm-eval on a server of its own; the samples that it logs, by task, in their order."""

    def command(port: int) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--quiet"]
        return [sys.executable, "-m", "gptoss.cli", "serve", "--model", str(checkpoint), *options]

    with running(command) as (url, _):
        settings = {
            "model": checkpoint.name,
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": checkpoint,
            "num_concurrent": 4,
            "max_retries": 1,
        }
        arguments = ["--model", "local-completions", "--tasks", ",".join(TASKS)]
        arguments += ["--model_args", ",".join(f"{key}={value}" for key, value in settings.items())]
        arguments += ["--include_path", str(work), "--output_path", str(work / "out")]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf")}
        subprocess.run(
            [python, "-m", "lm_eval", *arguments, "--log_samples"],
            check=True,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
            | offline,
        )
    samples = {}
    for task in TASKS:
        (file,) = (work / "out").rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        samples[task] = sorted(rows, key=lambda row: row["doc_id"])
    return samples


def log_likelihood(model: Model, question: str, choice: str) -> tuple[float, bool]:
    """log p(choice | question), and whether the choice is what greedy decoding would write."""
    assert model.tokenizer is not None
    start = len(model.tokenizer.encode(question))
    tokens = model.tokenizer.encode(question + choice)
    logits = model.forward(tokens[:-1])[start - 1 :].double()
    rows = logits.log_softmax(-1)
    targets = tokens[start:]
    total = sum(rows[row, token].item() for row, token in enumerate(targets))
    return total, rows.argmax(-1).tolist() == targets


def compare(model: Model, rows: list[dict[str, Any]], samples: dict[str, list[Any]]) -> float:
    """Raises SystemExit where lm-eval saw something else than the model gives; the largest
    difference between two log-likelihoods."""
    worst = 0.0
    for row, sample in zip(rows, samples["gptoss_choice"], strict=True):
        for choice, ((found, greedy),) in zip(row["choices"], sample["resps"], strict=True):
            expected, expected_greedy = log_likelihood(model, row["question"], f" {choice}")
            difference = abs(float(found) - expected)
            if not math.isfinite(difference) or difference > 1e-3 * max(1, abs(expected)):
                raise SystemExit(f"log-likelihood {found}, expected {expected}: {row}")
            if (str(greedy) == "True") != expected_greedy:
                raise SystemExit(f"greedy is {greedy}, expected {expected_greedy}: {row}")
            worst = max(worst, difference)
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0, stop=[UNTIL])
    for row, sample in zip(rows, samples["gptoss_generate"], strict=True):
        expected = model.generate(row["question"], params).text
        ((found,),) = sample["resps"]
        if found != expected:
            raise SystemExit(f"generated {found!r}, expected {expected!r}")
    return worst


def main() -> None:
    """Installs, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--venv", type=Path, help="where lm-eval is or goes; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        python = install((arguments.venv or work / "venv").absolute())
        checkpoint = synthesize(work / "tiny", progress=False)
        rows = write_tasks(work)
        samples = evaluate(python, checkpoint, work)
        with Model.load(checkpoint, "cpu", progress=False) as model:
            worst = compare(model, rows, samples)
    n_choices = sum(len(row["choices"]) for row in rows)
    print(f"{n_choices} log-likelihoods are the model's (largest difference {worst:.1e}),")
    print(f"and so are {len(rows)} generations")


if __name__ == "__main__":
    main()
