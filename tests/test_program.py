"""A network as a program of torch.export: in a process that has torch and nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from pipeline.model import MCFMamba, ModelConfig, ReleaseError, program
from pipeline.model.program import random_inputs, write_program
from pipeline.model.scan import BACKENDS, resolve, ss2d_scan

SIDE = 16
RUN = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(*inputs) for inputs in torch.load(sys.argv[2])], sys.argv[3])
try:
    program({"s1": torch.zeros(1, 2, 64, 64)}, {"s1": torch.zeros(1, 16, 16, dtype=torch.bool)})
except RuntimeError as error:
    print("refused" if "equal to 16" in str(error) else error)
print([name for name in sys.modules if name.split(".")[0] in ("pipeline", "shards")])
"""


def network() -> MCFMamba:
    torch.manual_seed(0)
    return MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1), d_state=2), {"s1": 2}, 3).eval()


def test_a_program_runs_with_torch_alone_for_any_batch(tmp_path: Path) -> None:
    model = network()
    with mock.patch.object(program, "_check"):  # which is what this test does, but for the process
        write_program(tmp_path / "model.pt2", model, SIDE)
    inputs = [random_inputs(model, count, SIDE) for count in (1, 2, 5)]
    torch.save(inputs, tmp_path / "inputs")
    command = [sys.executable, "-I", "-c", RUN, *(str(tmp_path / name) for name in ("model.pt2", "inputs", "outputs"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused", "[]"]
    for given, got in zip(inputs, torch.load(tmp_path / "outputs"), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(got, model(*given), rtol=0, atol=1e-5)


def test_other_logits_of_a_program_are_an_error(tmp_path: Path) -> None:
    class Other:
        def module(self) -> object:
            return lambda images, hidden: network()(images, hidden) + 1e-2

    with mock.patch.object(torch.export, "load", lambda path: Other()), pytest.raises(ReleaseError, match="differ by"):
        program._check(tmp_path / "model.pt2", network(), SIDE)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 3), (1, 1, 2, 2, 1), (1, 16, 16, 3, 2)])
def test_doubling_is_the_scan(shape: tuple[int, ...]) -> None:
    batch, height, width, channels, states = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    pixels = (batch, height, width)
    inputs = (
        draw(*pixels, channels), draw(*pixels, 4, channels), draw(4, channels, states), draw(*pixels, 4, states),
        draw(*pixels, 4, states), draw(4, channels), draw(4, channels),
    )  # fmt: skip
    results = []
    for backend in ("doubling", "reference"):
        x, delta, A, *others = inputs
        y = ss2d_scan(x, delta, -A.exp(), *others, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_nothing_chooses_doubling_by_itself() -> None:
    assert "doubling" not in BACKENDS and resolve(None) != "doubling"
