"""A few hundred requests of bench/hostile.py, which sends ten thousand of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from gptoss.tokenizer import Tokenizer
from server_tools import live, scripted, until

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def hostile() -> ModuleType:
    """bench/hostile.py as a module."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("hostile", BENCH / "hostile.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["hostile"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def test_hostile_requests(hostile: ModuleType, harmony_path: Path) -> None:
    """Refused, every one, with a healthy request beside them answered, and nothing left behind."""
    tokenizer = Tokenizer.from_file(harmony_path / "tokenizer.json")
    settings = {"body_timeout": 5.0, "header_timeout": 5.0, "max_body_bytes": 1 << 20}
    with live(scripted("x", tokenizer, settings=settings)) as server:
        statuses, faults = hostile.attack(server.port, 400, seed=1, n_threads=8)
        assert not faults
        assert sum(statuses.values()) == 400 and statuses["400"] > 200
        assert hostile.honest(server.port)
        until(lambda: not server.scripted.core.sequences)


def test_what_counts_as_a_fault(hostile: ModuleType) -> None:
    request = next(hostile.requests(1, seed=0))
    for status in ("200", "400", "404", "413", "429", "503"):
        assert hostile.fault(request, status) is None
    for status in ("500", "502", "closed", "no answer in time"):
        assert hostile.fault(request, status)
