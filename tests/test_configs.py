from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import configs
from configs import ConfigError


@pytest.mark.parametrize("name", configs.presets())
def test_every_preset_loads_and_round_trips(name: str) -> None:
    config = configs.load(name)
    assert configs.parse(configs.to_dict(config)) == config


def test_dump_can_be_loaded_again(tmp_path: Path) -> None:
    config = configs.load("demo-shards", ["tile.size=96", "sensors=[s1, dem]"])
    (tmp_path / "config.yaml").write_text(configs.dump(config))
    assert configs.load(tmp_path / "config.yaml") == config
    assert config.tile.size == 96
    assert config.sensors == ("s1", "dem")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tile.sise=3", ["tile.sise: unknown key", "did you mean 'size'", "min_valid"]),
        ("tile.size=4", ["tile.size: 4 given", "32"]),
        ("archve.root=a", ["archve: unknown key", "did you mean 'archive'"]),
        ("on_error=ignore", ["on_error: 'ignore' given", "'fail' or 'skip'"]),
        ("sensors=[s3]", ["unknown sensors ['s3']", "s2-l1c"]),
        ("label.names=[a]", ["1 class names but 8 colours"]),
        ("part=3/2", ["part 3/2"]),
        ("tile.stride=999", ["tile.stride 999"]),
        ("tile", ["write key.path=value"]),
        ("archive.pattern={place}/{sensor}.tif", ["not a YAML value", "archive.pattern='{place}/{sensor}.tif'"]),
        ("archive.licence=", ["archive.licence: None given", "archive.licence=''"]),
        ("out.x=1", ["out is 'demo/data', not a group"]),
    ],
)
def test_mistakes_are_one_line_with_the_path_and_what_is_allowed(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load("demo-shards", [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load("demo-shards", ["tile.sise=3", "on_error=ignore"])
    assert len(str(caught.value).splitlines()) == 2


def test_unknown_preset_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'demo-shards'.*predict"):
        configs.load("demo-shard")


def test_an_existing_path_wins_over_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = configs.dump(configs.load("predict", ["out=mine.tif"]))
    (tmp_path / "predict").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert configs.load("predict").out == "mine.tif"


def test_unknown_stage_and_broken_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("stage: cook")
    with pytest.raises(ConfigError, match="'cook' given; allowed: shards"):
        configs.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        configs.load(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="a mapping"):
        configs.load(tmp_path / "c.yaml")


def test_differences_are_dotted_paths() -> None:
    a, b = configs.load("demo-shards"), configs.load("demo-shards", ["tile.size=96", "label=null"])
    found = configs.differences(a, b)
    assert found["tile.size"] == (64, 96)
    assert "label.names" in found


@pytest.mark.parametrize("stage", sorted(configs.STAGES))
def test_help_names_the_fields_without_torch(stage: str) -> None:
    code = f"import sys, configs; print(configs.describe({stage!r})); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    names = {line.split()[0].split(".")[0] for line in result.stdout.splitlines()}
    assert names == set(configs.config_class(stage).__dataclass_fields__) - {"stage"}
