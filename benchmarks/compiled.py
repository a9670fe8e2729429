"""The Triton kernels of the scan, compiled ahead for A100 (sm_80) and H100/H200 (sm_90): no GPU is needed.

What a compiler says of a program is no speed; it says whether registers suffice and what the inner loops are made of.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

STATES = 16
ARCHITECTURES = (80, 90)
HALVES = {"x", "delta", "B", "C", "ddelta"}
SIZES = {"height", "width", "channels", "sections"}


def run() -> None:
    """One row for each kernel and architecture; bfloat16 inputs, 16 states."""
    print("\nThe scan's kernels, compiled ahead; bytes of registers spilled, instructions of the whole program")
    for architecture in ARCHITECTURES:
        for row in compiled(architecture):
            print("  " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def compiled(architecture: int) -> list[dict[str, Any]]:
    """What the compiler says of the forward and the backward kernel. In a process without Triton's interpreter."""
    return [_compiled(name, architecture) for name in ("forward", "backward")]


def _compiled(name: str, architecture: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.model import scan_triton, scan_triton_kernels

    kernel = getattr(scan_triton_kernels, name)
    fixed = scan_triton.constants(name, STATES, 2)
    names = kernel.arg_names
    types = {argument: _type(argument, argument in fixed) for argument in names}
    whole = [argument for argument in names if argument not in fixed and argument not in SIZES - {"channels"}]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(argument),): value for argument, value in fixed.items()},
        # as a launch finds them where D and N are multiples of 16: so are addresses and strides
        attrs={(names.index(argument),): [["tt.divisibility", 16]] for argument in whole},
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 1})
        seconds = time.perf_counter() - began
        (Path(folder) / "program").write_bytes(made.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", f"{folder}/program")
        program = _tool("nvdisasm", f"{folder}/program")
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)", program)
    count = collections.Counter(found)
    return {
        "kernel": name,
        "architecture": f"sm_{architecture}",
        "seconds to compile": round(seconds, 1),
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "instructions": sum(count.values()),
        "exponentials and other special functions": count["MUFU"],
        "shuffles": count["SHFL"],
        "atomics": count["ATOM"] + count["ATOMG"] + count["RED"],
    }


def _type(argument: str, constant: bool) -> str:
    if constant:
        return "constexpr"
    if argument in SIZES or re.fullmatch(r"(delta|B|C)_[bpk]", argument):
        return "i32"
    return "*bf16" if argument in HALVES else "*fp32"


def _tool(name: str, *arguments: str) -> str:
    """What one of the programs that come with Triton prints."""
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
