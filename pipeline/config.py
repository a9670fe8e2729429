"""What the stages can be told: one class per stage, checked when it is built. Imports no torch.

The classes are read, overridden and written by `configs`; a field's description is its help on the command line.
Two rules span several fields and live here too: how a global batch is split, and which DeepSpeed keys are ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_validator
from pydantic.dataclasses import dataclass

from configs import ConfigError
from pipeline.model.config import ModelConfig
from shards.contract import Normalisation
from shards.order import LANES
from shards.reading import Reading

STRICT = ConfigDict(extra="forbid")

Where = dict[str, list[Any]]

# DeepSpeed keys that a field of ours decides, and that field.
OWNED = {
    "train_batch_size": "batch.global_batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.micro_batch (accumulation follows from it)",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "zero_optimization.stage": "engine.zero",
    "zero_force_ds_cpu_optimizer": "engine.offload",
}

# Top-level keys of DeepSpeed 0.19's JSON that are not ours and mean something to a run of ours.
DEEPSPEED = (
    "activation_checkpointing",
    "aio",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "graph_harvesting",
    "memory_breakdown",
    "prescale_gradients",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_optimization",
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CMSS:
    """Complementary masking for self-supervised pretraining: what is hidden and how it is weighed."""

    ratio: float = Field(default=0.5, gt=0, lt=1, description="share of the blocks hidden in the first modality")
    block: int = Field(default=32, ge=4, multiple_of=4, description="side of a block in pixels")
    strategy: Literal["complementary", "independent"] = Field(
        default="complementary", description="hide in one what the other shows, or each on its own"
    )
    target: Literal["contract", "block"] = Field(
        default="contract",
        description="what is reconstructed: the normalised image, or each block normalised by itself",
    )
    weights: dict[str, float] = Field(default_factory=dict, description="weight of a modality's loss; 1 where absent")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optim:
    """AdamW and its learning rate as a function of the samples seen."""

    lr: float = Field(default=1e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="decay of the two moments")
    weight_decay: float = Field(default=0.05, ge=0, description="decoupled decay; never on norms, biases, A and D")
    schedule: Literal["poly", "cosine"] = Field(default="poly", description="fall to 0 after warm-up (poly: power 0.9)")
    warmup_samples: int = Field(default=0, ge=0, description="samples over which the rate rises from 0")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 = no clipping")
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay per step of an average of the parameters, used later; 0 = none"
    )
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor of the rate from each layer to the one before it; 1 = one rate"
    )
    head_lr: float | None = Field(default=None, gt=0, description="peak learning rate of the head; null = lr")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchSize:
    """The only rule: ranks x micro_batch x accumulation = global_batch. Accumulation is derived."""

    global_batch: int = Field(default=32, ge=1, description="samples per step over all ranks")
    micro_batch: int | None = Field(default=None, ge=1, description="samples per forward; null = no accumulation")

    def split(self, ranks: int) -> tuple[int, int]:
        """(micro_batch, accumulation) on this many ranks.

        Raises:
            ConfigError: the global batch cannot be cut that way.
        """
        share, rest = divmod(self.global_batch, ranks)
        micro = self.micro_batch or share
        if rest or micro < 1 or share % micro:
            fitting = [n for n in range(1, share + 1) if share % n == 0]
            advice = (
                f"write batch.micro_batch as one of {fitting}"
                if not rest
                else (f"write batch.global_batch as a multiple of {ranks}, or start another number of ranks")
            )
            raise ConfigError(
                f"batch.global_batch={self.global_batch} cannot be split over {ranks} ranks x "
                f"batch.micro_batch={self.micro_batch} x a whole accumulation; {advice}"
            )
        return micro, share // micro


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineConfig:
    """How DeepSpeed holds and computes the model."""

    zero: Literal[0, 1, 2, 3] = Field(default=1, description="ZeRO stage: what is partitioned over the ranks")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of matrix products; parameters and moments are always fp32 (fp16: CUDA only)"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="what waits in the CPU's memory: moments (ZeRO 1 to 3), parameters too (ZeRO 3)"
    )
    recompute: bool = Field(
        default=False, description="activation checkpointing: less memory for about a third more computation"
    )
    scan: Literal["reference", "torch", "cpp", "mamba_ssm", "triton"] | None = Field(
        default=None, description="backend of the selective scan; null = the fastest that works here"
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="further DeepSpeed JSON keys, as they are")

    @field_validator("deepspeed")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse keys that would contradict a field of ours."""
        zero = value.get("zero_optimization", {})
        given = set(value) | ({f"zero_optimization.{key}" for key in zero} if isinstance(zero, Mapping) else set())
        if taken := sorted(given & set(OWNED)):
            raise ValueError("; ".join(f"{key} is decided by {OWNED[key]}" for key in taken))
        if unknown := sorted(set(value) - set(DEEPSPEED)):
            close = difflib.get_close_matches(unknown[0], DEEPSPEED, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it knows {', '.join(DEEPSPEED)}"
            raise ValueError(f"{unknown[0]!r} is no key of DeepSpeed, which would pass over it in silence{hint}")
        return value

    @model_validator(mode="after")
    def _offload_is_possible(self) -> Any:
        """Refuse to move what the ZeRO stage leaves in one piece."""
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero < least:
            raise ValueError(f"offload={self.offload} needs zero={least} or more, zero={self.zero} given")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Guard:
    """What a run does about steps that go wrong, and about starts that lead nowhere."""

    spike: float = Field(
        default=10.0, ge=0, description="a loss above so many times the median of the last 64 is passed over; 0 = never"
    )
    skips: int = Field(default=5, ge=1, description="steps passed over in a row, after which the run is rolled back")
    hang_s: float = Field(
        default=600.0,
        ge=0,
        description="seconds without a step, after which a rank dumps its stacks and ends; 0 = never",
    )
    starts: int = Field(
        default=5, ge=0, description="starts that reach no new checkpoint, then the run stays down; 0 = any number"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Probe:
    """A linear classifier on the frozen features of a pretraining run: how good they are, while it goes."""

    data: str | None = Field(default=None, description="small labelled dataset, local or s3://; null = no probe")
    every: int = Field(default=1000, ge=1, description="steps between probes; the last is always made")
    train_where: Where = Field(
        default_factory=lambda: {"split": ["train"]}, description="{column: allowed values} of the samples to fit on"
    )
    test_where: Where = Field(
        default_factory=lambda: {"split": ["val"]}, description="{column: allowed values} of the samples to score"
    )
    limit: int = Field(default=64, ge=1, description="samples of each of the two, chosen by the seed of the run")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProtocolChoice:
    """Which samples train, validate and test, by a named rule; without a name the `where` fields decide."""

    name: str = Field(default="", description="protocol, such as dfc2020/paper-random; empty = none")
    fold: int = Field(default=0, ge=0, description="of a protocol with folds: which one is the test set")
    lists: str = Field(
        default="", description="of a protocol with id lists: the folder that holds train.txt, val.txt and test.txt"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Training:
    """What pretraining and finetuning have in common."""

    run: str = Field(description="local run folder; an unfinished run of the same config goes on")
    data: str | dict[str, PositiveInt] = Field(
        description="dataset: a folder that holds manifest.parquet, local or s3://; or {dataset: weight, ...} to mix"
    )
    sensors: tuple[str, ...] = Field(default=(), description="modalities to use; empty = all")
    where: Where = Field(default_factory=dict, description="{column: allowed values} of the manifest")
    model: ModelConfig = Field(default_factory=ModelConfig, description="size and variant of MCF-Mamba")
    optim: Optim = Field(default_factory=Optim, description="optimiser and schedule")
    batch: BatchSize = Field(default_factory=BatchSize, description="batch sizes")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="DeepSpeed")
    stream: Literal["continue", "restart"] = Field(
        default="continue", description="restart: go on although the dataset has changed, in its new order"
    )
    steps: int = Field(ge=1, description="optimiser steps of the whole run")
    seed: int = Field(default=0, description="of weights, order, masks, augmentation and drop path")
    lanes: int = Field(default=LANES, ge=1, description="stretches of the data read side by side")
    reading: Reading = Field(default_factory=Reading, description="threads, memory and cache of reading")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints; the last is always saved")
    keep: int = Field(default=3, ge=1, description="newest checkpoints that are kept")
    keep_every: int = Field(default=0, ge=0, description="checkpoints at multiples of this step are kept too; 0 = none")
    keep_best: str = Field(
        default="",
        description="metric whose best step is kept too, such as val/mIoU (of losses, the lowest); empty = none",
    )
    patience: int = Field(
        default=0, ge=0, description="values of keep_best without a better one, after which the run ends; 0 = never"
    )
    store: str = Field(
        default="", description="folder or s3:// prefix for checkpoints and what resuming needs; empty = run"
    )
    guard: Guard = Field(default_factory=Guard, description="steps that go wrong, hangs and starts that lead nowhere")
    track: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=("tensorboard",),
        description="where numbers go beside metrics.jsonl (wandb needs the extra of that name)",
    )
    profile: int = Field(default=0, ge=0, description="steps to profile, after three to warm up; 0 = none")
    modality_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the samples of which one modality is hidden everywhere"
    )
    normalise: Normalisation = Field(
        default="statistics",
        description="by statistics or by clip range (the paper's); a start keeps its own",
    )
    force: bool = Field(
        default=False, description="begin from a checkpoint that the data do not fit; every checkpoint then says so"
    )
    augment: Literal["none", "mirror", "all"] = Field(
        default="all", description="all: flips and quarter turns; mirror: left-right alone, for side-looking radar"
    )
    crop: int | None = Field(default=None, ge=32, description="side of a crop taken of every sample; null = all of it")

    @model_validator(mode="after")
    def _patience_has_a_metric(self) -> Any:
        """Refuse to wait for nothing."""
        if self.patience and not self.keep_best:
            raise ValueError(f"patience={self.patience} needs the metric to watch; write keep_best=METRIC")
        return self

    @field_validator("run")
    @classmethod
    def _run_is_local(cls, value: str) -> str:
        """Refuse an address for what is appended to at every step."""
        if "://" in value:
            raise ValueError(f"{value!r} is not a local folder; write run=FOLDER store={value}")
        return value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainConfig(Training):
    """`mcf pretrain`: CMSS pretraining of MCF-Mamba."""

    stage: Literal["pretrain"] = "pretrain"
    cmss: CMSS = Field(default_factory=CMSS, description="masking and loss")
    start: str | None = Field(default=None, description="run, checkpoint or release to take parameters from")
    pictures_every: int = Field(default=0, ge=0, description="steps between reconstruction pictures; 0 = at the end")
    probe: Probe = Field(default_factory=Probe, description="linear probe on labelled samples")
