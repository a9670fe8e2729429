"""The scan by mamba-ssm's kernel, with a stand-in; with the real one where there is CUDA (test_scan.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model import scan_mamba_ssm
from pipeline.model.scan import resolve, ss2d_scan
from tests.test_scan import compare, make, run

PATH = "mamba_ssm.ops.selective_scan_interface"


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    """What mamba-ssm 2.3 documents: u, delta [B, D, L], A [D, N], B and C [B, G, N, L], D and delta_bias [D].

    It asks what the kernel asks: one dtype, float32 parameters, sequences dense along L.
    """
    assert D is not None and delta_bias is not None and z is None and delta_softplus and not return_last_state
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    assert channels % groups == 0 and states <= 256
    assert (u.shape, delta.shape, A.shape) == ((batch, channels, length),) * 2 + ((channels, states),)
    assert B.shape == C.shape == (batch, groups, states, length) and D.shape == delta_bias.shape == (channels,)
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == D.dtype == delta_bias.dtype in (torch.float32, torch.float64)
    assert all(tensor.is_contiguous() for tensor in (u, delta, A, B, C, D, delta_bias))
    dt = F.softplus(delta + delta_bias[:, None])
    b, c = (tensor.repeat_interleave(channels // groups, 1) for tensor in (B, C))  # [B, D, N, L]
    h, out = u.new_zeros(batch, channels, states), []
    for i in range(length):
        h = torch.exp(dt[:, :, i, None] * A) * h + (dt * u)[:, :, i, None] * b[..., i]
        out.append((h * c[..., i]).sum(-1) + D * u[:, :, i])
    return torch.stack(out, -1)


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None) -> None:
    """Put a module in the library's place: None as if that of its kernels was missing."""
    for name in ("mamba_ssm", "mamba_ssm.ops", PATH):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    scan_mamba_ssm._kernel.cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType(PATH)
    module.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    install(monkeypatch, module)
    yield
    scan_mamba_ssm._kernel.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("shape", "states"), [((1, 5, 7, 3), 16), ((2, 3, 4, 6), 5), ((1, 1, 1, 1), 1), ((2, 1, 9, 4), 2)]
)
def test_as_the_reference(shape: tuple[int, int, int, int], states: int) -> None:
    inputs = make(*shape, states=states)
    compare(run(inputs, "mamba_ssm", torch.float32), run(inputs, "reference", torch.float64), y=5e-7, gradients=1e-6)


@pytest.mark.usefixtures("library")
def test_half_inputs_come_as_float32() -> None:
    inputs = [tensor.bfloat16() for tensor in make(1, 3, 4, 2)]
    y = ss2d_scan(*inputs, backend="mamba_ssm")
    assert y.dtype == torch.float32
    truth = ss2d_scan(*(tensor.double() for tensor in inputs), backend="reference")
    assert float((y - truth).abs().max() / truth.abs().max()) <= 5e-7


@pytest.mark.usefixtures("library")
def test_what_the_kernel_cannot_do() -> None:
    with pytest.raises(ValueError, match="at most 256 states, not 257; use 'torch'"):
        ss2d_scan(*(tensor.float() for tensor in make(1, 1, 1, 1, states=257)), backend="mamba_ssm")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    install(monkeypatch, None)
    inputs = [tensor.float() for tensor in make(1, 2, 2, 2)]
    with pytest.raises(RuntimeError, match=r"needs mamba-ssm and its kernels \(docs/install.md\); use 'triton'"):
        ss2d_scan(*inputs, backend="mamba_ssm")
    assert not caplog.records, "most have no such library, and need not hear of it"
    assert resolve(None, torch.device("cuda")) in ("triton", "torch")


def test_a_library_without_its_kernels_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it is where it was installed without CUDA: `import mamba_ssm` fails at `import selective_scan_cuda`."""

    def broken(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'selective_scan_cuda'", name="selective_scan_cuda")

    scan_mamba_ssm._kernel.cache_clear()
    monkeypatch.setattr(scan_mamba_ssm.importlib, "import_module", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not scan_mamba_ssm.available() and not scan_mamba_ssm.available()
    assert [record.getMessage() for record in caplog.records] == [
        "mamba-ssm is installed but cannot be imported, so another scan runs: No module named 'selective_scan_cuda'"
    ]
    scan_mamba_ssm._kernel.cache_clear()
