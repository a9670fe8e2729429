"""The numbers of the scan in Triton, through Triton's interpreter: run by test_scan_triton.py in a process of its own.

Triton decides when it is imported whether it interprets (TRITON_INTERPRET=1). The interpreter takes some 20 ms for a
step of one sample, direction and block of channels: the cases are small, and still have several sections and blocks.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.model.scan import available, resolve, ss2d_scan
from tests.test_scan import NAMES, compare, make, run


def test_it_is_never_chosen_for_a_cpu() -> None:
    assert available("triton") and resolve(None) in ("cpp", "torch")


@pytest.mark.parametrize(
    ("shape", "states"),
    [
        ((1, 1, 1, 1), 1),
        ((2, 3, 2, 3), 2),
        ((1, 5, 1, 33), 16),  # two blocks of channels, the second nearly empty
        ((1, 2, 3, 5), 17),  # states that fill no tile
        ((1, 3, 6, 2), 3),  # two sections of 16 steps, the second one cut
    ],
)
def test_any_size(shape: tuple[int, int, int, int], states: int) -> None:
    inputs = make(*shape, states=states)
    compare(run(inputs, "triton", torch.float32), run(inputs, "reference", torch.float64), y=5e-7, gradients=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_read_as_they_are(dtype: torch.dtype) -> None:
    """Parts of one tensor as the network cuts them; gradients in the precision of what they belong to."""
    x, delta, A, B, C, D, bias = make(1, 3, 3, 2, states=4)
    parts = torch.cat([B, C], -1).to(dtype).requires_grad_()
    halves = [x.to(dtype).requires_grad_(), delta.to(dtype).requires_grad_()]
    whole = [tensor.float().requires_grad_() for tensor in (A, D, bias)]

    def scanned(kind: torch.dtype | None, backend: str) -> tuple[Tensor, list[Tensor]]:
        leaves = [tensor.detach().to(kind or tensor.dtype).requires_grad_() for tensor in (*halves, parts, *whole)]
        u, dt, both, rates, skip, shift = leaves
        y = ss2d_scan(u, dt, rates, both[..., :4], both[..., 4:], skip, shift, backend)
        return y.detach(), list(torch.autograd.grad(y.sum(), leaves))

    y, gradients = scanned(None, "triton")
    truth, true_gradients = scanned(torch.float64, "reference")
    assert y.dtype == torch.float32
    assert float((y - truth).abs().max() / truth.abs().max()) <= 5e-7
    assert [g.dtype for g in gradients] == [dtype] * 3 + [torch.float32] * 3
    for mine, true in zip(gradients, true_gradients, strict=True):
        allowed = 2 * torch.finfo(mine.dtype).eps + 1e-6
        assert float((mine - true).abs().max() / true.abs().max()) <= allowed


def test_strides_do_not_matter_and_bits_are_the_same_run_to_run() -> None:
    inputs = [tensor.float() for tensor in make(1, 2, 3, 3, states=2)]
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in inputs]
    first, second = (run(tensors, "triton", torch.float32) for tensors in (inputs, strided))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "value"), [("x", math.nan), ("delta", math.inf), ("A", math.inf), ("C", math.inf)])
def test_nan_and_inf_behave_as_in_the_reference(name: str, value: float) -> None:
    inputs = dict(zip(NAMES, make(1, 2, 2, 2, states=2), strict=True))
    inputs[name].view(-1)[3] = value
    with torch.no_grad():
        mine, truth = (
            ss2d_scan(*(tensor.float() for tensor in inputs.values()), backend=backend)
            for backend in ("triton", "reference")
        )
    assert torch.equal(mine.isnan(), truth.isnan()) and not truth.isfinite().all()
    torch.testing.assert_close(mine[~truth.isnan()], truth[~truth.isnan()], rtol=1e-5, atol=1e-6)


def test_extreme_steps() -> None:
    inputs = make(1, 2, 5, 2, states=2)
    inputs[1][:, ::2], inputs[1][:, 1::2] = 60.0, -60.0
    compare(run(inputs, "triton", torch.float32), run(inputs, "reference", torch.float64), y=5e-7, gradients=2e-5)
