"""A job: a stage and its config, as one value that can be called, pickled and sent elsewhere.

`python -m launchers.job CONFIG.yaml ...` runs one rank of one or more, whose place comes from the environment.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import configs
from launchers import is_message
from pipeline import ranks
from pipeline.signals import EXIT_STOPPED, Stopped, StopRequest

# Stage -> its function. By name, so that a job imports only the stage that it runs.
STAGES: Mapping[str, str] = types.MappingProxyType(
    {
        "shards": "shards.build:build",
        "pretrain": "pipeline.pretrain:pretrain",
        "finetune": "pipeline.finetune:finetune",
        "evaluate": "pipeline.evaluate:evaluate",
        "predict": "pipeline.predict:predict",
    }
)


@dataclass(frozen=True)
class Job:
    """A stage to run, named by `config.stage`."""

    config: Any

    def __call__(self) -> Path | str:
        """Runs the stage as one rank and returns what it returns: where its results are.

        Raises:
            KeyError: this is not the config of a stage.
            Stopped: a signal asked for it; the stage has saved and can go on.
        """
        stage = cast("Callable[[Any], Path | str]", pkgutil.resolve_name(STAGES[self.config.stage]))
        return stage(self.config)


class VerifyError(RuntimeError):
    """A dataset is not what its manifest says."""


def verified(data: str) -> str:
    """Returns a dataset's address after checking all of it.

    Raises:
        VerifyError: it is damaged.
    """
    from shards.verify import verify

    if problems := verify(data):
        raise VerifyError(f"{data} is damaged: {problems[0]} ({len(problems)} problems in all)")
    return data


@dataclass(frozen=True)
class Merge:
    """The merge of a build that was made in parts.

    Attributes:
        config: of stage shards.
        verify: whether to check the whole dataset afterwards.
    """

    config: Any
    verify: bool = False

    def __call__(self) -> str:
        """Writes manifest.parquet and dataset.json; returns the dataset's address.

        Raises:
            VerifyError: what was built is damaged.
        """
        from shards.build import merge

        data = merge(self.config)
        return verified(data) if self.verify else data


class PreflightError(RuntimeError):
    """A run must not begin here; the message names nodes and findings.

    `nodes`: those to leave out next time. Empty where all nodes failed alike, since then none of them is the cause.
    """

    def __init__(self, message: str, nodes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.nodes = nodes


def run_rank(job: Callable[[], object], parent: int | None = None) -> int:
    """Runs a job as this process's only purpose.

    Args:
        job: what to run.
        parent: process id of the launcher; should it vanish, this rank saves and ends too.

    Returns:
        The exit code: 0, or EXIT_STOPPED after a signal and a save. A failure does not return: it prints its
        message or traceback and exits with 1 at once, because an orderly end would wait for ranks that do not answer.
    """
    code = 0
    with StopRequest():
        if parent is not None:
            threading.Thread(target=_stop_without, args=(parent,), daemon=True).start()
        try:
            job()
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            code = EXIT_STOPPED
        except (Exception, KeyboardInterrupt) as error:
            if is_message(error):
                print(error, file=sys.stderr)
            else:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        ranks.close()
    return code


def _stop_without(parent: int) -> None:
    """Waits until another process is this one's parent, then asks this one to stop."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one rank of the jobs in config files, one after the other; returns the exit code."""
    parser = argparse.ArgumentParser("python -m launchers.job", description="Run one rank of one or more stages.")
    parser.add_argument("configs", nargs="+", help="files or presets")
    parser.add_argument("--parent", type=int, help="process id of the launcher, to end with it")
    given = parser.parse_args(arguments)
    return run_rank(lambda: [Job(configs.load(source))() for source in given.configs], given.parent)


if __name__ == "__main__":
    sys.exit(main())
