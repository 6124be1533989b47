"""Choosing an instruction set, and that no set's code can be linked in place of another's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gptoss import _gptoss

BUILD = os.environ.get("GPTOSS_KERNEL_OBJECTS")  # a build's directory: the objects are below it


def symbols(path: Path, *options: str) -> set[str]:
    """Names of the symbols in an object file that a linker sees, weak ones too."""
    command = ["nm", "--extern-only", "--format=posix", *options, str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line.split()[0] for line in listing.splitlines() if line}


@pytest.mark.skipif(not BUILD, reason="GPTOSS_KERNEL_OBJECTS is not set to a build directory")
def test_kernel_objects_share_nothing() -> None:
    """Were a template's AVX-512 copy visible, the linker could give it to an AVX2 machine. So an
    object defines its table and nothing else, and asks for no more than C library functions."""
    exported = []
    for path in sorted(Path(str(BUILD)).rglob("kernels.cpp.o*")):
        exported += symbols(path, "--defined-only")
        assert not {name for name in symbols(path, "--undefined-only") if name.startswith("_Z")}
    assert sorted(exported) == sorted(f"gptoss_kernels_{isa}" for isa in _gptoss.isa_names())


def run_with_isa(isa: str | None) -> subprocess.CompletedProcess[str]:
    """The active instruction set of a new process, on its standard output."""
    environment = {key: value for key, value in os.environ.items() if key != "GPTOSS_ISA"}
    if isa is not None:
        environment["GPTOSS_ISA"] = isa
    program = "from gptoss import _gptoss; print(_gptoss.active_isa())"
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_best_isa_is_the_default() -> None:
    """Names go from the plainest set to the best; the last that the machine supports is taken."""
    assert _gptoss.isa_names()[0] == _gptoss.supported_isas()[0] == "scalar"
    assert run_with_isa(None).stdout.strip() == _gptoss.supported_isas()[-1]
    assert run_with_isa("").stdout.strip() == _gptoss.supported_isas()[-1]


def test_forced_isa_is_taken(isa: str) -> None:
    assert run_with_isa(isa).stdout.strip() == isa


@pytest.mark.parametrize("unknown", ("avx1024", "AVX2", "avx2 ", "scala"))
def test_unknown_isa_is_an_error_with_the_possible_names(unknown: str) -> None:
    failed = run_with_isa(unknown)
    assert failed.returncode != 0
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and "GPTOSS_ISA" in last and unknown.strip() in last
    assert all(name in last for name in _gptoss.supported_isas())


def test_unsupported_isa_is_an_error_with_the_possible_names() -> None:
    missing = [isa for isa in _gptoss.isa_names() if isa not in _gptoss.supported_isas()]
    if not missing:
        pytest.skip("this machine supports every instruction set")
    last = run_with_isa(missing[0]).stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and missing[0] in last
    assert all(name in last for name in _gptoss.supported_isas())


def test_ops_and_core_use_what_is_forced(forced_isa: str) -> None:
    from small_models import CONFIGS, make_core, random_tensors

    config = CONFIGS["one_layer"]
    assert make_core(config, random_tensors(config)).isa == forced_isa
    with pytest.raises(ValueError, match="nothing"):
        _gptoss.Ops("cpu", "nothing")
