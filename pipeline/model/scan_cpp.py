"""The scan in C++ (scan_cpp.cpp, scan_simd.h): compiled at first use if the machine has a compiler, float32 on the CPU.

The shared library is kept in the user's cache folder under a hash of source and compiler, so that a machine compiles
it once. Letters as in scan.py; P = H W pixels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.model.scan import in_pixel_order

SOURCE = Path(__file__).with_suffix(".cpp")
HEADER = SOURCE.with_name("scan_simd.h")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
# By the processor's level as torch finds it at run time; others get what their architecture always has.
LEVELS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"),
}
COMPILE_SECONDS = 300
SERIAL = 1 << 20  # state updates below which starting threads costs more than it gives

log = logging.getLogger(__name__)


def available() -> bool:
    """Whether the library is there, compiling it if need be; if it cannot be, says so once in the log."""
    return _library() is not None


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this backend can run on the device and in the dtype: float32 on the CPU."""
    return device.type == "cpu" and dtype == torch.float32


def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """`pipeline.model.scan.ss2d_scan` in C++; once differentiable.

    Raises:
        ValueError: not float32 on the CPU.
        RuntimeError: there is no compiler, or it failed.
    """
    if not supports(x.device, x.dtype):
        raise ValueError(f"scan backend 'cpp' runs float32 on the CPU, not {x.dtype} on {x.device}; use 'torch'")
    result: Tensor = _Scan.apply(x, delta, A, B, C, D, delta_bias)  # type: ignore[no-untyped-call]
    return result


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("sample", "pixel", "direction")]


class _Problem(ctypes.Structure):
    """`Problem` of scan_cpp.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "states", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "delta", "power", "b", "c", "skip", "bias")),
        *((name, _Strides) for name in ("delta_at", "b_at", "c_at", "ddelta_at")),
        *((name, ctypes.c_void_p) for name in ("y", "kept", "dy")),
        *((name, ctypes.c_void_p) for name in ("dx", "ddelta", "dA", "db", "dc", "dskip", "dbias")),
    ]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        x, delta, A, B, C, D, delta_bias = tensors
        power = A.transpose(1, 2).mul(math.log2(math.e)).contiguous()  # [K, N, D]
        inputs = (x.contiguous(), *map(in_pixel_order, (delta, B, C)), power, D.contiguous(), delta_bias.contiguous())
        problem = _problem(*inputs)
        y = torch.empty_like(inputs[0])
        kept = x.new_empty(_compiled().scan_kept(ctypes.byref(problem)))
        problem.y, problem.kept = y.data_ptr(), kept.data_ptr()
        _compiled().scan_forward(ctypes.byref(problem))
        ctx.save_for_backward(*inputs, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        *inputs, kept = ctx.saved_tensors
        x, delta, B, _, power, D, _ = inputs
        dy = dy.contiguous()
        problem = _problem(*inputs)
        parts = (-(-x.shape[3] // _compiled().scan_group()), *B.shape)
        dx, ddelta = torch.empty_like(x), torch.empty_like(delta)  # the strides of delta, which may not be its own
        dA, dskip, dbias = (x.new_empty(x.shape[0], *shape) for shape in (power.shape, D.shape, D.shape))
        dB, dC = x.new_empty(parts), x.new_empty(parts)  # [groups, B, H, W, K, N]
        outputs = {"dx": dx, "ddelta": ddelta, "dA": dA, "db": dB, "dc": dC, "dskip": dskip, "dbias": dbias}
        for name, tensor in {"kept": kept, "dy": dy, **outputs}.items():
            setattr(problem, name, tensor.data_ptr())
        problem.ddelta_at = _strides(ddelta)
        _compiled().scan_backward(ctypes.byref(problem))
        return dx, ddelta, dA.sum(0).transpose(1, 2), dB.sum(0), dC.sum(0), dskip.sum(0), dbias.sum(0)


def _strides(tensor: Tensor) -> _Strides:
    return _Strides(tensor.stride(0), tensor.stride(2), tensor.stride(3))


def _problem(x: Tensor, delta: Tensor, B: Tensor, C: Tensor, power: Tensor, D: Tensor, bias: Tensor) -> _Problem:
    """What both passes need; the tensors must outlive the call."""
    batch, height, width, channels = x.shape
    threads = torch.get_num_threads() if x.numel() * power.shape[0] * power.shape[1] > SERIAL else 1
    problem = _Problem(batch, height, width, channels, power.shape[1], threads)
    inputs = {"x": x, "delta": delta, "power": power, "b": B, "c": C, "skip": D, "bias": bias}
    for name, tensor in inputs.items():
        setattr(problem, name, tensor.data_ptr())
    problem.delta_at, problem.b_at, problem.c_at = _strides(delta), _strides(B), _strides(C)
    return problem


def _compiled() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError(f"scan backend 'cpp' needs one of {', '.join(COMPILERS)} on PATH; use 'torch' without it")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Find or compile the shared library and load it; None, with a line in the log, if that is impossible."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        log.warning("no C++ compiler found (%s); the scan runs in torch, several times slower", ", ".join(COMPILERS))
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or "").strip() or str(error)
        log.warning("%s could not build the scan, it runs in torch: %s", compiler, reason.splitlines()[-1])
        return None
    library.scan_kept.restype = library.scan_group.restype = ctypes.c_int64
    for function in (library.scan_kept, library.scan_forward, library.scan_backward):
        function.argtypes = [ctypes.POINTER(_Problem)]
    library.scan_forward.restype = library.scan_backward.restype = None
    return library


def _build(compiler: str) -> Path:
    """Path of the library, compiled unless the cache has it; the file appears whole or not at all."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS).stdout
    flags = FLAGS + LEVELS.get(torch.backends.cpu.get_cpu_capability(), ())
    parts = [SOURCE.read_bytes(), HEADER.read_bytes(), version, " ".join(flags).encode()]
    target = _cache() / f"scan-{platform.machine()}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / target.name
            command = [compiler, *flags, str(SOURCE), "-o", str(part)]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=COMPILE_SECONDS)
            os.replace(part, target)
    return target


def _cache() -> Path:
    """The user's cache folder, or a private folder for this process where that cannot be written."""
    try:
        folder = Path.home() / ".cache" / "mcf-mamba"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return Path(tempfile.mkdtemp(prefix="mcf-mamba-"))
