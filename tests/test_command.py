from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import configs
from launchers import command, shards_command
from tests.scenes import make_archive, shards_config, write_catalog, write_scene
from tests.small_dataset import write_dataset

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


def test_a_build_ends_with_a_table_of_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_archive(tmp_path / "archive")
    values = np.full((2, 96, 96), -12, np.float32)
    values[:, :, :40] = np.nan
    write_scene(tmp_path / "archive/place0/s1.tif", "s1", values=values)
    config = tmp_path / "config.yaml"
    config.write_text(configs.dump(shards_config(tmp_path / "archive", tmp_path / "data")))
    assert command.main(["shards", "build", str(config), "part=1/2"]) == 0
    assert table_of(capsys)["shards written"] == "3"
    assert command.main(["shards", "build", str(config)]) == 0
    told = table_of(capsys)
    assert told["tiles written"] == "11" and told["shards written"] == "3 (3 more were finished before)"
    assert told["tiles left out"] == told["valid fraction of s1 under 0.5"] == "1"
    assert float(told["MB written"]) == pytest.approx(
        sum(size_of(tmp_path / "data", i) for i in (1, 3, 5)) / 1e6, abs=0.1
    )
    assert all(float(told[name]) > 0 for name in ("seconds of building", "tiles/s", "MB/s"))
    assert told["retries"] == told["files skipped"] == "0"


