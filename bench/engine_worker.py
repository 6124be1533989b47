"""One engine, one process: loads a model, measures, prints one line of JSON. See compare_llama.py.

Runs in the engine's own environment: needs numpy and either gptoss or llama_cpp. Reads a job as
JSON from stdin: engine ("gptoss" or "llama"), precision, model, threads, max_context,
and either

    prompts, contexts, decode   token counts to time
    state                       where llama.cpp keeps a long context, so as to read it only once
or
    sequences, out              token ids whose logits go to out.N.npy, float32 [n, V]
"""

from __future__ import annotations

import ctypes
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 512
NOTHING, LAST, ALL = 0, 1, 2  # rows of logits wanted


class Gptoss:
    """gptoss through its core."""

    def __init__(self, job: dict[str, Any]) -> None:
        from gptoss import _gptoss
        from gptoss.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(job["model"])
        self.core = _gptoss.Core(
            checkpoint.config,
            precision=job["precision"],
            threads=job["threads"],
            max_context=job["max_context"],
            max_batch_tokens=BATCH,
        )
        checkpoint.load_into(self.core, progress=False)
        self.core.finish_loading()
        self.vocab_size = checkpoint.config.vocab_size
        self.sequence = self.core.new_sequence()

    def reset(self) -> None:
        """Starts a new sequence."""
        self.sequence.close()
        self.sequence = self.core.new_sequence()

    def feed(self, tokens: list[int], want: int) -> np.ndarray:
        """Appends up to BATCH tokens; the logits wanted, float32 [rows, V]."""
        logits = np.empty((len(tokens) if want == ALL else want, self.vocab_size), np.float32)
        self.core.step([(self.sequence, tokens, want, None)], logits if want else None)
        return logits

    def restore(self, path: str, tokens: list[int]) -> bool:
        """gptoss cannot save a sequence."""
        return False

    def save(self, path: str, tokens: list[int]) -> None:
        """Nor this."""


class Llama:
    """llama.cpp through llama-cpp-python's low-level functions."""

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # must outlive the model
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(job["model"].encode(), model_options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = job["max_context"]
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = job["threads"]
        options.flash_attn_type = 1
        options.swa_full = False
        options.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            sys.exit(f"llama.cpp cannot load {job['model']}")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.position = 0

    def reset(self) -> None:
        """Starts a new sequence."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.position = 0

    def feed(self, tokens: list[int], want: int) -> np.ndarray:
        """Appends up to BATCH tokens; the logits wanted, float32 [rows, V]."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = want == ALL or (want == LAST and i == len(tokens) - 1)
        code = self.api.llama_decode(self.context, batch)
        if code != 0:
            sys.exit(f"llama_decode returned {code}")
        self.position += len(tokens)
        rows = len(tokens) if want == ALL else want
        if not rows:
            self.api.llama_synchronize(self.context)
            return np.empty((0, self.vocab_size), np.float32)
        pointer = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (rows, self.vocab_size)).copy()

    def restore(self, path: str, tokens: list[int]) -> bool:
        """Takes the cache of these tokens from a file; False if there is none."""
        if not Path(path).exists():
            return False
        into, count = (ctypes.c_int32 * len(tokens))(), ctypes.c_size_t()
        ok = self.api.llama_state_seq_load_file(
            self.context, path.encode(), 0, into, len(tokens), ctypes.byref(count)
        )
        self.position = count.value
        return bool(ok) and list(into) == tokens

    def save(self, path: str, tokens: list[int]) -> None:
        """Writes the cache of these tokens."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        self.api.llama_state_seq_save_file(self.context, path.encode(), 0, array, len(tokens))


Engine = Gptoss | Llama


def read(engine: Engine, tokens: list[int]) -> float:
    """Appends tokens in batches, with logits of the last; the seconds it took."""
    start = time.perf_counter()
    for first in range(0, len(tokens), BATCH):
        last = first + BATCH >= len(tokens)
        engine.feed(tokens[first : first + BATCH], LAST if last else NOTHING)
    return time.perf_counter() - start


def measure(engine: Engine, job: dict[str, Any]) -> dict[str, float]:
    """Tokens per second: of each prompt, and of single steps after each context."""
    random.seed(7)
    rates = {}

    def random_tokens(n: int) -> list[int]:
        return [random.randrange(engine.vocab_size) for _ in range(n)]

    read(engine, random_tokens(32))
    for n in job["prompts"]:
        engine.reset()
        rates[f"prompt {n}"] = n / read(engine, random_tokens(n))
    for n in job["contexts"]:
        engine.reset()
        tokens, state = random_tokens(n), f"{job['state']}.{n}"
        if n and not engine.restore(state, tokens):
            engine.reset()
            read(engine, tokens)
            engine.save(state, tokens)
        times = [read(engine, random_tokens(1)) for _ in range(job["decode"] + 2)]
        rates[f"decode at {n}"] = 1 / statistics.median(times[2:])  # two to warm up
    return rates


def write_logits(engine: Engine, job: dict[str, Any]) -> None:
    """The logits of every token of every sequence."""
    for number, tokens in enumerate(job["sequences"]):
        engine.reset()
        parts = [
            engine.feed(tokens[first : first + BATCH], ALL)
            for first in range(0, len(tokens), BATCH)
        ]
        np.save(f"{job['out']}.{number}.npy", np.concatenate(parts))


def memory() -> dict[str, int]:
    """Bytes of this process: the most that was resident, and what is its own now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon")}


def main() -> None:
    """Does the job on stdin."""
    job = json.load(sys.stdin)
    start = time.perf_counter()
    engine = {"gptoss": Gptoss, "llama": Llama}[job["engine"]](job)
    result: dict[str, Any] = {"engine": job["engine"], "load": time.perf_counter() - start}
    if "sequences" in job:
        write_logits(engine, job)
    else:
        result["rates"] = measure(engine, job)
    print(json.dumps(result | {"memory": memory()}))


if __name__ == "__main__":
    main()
