"""Which rank is this, and where do the ranks meet? The one place of this floor that reads the environment.

A rank is started by our local launcher or by torchrun (RANK, WORLD_SIZE, ...), by srun (SLURM_PROCID, ...)
or by nobody, and then it is alone. torch is imported inside the functions that need it, so that asking is
cheap.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"
LEAD = "MCF_SIGNAL_DELAY_S"  # set by whoever starts a rank and will end it after a signal

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of a run.

    Attributes:
        rank: 0 .. world - 1.
        world: number of ranks.
        local_rank: 0 .. local_world - 1, on this node.
        local_world: number of ranks on this node.
        master: address of the node of rank 0, where all meet.
        port: its port; 0 where there is nobody to meet.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    master: str = LOOPBACK
    port: int = 0

    def __post_init__(self) -> None:
        """Refuses ranks that cannot be.

        Raises:
            ValueError: a rank is not below its number of ranks.
        """
        if not (0 <= self.rank < self.world and 0 <= self.local_rank < self.local_world <= self.world):
            raise ValueError(
                f"rank {self.rank} of {self.world}, local rank {self.local_rank} of {self.local_world}: a "
                "rank is 0 .. number - 1; set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, or none of them"
            )


def from_environment(environment: Mapping[str, str] | None = None) -> Ranks:
    """Reads the place of this process from the environment.

    Inside of a Slurm job, only srun's own variables count: a batch script, which srun did not start, has
    SLURM_PROCID and SLURM_NTASKS as well, and a process started there is alone.

    Args:
        environment: variables; this process's own when None.

    Raises:
        ValueError: a variable is not a number, or they contradict each other.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables:
        return Ranks(
            rank=_number(variables, "RANK"),
            world=_number(variables, "WORLD_SIZE", 1),
            local_rank=_number(variables, "LOCAL_RANK", 0),
            local_world=_number(variables, "LOCAL_WORLD_SIZE", 1),
            master=variables.get("MASTER_ADDR", LOOPBACK),
            port=_number(variables, "MASTER_PORT", 0),
        )
    if "SLURM_STEP_NUM_TASKS" in variables:
        return _from_slurm(variables)
    return Ranks()


def _from_slurm(variables: Mapping[str, str]) -> Ranks:
    world = _number(variables, "SLURM_STEP_NUM_TASKS")
    tasks = _tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    return Ranks(
        rank=_number(variables, "SLURM_PROCID"),
        world=world,
        local_rank=_number(variables, "SLURM_LOCALID"),
        local_world=tasks[_number(variables, "SLURM_NODEID", 0)],
        master=_slurm_master(variables),
        port=_number(variables, "MASTER_PORT", _slurm_port(variables)),
    )


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Returns a variable as a whole number; ValueError when it is not one, or absent without a default."""
    text = variables.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"environment variable {name} is {text!r}; a whole number is needed") from None


def _tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's `2(x3),1` to [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    return tasks


def _first_host(nodes: str) -> str:
    """Returns the first name of a Slurm node list: `gpu07` of `gpu[07-09,12],cpu1`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def _slurm_master(variables: Mapping[str, str]) -> str:
    """Returns an address of the node of rank 0 that every rank of the step can reach.

    By address rather than by name where possible, because node names are not always in the DNS: a batch
    script runs on the first node of its job, so the address from which it called srun is that node's.
    """
    if "MASTER_ADDR" in variables:
        return variables["MASTER_ADDR"]
    if variables.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return LOOPBACK
    host = _first_host(variables["SLURM_STEP_NODELIST"])
    launcher = variables.get("SLURM_LAUNCH_NODE_IPADDR", host)
    on_first_node = host == _first_host(variables.get("SLURM_JOB_NODELIST", ""))
    if variables.get("ENVIRONMENT") == "BATCH" and on_first_node:
        return launcher
    return host if _resolves(host) else launcher


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _slurm_port(variables: Mapping[str, str]) -> int:
    """Returns a port in 20000 .. 28999, below the ephemeral ones, the same on all ranks.

    Another one for each attempt of a job: a process left over from the one before may still hold the old one.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restarts = (_number(variables, name, 0) for name in names)
    return 20000 + (101 * job + 10 * step + restarts) % 9000


def child_environment(ranks: Ranks) -> dict[str, str]:
    """Returns the environment in which to start a rank: this process's own, its place, and this very code.

    The code's folder goes first on PYTHONPATH, so that a rank imports what its launcher did, installed or
    not.
    """
    code = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {
        "OMP_NUM_THREADS": str(_threads(ranks)),
        **os.environ,
        **_variables(ranks),
        "PYTHONPATH": os.pathsep.join([code, inherited] if inherited else [code]),
    }


def _variables(ranks: Ranks) -> dict[str, str]:
    """Returns the variables that `from_environment`, torch.distributed and DeepSpeed read."""
    return {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_world),
        "MASTER_ADDR": ranks.master,
        "MASTER_PORT": str(ranks.port),
    }


def _threads(ranks: Ranks) -> int:
    """Returns how many threads a rank may compute with, so that those of a node share its cores."""
    cores = len(os.sched_getaffinity(0)) // ranks.local_world
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        cores = _number(os.environ, name, cores)
    return max(1, cores)


def node_name() -> str:
    """Returns the name of this node, for Slurm the one that it knows the node by."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def slurm_job() -> tuple[int, int] | None:
    """Returns the number of the Slurm job that this process belongs to and of its attempt, from 1; None outside."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return _number(os.environ, "SLURM_JOB_ID"), _number(os.environ, "SLURM_RESTART_COUNT", 0) + 1


@contextmanager
def as_outside_of_a_job() -> Iterator[None]:
    """While this is open, this process has no variables of its Slurm job, which one submitted from here would inherit.

    SLURM_CONF, which tells where Slurm is, stays.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(("SLURM", "SBATCH", "SRUN"))}
    kept.pop("SLURM_CONF", None)
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def notice() -> float | None:
    """Returns how many seconds before the end a signal announces it (LEAD), None where nobody has said."""
    text = os.environ.get(LEAD)
    return float(text) if text else None