def table_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = [re.split(" {2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def size_of(data: Path, shard: int) -> int:
    return (data / f"shard-{shard:06d}.tar").stat().st_size


@pytest.mark.parametrize("fault", ["when it is opened", "when it is read"])
def test_a_build_that_skipped_files_is_finished_named_and_not_called_a_success(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> SimpleNamespace:
        return SimpleNamespace(code=command.main(arguments), **capsys.readouterr()._asdict())

    make_archive(tmp_path / "archive")
    damaged = tmp_path / "archive/place1/s1.tif"
    damaged.write_bytes(b"" if fault == "when it is opened" else damaged.read_bytes()[:20_000])
    config = tmp_path / "config.yaml"
    config.write_text(configs.dump(shards_config(tmp_path / "archive", tmp_path / "data", "on_error=skip")))
    for _ in ("built", "found finished"):
        done = run("shards", "build", str(config))
        assert done.code == 1 and re.search(r"^files skipped +1$", done.out, re.M)
        assert "data: 18 samples" in done.out and f"skipped: {damaged}" in done.out
        assert done.err.endswith(
            "mcf: finished, but 1 files were skipped (on_error=skip); they are named above and in dataset.json\n"
        )
    parts = [run("shards", "build", str(config), f"part={part}/2", f"out={tmp_path / 'parts'}") for part in (1, 2)]
    assert 1 in [done.code for done in parts]
    assert all((done.code == 1) == (f"skipped: {damaged}" in done.out) for done in parts)
    merged = run("shards", "merge", str(config), f"out={tmp_path / 'parts'}")
    assert merged.code == 1 and f"skipped: {damaged}" in merged.out
    (tmp_path / "later").mkdir()
    write_catalog(
        tmp_path / "later", [row | {"place": f"{row['place']}-b"} for row in make_archive(tmp_path / "later", 1)]
    )
    later = run("shards", "build", str(config), f"archive.root={tmp_path / 'later'}", "name=later")
    assert later.code == 0 and "27 samples" in later.out and f"skipped: {damaged}" in later.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "demo-pretrain", "optim.lrr=1"], "mcf: optim.lrr: unknown key; did you mean 'lr'"),
        (["pretrain", "demo-shards"], "mcf: demo-shards: a config of stage 'shards'; this command runs 'pretrain'"),
        (["finetune", "nothing"], "mcf: nothing: neither a file nor a preset"),
        (["shards", "verify", "nowhere"], "mcf: nowhere: not a dataset"),
        (
            ["pretrain", "demo-pretrain", "--resume-check", "--on", "slurm"],
            "mcf: --on slurm given; --resume-check runs",
        ),
        (["finetune", "demo-finetune", "steps=3", "--resume-check"], "mcf: steps: 3 given; --resume-check needs"),
        (["pretrain", "demo-pretrain", "--resume-check", "--profile"], "mcf: --profile and --resume-check given"),
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


def test_a_resume_check_is_for_what_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("pretrain", "finetune"):
        assert command.main([stage, f"demo-{stage}", "run=mine", "--resume-check", "--dry-run"]) == 0
        assert "run: mine-resume-check/killed\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as ended:
        command.main(["evaluate", "evaluate", "--resume-check"])
    assert ended.value.code == 2


def test_a_profile_is_a_short_run_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old, begun = tmp_path / "mine-profile/old.txt", []
    old.parent.mkdir()
    old.write_text("")
    for stage in ("pretrain", "finetune"):
        for where in ("here", "local", "slurm"):
            assert command.main([stage, f"demo-{stage}", "run=mine", "--profile", "--on", where, "--dry-run"]) == 0
            told = capsys.readouterr().out
            assert "run: mine-profile\n" in told and "steps: 8\n" in told
            assert ("#SBATCH" in told) == (where == "slurm")
    monkeypatch.setattr("launchers.local.run", lambda config, processes, logs: begun.append((config, logs)) or 0)
    monkeypatch.setattr("launchers.slurm.submit", lambda config, where, logs: begun.append((config, logs)) or "17")
    monkeypatch.setattr(command, "_plan", lambda *_: "a plan")
    line = ["pretrain", "demo-pretrain", "run=mine", "--profile", "--on"]
    assert command.main([*line, "local"]) == 1 and old.exists() and begun == []
    assert "mine-profile is in the way and holds no run" in capsys.readouterr().err
    (old.parent / "config.yaml").write_text("")
    assert command.main([*line, "local"]) == 0 and not old.exists()
    assert capsys.readouterr().out == "where a step goes: mine-profile/profile/summary.html\n"
    assert command.main([*line, "slurm"]) == 0
    told = capsys.readouterr().out
    assert told == "17\nwhen the job is done, where a step goes: mine-profile/profile/summary.html\n"
    assert [(config.run, config.profile, str(logs)) for config, logs in begun] == 2 * [
        ("mine-profile", 5, "mine-profile/logs")
    ]
    with pytest.raises(SystemExit):
        command.main(["evaluate", "evaluate", "--profile"])


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards_command, "_verify", lambda parsed: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main(["shards", "verify", str(tmp_path)])


def test_a_dry_run_shows_the_plan_and_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data")
    words = ["pretrain", "demo-pretrain", f"run={tmp_path / 'run'}", f"data={data}", "sensors=[s1]", "where={}"]
    words += ["--on", "slurm", "--step-seconds", "2", "--dry-run"]
    assert command.main([*words, "batch.global_batch=8"]) == 0
    said = capsys.readouterr().out
    assert "global batch  8 = 4 ranks x 2 a micro-batch x 1 accumulated" in said
    assert said.index("stage: pretrain") < said.index("global batch  ") < said.index("#SBATCH --nodes=1")
    assert command.main(words) == 0, "16 samples are a batch"
    assert command.main([*words, "batch.global_batch=20"]) == 1
    assert "this run cannot be: batch.global_batch=20: the selection has 16 samples" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_is_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launchers import slurm

    monkeypatch.setattr(slurm, "submit", lambda *_: pytest.fail("it was submitted"))
    data = write_dataset(tmp_path / "data")
    words = ["pretrain", "demo-pretrain", f"run={tmp_path / 'run'}", f"data={data}", "sensors=[s1]", "where={}"]
    assert command.main([*words, "batch.global_batch=20", "--on", "slurm"]) == 1


def test_doctor_tells_what_to_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launchers.doctor.deepspeed", lambda: (True, "imported in tests/test_doctor.py"))
    data = write_dataset(tmp_path / "data")
    words = ["doctor", "demo-pretrain", f"data={data}", "sensors=[s1]"]
    command.main([*words, f"run={tmp_path / 'run'}"])
    assert re.search(r"^ok +\S+ +store +.*data can be read", capsys.readouterr().out, re.MULTILINE)
    (tmp_path / "file").write_text("")
    assert command.main([*words, f"run={tmp_path / 'file' / 'run'}"]) == 1
    assert re.search(r"^NOT OK +\S+ +store +.*is a file where a folder must be", capsys.readouterr().out, re.MULTILINE)


def test_jobs_are_looked_at_and_handled_by_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launchers import jobs

    for name in ("logs", "cancel", "requeue"):
        monkeypatch.setattr(jobs, name, lambda run, name=name: f"{name} of {run}")
        assert command.main(["jobs", name, "runs/a"]) == 0
        assert capsys.readouterr().out == f"{name} of runs/a\n"
    monkeypatch.setattr(jobs, "table", lambda: "all")
    monkeypatch.setattr(jobs, "follow", lambda run: print(f"follows {run}"))
    assert command.main(["jobs"]) == command.main(["jobs", "logs", "runs/a", "--follow"]) == 0
    assert capsys.readouterr().out == "all\nfollows runs/a\n"
