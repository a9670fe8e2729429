from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from pipeline.model import MCFMamba, ModelConfig, save

ROOT = Path(__file__).resolve().parents[1]
OPEN = """
import json, sys
from importlib.util import find_spec
import torch
from pipeline.model import MCFMamba
torch.set_num_threads(1)
model = MCFMamba.from_pretrained(sys.argv[1], scan="torch")
from pipeline.model.release import ReleaseError
problems = []
for address in ("s3://bucket/release", "org/name"):
    try:
        MCFMamba.from_pretrained(address)
    except ReleaseError as error:
        problems.append(str(error))
with torch.no_grad():
    logits = model({"s1": torch.ones(1, 2, 32, 32)}).flatten().tolist()
ours = [name for name in sys.modules if name.split(".")[0] in ("configs", "shards", "pipeline", "launchers")]
absent = [name for name in json.loads(sys.argv[2]) if find_spec(name) is None]
print(json.dumps({"logits": logits, "ours": ours, "absent": absent, "problems": problems}))
"""
# What the rest of the project needs, and a release does not.
UNNEEDED = ["deepspeed", "mamba_ssm", "rasterio", "pydantic", "pyarrow", "yaml", "boto3", "crc32c", "huggingface_hub"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("mcf_mamba-*.whl")
    return wheel


def bare(folder: Path, wheel: Path, wanted: list[str]) -> Path:
    """The Python of a virtual environment that holds the wheel, some distributions and what they require: no more.

    Their files are linked, not copied: torch alone is a gigabyte.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    names, known = list(wanted), set()
    while names:
        name = names.pop().lower()
        if name in known:
            continue
        known.add(name)
        found = metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
        required = map(Requirement, found.requires or ())
        names += [each.name for each in required if not each.marker or each.marker.evaluate({"extra": ""})]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return folder / "bin" / "python"


def test_a_release_opens_in_an_environment_of_torch_and_safetensors_alone(wheel: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1), d_state=2), {"s1": 2}, 1, "torch").eval()
    release = save(tmp_path / "release", model, {"format_version": 1}, "")
    python = bare(tmp_path / "venv", wheel, ["torch", "safetensors"])
    command = [str(python), "-I", "-c", OPEN, str(release), json.dumps(UNNEEDED)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["absent"] == UNNEEDED
    outside = {name for name in found["ours"] if name != "pipeline" and not name.startswith("pipeline.model")}
    assert outside <= {"shards", "shards.sensors", "shards.contract", "shards.store"}, "store: for the s3:// address"
    assert "pip install boto3" in found["problems"][0] and "pip install huggingface_hub" in found["problems"][1]
    with torch.no_grad():
        wanted = model({"s1": torch.ones(1, 2, 32, 32)}).flatten()
    assert torch.allclose(torch.tensor(found["logits"]), wanted, atol=1e-6)


def test_the_wheel_works_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"configs", "shards", "pipeline", "launchers", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    for floor in ("configs", "shards", "pipeline", "launchers"):
        assert f"{floor}/py.typed" in names
    code = (
        "import configs, shards.report, launchers.command as command\n"
        "print(configs.__file__)\n"
        "[configs.load(name) for name in configs.presets()]\n"
        "from pathlib import Path\n"
        "shards.report.write_report(Path('r.html'), [shards.report.Text('a', 'b')])\n"
        "command.main(['shards', 'verify', 'nowhere'])\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site" / "configs"))
    assert "nowhere: not a dataset" in done.stderr and (tmp_path / "r.html").exists()