def device(ranks: Ranks) -> torch.device:
    """Returns the device of this rank: its GPU, or the CPU where there is none.

    A scheduler may show each rank all GPUs of the node or only its own, which then is number 0.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def init(ranks: Ranks) -> None:
    """Prepares this process for its rank and connects it with the others, if any. Repeating is harmless.

    Sets the threads of torch, its GPU, and the environment variables that DeepSpeed reads; several ranks are
    connected by gloo on CPUs and by NCCL on GPUs. Collective: all ranks must call it.

    Raises:
        ValueError: there are several ranks and no port at which to meet.
    """
    import torch
    from torch import distributed

    if ranks.world > 1 and not 0 < ranks.port < 65536:
        raise ValueError(f"{ranks.world} ranks but MASTER_PORT is {ranks.port}; set it to 1 .. 65535")
    os.environ.update(_variables(ranks))
    torch.set_num_threads(_threads(ranks))
    if torch.cuda.is_available():
        torch.cuda.set_device(device(ranks))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if ranks.world > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def close() -> None:
    """Disconnects this process from the other ranks, if it was connected."""
    if "torch" not in sys.modules:  # a job without torch need not load it to end
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def agree(flag: bool) -> bool:
    """Returns whether any rank says True, the same answer on all. Collective: all ranks must call it."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return flag
    on = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    answer = torch.tensor(int(flag), device=on)
    distributed.all_reduce(answer, op=distributed.ReduceOp.MAX)
    return bool(answer.item())


def share(value: T | None) -> T:
    """Returns what rank 0 gives, on all ranks. Collective; for small values that pickle can carry."""
    from torch import distributed

    values = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(values, 0)
    return cast("T", values[0])


def added_up(numbers: Mapping[str, float]) -> dict[str, float]:
    """Returns the sums over all ranks, which give the same names. Collective."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return dict(numbers)
    on = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=on)
    distributed.all_reduce(total)
    return dict(zip(numbers, total.tolist(), strict=True))


def everyone(value: T) -> list[T]:
    """Returns what each rank gives, by rank. Collective; for small values that pickle can carry."""
    from torch import distributed

    if not distributed.is_initialized():
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return cast("list[T]", values)


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor, which now holds what rank 0's holds. Collective."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.broadcast(tensor, 0)
    return tensor
