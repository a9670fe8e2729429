"""The 2-D selective scan: the reference against its definition, every backend against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.model import scan_mamba_ssm, scan_triton
from pipeline.model.scan import available, resolve, ss2d_scan
from tests.golden import Golden
from tests.scan_backends import GPU, ON_CPU, device, working

NAMES = ("x", "delta", "A", "B", "C", "D", "delta_bias")
FAST = working([name for name in ON_CPU if name != "reference"] + [name for name in GPU if available(name)])
backends = pytest.mark.parametrize("backend", FAST)


def make(batch: int, height: int, width: int, channels: int, states: int = 16, seed: int = 0) -> list[Tensor]:
    """Inputs as a freshly initialised network makes them, float64 but exactly representable in float32."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    decay = -torch.arange(1, states + 1) * (1 + 0.05 * normal(4, channels, states)).abs()
    dt = torch.exp(torch.rand(4, channels, generator=g, dtype=torch.float64) * math.log(100) + math.log(1e-3))
    pixels = (batch, height, width)
    inputs = [
        torch.nn.functional.silu(normal(*pixels, channels)),
        0.5 * normal(*pixels, 4, channels),
        decay,
        normal(*pixels, 4, states),
        normal(*pixels, 4, states),
        1 + 0.1 * normal(4, channels),
        dt + torch.log(-torch.expm1(-dt)),
    ]
    return [tensor.float().double() for tensor in inputs]


