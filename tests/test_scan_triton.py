"""The scan in Triton: its numbers through Triton's interpreter, its programs compiled ahead for two kinds of GPU.

On a GPU test_scan.py holds it to the tests of all backends.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Size, tables
from pipeline.model import scan_triton
from pipeline.model.scan import ss2d_scan
from tests.test_scan import make

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux only")


def here(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


@linux
def test_the_numbers_through_the_interpreter() -> None:
    """triton_interpreted.py: values and gradients against float64, dtypes, strides, NaN, bits run to run."""
    cases = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_interpreted.py"]
    done = here(*cases, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^14 passed\b(?!.*skipped)", done.stdout, re.MULTILINE), done.stdout


def test_without_a_gpu_the_error_says_what_to_take() -> None:
    inputs = [tensor.float() for tensor in make(1, 2, 2, 2)]
    with pytest.raises(ValueError, match="'triton' runs up to float32 on CUDA, not torch.float32 on cpu; use 'torch'"):
        ss2d_scan(*inputs, backend="triton")
    assert not scan_triton.available() or torch.cuda.is_available()


def test_an_image_beyond_32_bits_is_refused() -> None:
    scan_triton.check_reach(2048, 2048, 4 * 96)
    with pytest.raises(ValueError, match=r"not 2048 x 2048 pixels of 768; use smaller images, or 'torch'"):
        scan_triton.check_reach(2048, 2048, 4 * 192)


def test_the_benchmark_of_a_gpu_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU and small, since it is written for a machine that is not always at hand."""
    tables(Size(device="cpu", batch=1, pixels=64, network="nano", states=4), 1)
    titles = [line for line in capsys.readouterr().out.splitlines() if "interleaved" in line]
    assert len(titles) == 4 * 2 + 2 and titles[-1].startswith("Step of pretraining, nano, 1 x 64 x 64")


@linux
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiled_ahead(architecture: int) -> None:
    """For A100 and H100/H200: within a GPU's registers, without atomics, and lanes as the kernels' text says."""
    code = "import sys, json; from benchmarks.compiled import compiled; print(json.dumps(compiled(int(sys.argv[1]))))"
    done = here("-c", code, str(architecture))
    assert done.returncode == 0, done.stderr
    forward, backward = json.loads(done.stdout.splitlines()[-1])
    for kernel in (forward, backward):
        assert kernel["atomics"] == 0
        assert 0 < kernel["registers"] <= 255
    assert forward["spilled"] == 0 and backward["spilled"] <= 512
    assert forward["shuffles"] == 0, "a lane owns a channel"
    assert backward["shuffles"] == 40 * scan_triton.CHUNK, "the least that a square of 4 x 4 takes"
