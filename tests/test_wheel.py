from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_works_outside_of_the_checkout(tmp_path: Path) -> None:
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