def run(inputs: list[Tensor], backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and all gradients for a fixed random cotangent, float64."""
    leaves = [tensor.detach().to(device(backend), dtype).requires_grad_() for tensor in inputs]
    y = ss2d_scan(*leaves, backend=backend)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    return {"y": y.detach().cpu().double()} | {
        name: leaf.grad.cpu().double() for name, leaf in zip(NAMES, leaves, strict=True) if leaf.grad is not None
    }


def tolerances(backend: str) -> dict[str, float]:
    """Relative errors against float64; the exponential of a GPU is good to two units in the last place."""
    return {"y": 2e-6, "gradients": 5e-6} if backend in GPU else {"y": 5e-7, "gradients": 1e-6}


def compare(mine: dict[str, Tensor], truth: dict[str, Tensor], y: float, gradients: float) -> None:
    assert mine.keys() == truth.keys() == {"y", *NAMES}
    for name, expected in truth.items():
        error = float((mine[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        assert error <= (y if name == "y" else gradients), f"{name}: {error:.2e}"


def by_hand(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """The definition for one sample, scalar by scalar, with its own idea of the four directions."""
    height, width, channels = x.shape[1:]
    row_major = [(r, c) for r in range(height) for c in range(width)]
    column_major = [(r, c) for c in range(width) for r in range(height)]
    y = torch.zeros_like(x)
    for k, walk in enumerate([row_major, column_major, row_major[::-1], column_major[::-1]]):
        for d in range(channels):
            h = [0.0] * A.shape[2]
            for r, c in walk:
                dt = math.log1p(math.exp(float(delta[0, r, c, k, d] + bias[k, d])))
                u = float(x[0, r, c, d])
                for n in range(len(h)):
                    h[n] = math.exp(dt * float(A[k, d, n])) * h[n] + dt * float(B[0, r, c, k, n]) * u
                y[0, r, c, d] += sum(float(C[0, r, c, k, n]) * h[n] for n in range(len(h))) + float(D[k, d]) * u
    return y


def test_reference_is_the_definition() -> None:
    inputs = make(1, 3, 4, 2, states=3)
    torch.testing.assert_close(ss2d_scan(*inputs, backend="reference"), by_hand(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck_in_float64(backend: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in make(2, 2, 3, 2, states=2)]
    assert torch.autograd.gradcheck(lambda *tensors: ss2d_scan(*tensors, backend=backend), inputs)


@backends
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 40),
    states=st.sampled_from([1, 2, 3, 8, 16, 17]),
    seed=st.integers(0, 1000),
)
def test_any_size(backend: str, batch: int, height: int, width: int, channels: int, states: int, seed: int) -> None:
    inputs = make(batch, height, width, channels, states, seed)
    compare(run(inputs, backend, torch.float32), run(inputs, "reference", torch.float64), **tolerances(backend))


@backends
@pytest.mark.parametrize("shape", [(1, 64, 64, 4), (1, 1, 999, 3), (1, 20, 10, 200), (3, 16, 16, 24), (2, 4, 4, 1100)])
def test_long_sequences(backend: str, shape: tuple[int, int, int, int]) -> None:
    """Errors must not grow along the sequence: up to L = 4096, and in parts of the batch or of the directions."""
    inputs = make(*shape)
    compare(run(inputs, backend, torch.float32), run(inputs, "reference", torch.float64), **tolerances(backend))


def test_float64() -> None:
    inputs = make(2, 5, 4, 3)
    compare(run(inputs, "torch", torch.float64), run(inputs, "reference", torch.float64), y=1e-13, gradients=1e-12)


@backends
def test_strides_do_not_matter(backend: str) -> None:
    inputs = [tensor.to(device(backend), torch.float32) for tensor in make(2, 4, 5, 6)]
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in inputs]
    strided[0] = torch.cat([inputs[0], inputs[0]], -1)[..., :6]
    assert not strided[0].is_contiguous()
    assert torch.equal(ss2d_scan(*strided, backend=backend), ss2d_scan(*inputs, backend=backend))
    first, second = run(strided, backend, torch.float32), run(inputs, backend, torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


@backends
def test_identical_bits_run_to_run(backend: str) -> None:
    inputs = make(3, 16, 16, 24)
    first, second = (run(inputs, backend, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@backends
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_behave_as_in_the_reference(backend: str, name: str, value: float) -> None:
    inputs = dict(zip(NAMES, make(1, 3, 3, 2, states=2), strict=True))
    inputs[name].view(-1)[7 % inputs[name].numel()] = value
    mine, truth = (run(list(inputs.values()), which, torch.float32)["y"] for which in (backend, "reference"))
    assert torch.equal(mine.isnan(), truth.isnan())
    finite = ~truth.isnan()
    torch.testing.assert_close(mine[finite], truth[finite], rtol=1e-5, atol=1e-6)


@backends
def test_extreme_steps(backend: str) -> None:
    """Steps that forget everything, or nothing at all, neither overflow nor lose gradients."""
    inputs = make(1, 6, 7, 5)
    inputs[1][:, ::2] = 60.0
    inputs[1][:, 1::2] = -60.0
    # exp(-60) in float32 is only as exact as its argument: 60 * 2^-24
    allowed = tolerances(backend) | {"gradients": 2e-5}
    compare(run(inputs, backend, torch.float32), run(inputs, "reference", torch.float64), **allowed)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_and_autocast_keep_the_state_in_float32(backend: str, dtype: torch.dtype) -> None:
    inputs = make(1, 5, 6, 4)
    data = {0, 1, 3, 4}  # x, delta, B, C come in half precision, A, D and the bias never do
    rounded = [t.to(dtype).double() if i in data else t for i, t in enumerate(inputs)]
    halves = [t.to(dtype) if i in data else t.float() for i, t in enumerate(rounded)]
    with torch.autocast(device(backend).type, torch.bfloat16):
        y = ss2d_scan(*(tensor.to(device(backend)) for tensor in halves), backend=backend)
    assert y.dtype == torch.float32
    truth = ss2d_scan(*rounded, backend="reference")
    assert float((y.cpu() - truth).abs().max() / truth.abs().max()) <= tolerances(backend)["y"]


@backends
def test_gradients_reach_half_inputs_under_autocast(backend: str) -> None:
    leaves = [tensor.to(device(backend), torch.bfloat16).requires_grad_() for tensor in make(1, 3, 3, 2)]
    with torch.autocast(device(backend).type, torch.bfloat16):
        ss2d_scan(*leaves, backend=backend).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.bfloat16 for leaf in leaves)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(
    ("unit", "directions"),
    [("vssblock_enc", [0, 1, 2, 3]), ("mc_ss2d", [0, 2, 4, 6]), ("mc_ss2d", [1, 3, 5, 7])],
)
def test_golden_scan(backend: str, unit: str, directions: list[int]) -> None:
    """What entered and left the scan of the published code, which works on four stacked, flipped sequences."""
    g = Golden("units")
    height, width, count = 7, 5, g[f"{unit}/scan_B"].shape[1]

    def pixels(name: str) -> Tensor:
        """[B, directions F, L] or [B, directions, F, L] in the order of the walks -> [B, H, W, 4, F]."""
        walked = g[f"{unit}/{name}"]
        walked = (walked.unflatten(1, (count, -1)) if walked.dim() == 3 else walked)[:, directions]
        rows = [walked[:, 0], walked[:, 2].flip(-1)]
        columns = [walked[:, 1], walked[:, 3].flip(-1)]
        by_row = [x.unflatten(-1, (height, width)) for x in rows]
        by_column = [x.unflatten(-1, (width, height)).transpose(-1, -2) for x in columns]
        return torch.stack([by_row[0], by_column[0], by_row[1], by_column[1]], 1).permute(0, 3, 4, 1, 2)

    x = pixels("scan_u")
    assert all(torch.equal(x[..., 0, :], x[..., k, :]) for k in range(4))
    parameters = {
        name: g[f"{unit}/{name}"].unflatten(0, (count, -1))[directions]
        for name in ("scan_A", "scan_D", "scan_delta_bias")
    }
    tensors = (
        x[..., 0, :],
        pixels("scan_delta"),
        parameters["scan_A"],
        pixels("scan_B"),
        pixels("scan_C"),
        parameters["scan_D"],
        parameters["scan_delta_bias"],
    )
    y = ss2d_scan(*(tensor.to(device(backend)) for tensor in tensors), backend=backend).cpu()
    g.check("scan_out", y, 2e-5, pixels("scan_out").sum(3))


def test_shapes_that_do_not_fit_are_named() -> None:
    inputs = make(1, 3, 3, 2)
    inputs[3] = inputs[3][..., :-1]
    with pytest.raises(ValueError, match=r"B \(1, 3, 3, 4, 15\), not \(1, 3, 3, 4, 16\)"):
        ss2d_scan(*inputs)
    with pytest.raises(ValueError, match=r"x must be \[B, H, W, D\]"):
        ss2d_scan(inputs[0][0], *inputs[1:])


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match="'cuda' does not exist; choose one of triton, mamba_ssm, cpp, torch, reference"
    ):
        resolve("cuda")


def test_the_choice_follows_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(None) in ("cpp", "torch")
    assert resolve(None, torch.device("cpu"), torch.float64) == "torch"
    assert resolve("reference", torch.device("cuda")) == "reference", "a name is taken at its word"
    for triton, mamba_ssm, chosen in ((True, True, "triton"), (False, True, "mamba_ssm"), (False, False, "torch")):
        monkeypatch.setattr(scan_triton, "available", lambda there=triton: there)
        monkeypatch.setattr(scan_mamba_ssm, "available", lambda there=mamba_ssm: there)
        assert resolve(None, torch.device("cuda")) == chosen
        assert resolve(None, torch.device("cuda"), torch.float64) == "torch"
        assert resolve(None) in ("cpp", "torch")
