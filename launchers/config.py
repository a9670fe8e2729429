"""Config of where a job runs on Slurm. Imports neither torch nor submitit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")
# A value becomes part of a line of the batch script; a blank or a line break in it would begin something
# else.
Word = Annotated[str, Field(pattern=r"^\S+$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SlurmConfig:
    """What to ask Slurm for. One task is one rank: one per GPU, or one per node without GPUs."""

    stage: Literal["slurm"] = "slurm"
    nodes: int = Field(default=1, ge=1, description="number of nodes")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs, and so ranks, on every node; 0 = CPU only")
    cpus_per_task: int = Field(default=1, ge=1, description="cores for every rank")
    mem_gb: float | None = Field(default=None, gt=0, description="GB per node; null = the cluster's default")
    time_min: int = Field(default=60, ge=1, description="time limit in minutes")
    partition: Word | None = Field(default=None, description="partition; null = the cluster's default")
    account: Word | None = Field(default=None, description="account to charge; null = the user's default")
    signal_delay_s: int = Field(
        default=90, ge=1, le=65535, description="seconds before the time limit to save and requeue"
    )
    max_requeues: int = Field(default=20, ge=0, description="how often a job may go on after its limit")
    setup: tuple[str, ...] = Field(default=(), description="shell lines to run before the job")

    @property
    def tasks_per_node(self) -> int:
        """Ranks on every node."""
        return max(1, self.gpus_per_node)
