"""Config of where a job runs on Slurm. Imports neither torch nor submitit."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")
# A value becomes part of a line of the batch script; a blank or a line break in it would begin something else.
Word = Annotated[str, Field(pattern=r"^\S+$")]
Line = Annotated[str, Field(pattern=r"^[^\n\r\"]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SECRET = re.compile(r"secret|token|passw|credential|(access|api|private)_?key", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SlurmConfig:
    """What to ask Slurm for. One task is one rank."""

    stage: Literal["slurm"] = "slurm"
    nodes: int = Field(default=1, ge=1, description="number of nodes")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs, and so ranks, on every node; 0 = CPU only")
    tasks_per_node: int | None = Field(
        default=None, ge=1, description="ranks on every node; null = one per GPU, or one without GPUs"
    )
    cpus_per_task: int = Field(default=1, ge=1, description="cores for every rank")
    mem_gb: float | None = Field(default=None, gt=0, description="GB per node; null = the cluster's default")
    time_min: int = Field(default=60, ge=1, description="time limit in minutes")
    partition: Word | None = Field(default=None, description="partition; null = the cluster's default")
    account: Word | None = Field(default=None, description="account to charge; null = the user's default")
    qos: Word | None = Field(default=None, description="quality of service; null = the user's default")
    constraint: Word | None = Field(default=None, description="features that nodes must have, such as a100|h100")
    exclude: Word | None = Field(default=None, description="nodes not to use, such as node[3-4]")
    reservation: Word | None = Field(default=None, description="reservation to run in")
    nice: int | None = Field(default=None, ge=0, description="how far to stand back behind one's own other jobs")
    comment: Line | None = Field(default=None, description="text for the accounting")
    container: Word | None = Field(
        default=None, description="Apptainer image (a file that all nodes see) in which the ranks run; null = none"
    )
    environment: dict[Name, Line] = Field(
        default_factory=dict,
        description="{NAME: value} to set for the ranks; never secrets, since the script is a file",
    )
    signal_delay_s: int = Field(
        default=90, ge=1, le=65535, description="seconds before the time limit to save and requeue"
    )
    max_requeues: int = Field(default=20, ge=0, description="how often a job may go on after its limit")
    setup: tuple[str, ...] = Field(default=(), description="shell lines to run before the job")

    @model_validator(mode="after")
    def _no_secrets(self) -> Any:
        """Refuse what would stand in the batch script for others to read."""
        if found := [name for name in self.environment if SECRET.search(name)]:
            raise ValueError(
                f"environment.{found[0]}: would be written into the batch script; set it where you submit "
                "(sbatch passes your environment on), or use a profile"
            )
        return self

    @property
    def ranks_per_node(self) -> int:
        """Ranks on every node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChainStep:
    """A stage of a chain."""

    name: Word = Field(description="of the step")
    config: str = Field(description="preset or file of the stage's config")
    set: tuple[str, ...] = Field(default=(), description="key=value fields of it")
    slurm: str = Field(default="slurm", description="preset or file: where on Slurm it runs")
    parts: int = Field(default=1, ge=1, description="of a build on Slurm: jobs of its array")
    throttle: int = Field(default=64, ge=1, description="of a build on Slurm: jobs at once")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChainConfig:
    """`mcf run`: stages one after the other."""

    stage: Literal["chain"] = "chain"
    folder: str = Field(description="where it is kept which jobs were submitted")
    steps: tuple[ChainStep, ...] = Field(min_length=1, description="in their order")
