from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import configs
from launchers import command
from tests.scenes import make_archive, shards_config

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "launchers.command", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=cwd)


def readme_commands() -> list[str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [
        block for page in pages for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.S)
    ]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" #")[0].split(" | ")[0] for line in lines if line.startswith("mcf ")]


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_of_the_readme_and_docs_parses(line: str) -> None:
    parsed = command._parse(shlex.split(line)[1:])
    if hasattr(parsed, "config") and parsed.config in configs.presets():
        assert configs.stage_of(parsed.config) == getattr(parsed, "stage", "shards")


def test_the_readme_has_commands() -> None:
    assert len(readme_commands()) >= 6


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "evaluate", "shards build"])
def test_help_of_a_stage_names_its_fields(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([*stage.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    name = stage.split()[0]
    for field in set(configs.config_class(name).__dataclass_fields__) - {"stage"}:
        assert field in text


def test_shards_commands_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_archive(tmp_path / "archive")
    config = tmp_path / "config.yaml"
    config.write_text(configs.dump(shards_config(tmp_path / "archive", tmp_path / "data")))
    assert command.main(["shards", "build", str(config), "--dry-run"]) == 0
    assert "27 tiles in 6 shards" in capsys.readouterr().out and not (tmp_path / "data").exists()
    assert command.main(["shards", "build", str(config)]) == 0
    assert "27 samples (18 of split 'train', 9 of split 'test') in 6 shards" in capsys.readouterr().out
    assert command.main(["shards", "verify", str(tmp_path / "data")]) == 0
    assert command.main(["shards", "stats", str(tmp_path / "data")]) == 0
    assert re.search(r"s1 +VV +dB +27,648", capsys.readouterr().out)
    assert command.main(["shards", "order", str(tmp_path / "data"), "global_batch=2", "steps=2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    (tmp_path / "data/shard-000001.tar").write_bytes(b"")
    assert command.main(["shards", "verify", str(tmp_path / "data")]) == 1
    assert "shard-000001.tar: sha256 differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "demo-pretrain", "optim.lrr=1"], "mcf: optim.lrr: unknown key; did you mean 'lr'"),
        (["pretrain", "demo-shards"], "mcf: demo-shards: a config of stage 'shards'; this command runs 'pretrain'"),
        (["finetune", "nothing"], "mcf: nothing: neither a file nor a preset"),
        (["shards", "verify", "nowhere"], "mcf: nowhere: not a dataset"),
        (["predict", "nowhere", "--scene", "s1", "--out", "m.tif"], "mcf: --scene 's1': write SENSOR=PATH"),
    ],
)
def test_mistakes_end_with_one_line_and_code_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and len(done.stderr.strip().splitlines()) == 1


def test_settings_may_stand_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = command._parse(["shards", "show", "data", "split=train", "--samples", "3", "group=a", "labelled=true"])
    assert (parsed.data, parsed.samples) == ("data", 3)
    assert parsed.settings == ["split=train", "group=a", "labelled=true"]
    parsed = command._parse(["predict", "run", "--scene", "s1=a.tif", "--out", "m.tif", "window=64"])
    assert parsed.overrides == ["window=64"]
    for wrong in (["shards", "show", "data", "--colour=3"], ["shards", "verify", "data", "split=train"]):
        with pytest.raises(SystemExit) as ended:
            command._parse(wrong)
        assert ended.value.code == 2
    assert "unrecognized arguments: split=train" in capsys.readouterr().err


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "_verify", lambda parsed: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main(["shards", "verify", str(tmp_path)])
