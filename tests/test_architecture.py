"""The floors of the house: what may import what, and that asking for help costs nothing."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "configs": set(),
    "shards": {"configs"},
    "pipeline": {"configs", "shards"},
    "launchers": {"configs", "shards", "pipeline"},
}
STAGES = {"pretrain", "finetune", "evaluate", "predict", "export"}
ONLY = {
    "boto3": {"shards/s3.py"},
    "botocore": {"shards/s3.py", "shards/s3_errors.py"},
    "rasterio": {"shards/raster.py", "shards/tile.py", "shards/raster_io.py"},
    "submitit": {"launchers/slurm.py"},
    "deepspeed": {"pipeline/engine.py"},
    "huggingface_hub": {"pipeline/model/remote.py"},
    "terratorch": {"pipeline/adapters/terratorch.py"},
    "torchgeo": {"pipeline/adapters/torchgeo.py"},
}
ENVIRONMENT = {"pipeline/ranks.py", "shards/s3.py", "launchers/command.py"}
REMOTE = {"pipeline/model/remote.py"}  # where an s3:// address is given
PLAIN = ["pipeline", "shards", "shards.sensors", "shards.contract", "pipeline.model", "pipeline.model.config"]


def sources() -> list[Path]:
    return [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield f"{node.module}"
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_it_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    floor = name.split("/")[0]
    found = set(imports(path))
    top = {module.split(".")[0] for module in found}
    assert (top & set(FLOORS)) - {floor} <= FLOORS[floor]
    for library, allowed in ONLY.items():
        assert library not in top or name in allowed
    if floor in ("configs", "shards"):
        assert "torch" not in top
    if name.startswith("pipeline/model/"):
        ours = {
            module for module in found if module.split(".")[0] in FLOORS and not module.startswith("pipeline.model")
        }
        allowed = ("shards.sensors", "shards.contract", *(["shards.store"] if name in REMOTE else []))
        assert all(module.startswith(allowed) for module in ours)


def test_only_three_files_read_the_environment() -> None:
    reads = {
        path.relative_to(ROOT).as_posix() for path in sources() if re.search(r"os\.(environ|getenv)", path.read_text())
    }
    assert reads <= ENVIRONMENT


def test_stages_do_not_import_each_other() -> None:
    for stage in STAGES:
        found = {
            module.split(".")[1] for module in imports(ROOT / f"pipeline/{stage}.py") if module.startswith("pipeline.")
        }
        assert not found & (STAGES - {stage}), stage


@pytest.mark.parametrize("module", PLAIN)
def test_vocabulary_needs_the_standard_library_alone(module: str) -> None:
    code = f"import {module}, sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout)) - set(FLOORS)
    assert loaded - set(sys.stdlib_module_names) - {"__main__", "_distutils_hack"} == set()


def test_help_is_standard_library_only() -> None:
    code = "import sys; sys.argv = ['mcf', '--help']\n"
    code += "try:\n import launchers.command as c; c.main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'pydantic', 'numpy', 'yaml', 'rasterio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_other_distribution_owns_our_names() -> None:
    owners = packages_distributions()
    for floor in FLOORS:
        assert set(owners.get(floor, [])) <= {"mcf-mamba"}, f"{floor} is also in {owners[floor]}: uninstall it"


def test_house_rules_of_size() -> None:
    lengths = []
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path}: more than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(((node.end_lineno or 0) - node.lineno + 1, f"{path}:{node.lineno}"))
                if node.name == "__init__":
                    count = len(node.args.args) + len(node.args.kwonlyargs) - 1
                    assert count <= 6, f"{path}:{node.lineno}: constructor with {count} parameters"
    lengths.sort()
    assert lengths[-1][0] <= 80, lengths[-1]
    assert lengths[int(len(lengths) * 0.9)][0] <= 40
