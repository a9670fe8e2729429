"""How the C++ scan is built, cached, chosen and left out; its numbers are in test_scan.py."""

from __future__ import annotations

import ctypes
import logging
import stat
from pathlib import Path

import pytest
import torch

from pipeline.model import scan_cpp
from pipeline.model.config import ModelConfig
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.scan import available, in_pixel_order, resolve, ss2d_scan
from tests.test_scan import compare, make, run

compiled = pytest.mark.skipif(not available("cpp"), reason="no C++ compiler here")


def use(library: ctypes.CDLL | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cpp, "_library", lambda: library)


def test_without_a_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(scan_cpp.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        library = scan_cpp._library.__wrapped__()
    assert library is None
    assert len(caplog.records) == 1 and "no C++ compiler found (c++, g++, clang++)" in caplog.text
    use(library, monkeypatch)
    assert resolve(None) == "torch"
    assert MCFMamba(ModelConfig(size="nano"), {"s1": 2}, 3).scan_backend == "torch"
    with pytest.raises(RuntimeError, match="needs one of c\\+\\+, g\\+\\+, clang\\+\\+ on PATH"):
        ss2d_scan(*[tensor.float() for tensor in make(1, 2, 2, 2)], backend="cpp")


def fake_compiler(folder: Path, compile_: str) -> str:
    """A program that has a version and then does what the shell line says; its last argument is the output."""
    path = folder / "c++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\nfor out; do :; done\n{compile_}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("complaint", ["fatal error: no space left", ""])
def test_a_failing_compiler_is_reported_in_one_line(
    complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = fake_compiler(tmp_path, f'echo "some context" >&2; echo "{complaint}" >&2; exit 1')
    monkeypatch.setattr(scan_cpp.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(scan_cpp, "_cache", lambda: tmp_path)
    assert scan_cpp._library.__wrapped__() is None
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith(f"{compiler} could not build the scan") and "\n" not in message
    assert message.endswith(complaint or "some context")
    assert [path.name for path in tmp_path.iterdir()] == ["c++"], "nothing half-built is left"


def test_a_machine_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(scan_cpp, "_cache", lambda: tmp_path / "cache")
    compiler = fake_compiler(tmp_path, f'echo library > "$out"; echo compiled >> {tmp_path}/log')
    first = scan_cpp._build(compiler)
    assert scan_cpp._build(compiler) == first and first.read_text() == "library\n"
    assert (tmp_path / "log").read_text() == "compiled\n"
    assert list((tmp_path / "cache").iterdir()) == [first]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2 of another machine")
    monkeypatch.setitem(scan_cpp.LEVELS, "AVX2 of another machine", ("-mother",))
    assert scan_cpp._build(compiler) != first, "another processor on the same home, another library"


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache").write_text("a file where the folder should be")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(scan_cpp.tempfile, "tempdir", str(tmp_path))
    folder = scan_cpp._cache()
    assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) == 0o700


@compiled
@pytest.mark.parametrize("level", ["DEFAULT", "AVX2", "AVX512"])
def test_every_instruction_set(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in order or order.index(here) < order.index(level):
        pytest.skip(f"this processor is {here}, not {level}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    library = scan_cpp._library.__wrapped__()
    use(library, monkeypatch)
    for shape in ((2, 7, 5, 24, 16), (1, 6, 6, 100, 17), (1, 9, 4, 7, 1)):
        inputs = make(*shape)
        compare(run(inputs, "cpp", torch.float32), run(inputs, "reference", torch.float64), y=5e-7, gradients=1e-6)


@compiled
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs = make(2, 16, 16, 200)
    assert inputs[0].numel() * 4 * 16 > scan_cpp.SERIAL
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(inputs, "cpp", torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@compiled
def test_layouts_that_the_network_makes_are_read_in_place() -> None:
    """Slices of one projection and the product of a batched matrix multiplication need no copy; others get one."""
    parts = torch.randn(2, 3, 4, 4, 7)
    assert in_pixel_order(parts[..., 2:5]).data_ptr() == parts[..., 2:5].data_ptr()
    product = torch.einsum("bhwkr,kdr->bhwkd", parts[..., :2], torch.randn(4, 6, 2))
    assert in_pixel_order(product).data_ptr() == product.data_ptr()
    turned = parts.transpose(1, 2)
    assert in_pixel_order(turned).is_contiguous() and torch.equal(in_pixel_order(turned), turned)


@compiled
def test_float64_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'cpp' runs float32 on the CPU, not torch.float64"):
        ss2d_scan(*make(1, 2, 2, 2), backend="cpp")
