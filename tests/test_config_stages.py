from __future__ import annotations

import subprocess
import sys

import pytest

import configs
from configs import ConfigError
from pipeline.config import PretrainConfig
from pipeline.finetune_config import FinetuneConfig

PRESETS = [
    "demo-pretrain",
    "demo-finetune",
    "pretrain-tiny",
    "pretrain-small",
    "pretrain-base",
    "finetune-dfc2020",
    "finetune-msaw",
    "finetune-hunan",
]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_of_their_stage_and_round_trip(name: str) -> None:
    config = configs.load(name)
    assert type(config) is (FinetuneConfig if "finetune" in name else PretrainConfig)
    assert configs.parse(configs.to_dict(config)) == config


def test_overrides_reach_every_group() -> None:
    given = [
        "model.dims=[8,16]",
        "model.depths=[1,1]",
        "optim.betas=[0.9,0.95]",
        "cmss.weights.s1=2",
        "where.group=[a]",
    ]
    config = configs.load("demo-pretrain", given)
    assert config.model.stage_dims == (8, 16)
    assert config.optim.betas == (0.9, 0.95)
    assert config.cmss.weights == {"s1": 2.0}
    assert config.where["group"] == ["a"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch.micro_bach=2", ["batch.micro_bach: unknown key", "did you mean 'micro_batch'"]),
        ("model.sise=tiny", ["model.sise", "did you mean 'size'"]),
        ("engine.zero=4", ["engine.zero: 4 given", "0, 1, 2 or 3"]),
        ("engine.precision=fp8", ["engine.precision: 'fp8' given", "'fp32', 'bf16' or 'fp16'"]),
        ("engine.deepspeed.optimizer.type=Lion", ["engine.deepspeed", "optimizer is decided by optim"]),
        ("cmss.ratio=1", ["cmss.ratio: 1 given", "less than 1"]),
        ("model.dims=[8,16]", ["model", "4 stages, but dims has 2"]),
        ("steps=0", ["steps: 0 given"]),
        ("normalise=none", ["normalise: 'none' given", "'range' or 'statistics'"]),
    ],
)
def test_mistakes_are_one_line_with_what_is_allowed(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load("demo-pretrain", [override])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_configs_import_no_torch() -> None:
    code = "import pipeline.config, sys; assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
