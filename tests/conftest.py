"""What a test may need from the machine, such as Slurm. Without it, the test is not run, and that is said.

A test carries the marker `slurm`, `s3`, `browser`, `gpu` or `real_data`. Where CI=true is in the environment, an
absent Slurm or S3 fails the session instead.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.services import slurm
from tests.services.cluster import Cluster
from tests.services.s3 import shared

# A shared machine is no stopwatch.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")

# DeepSpeed compiles the kernels of an optimiser that nobody here uses. To import what compiles them takes longer, in
# each process, than most trainings of these tests do.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_chromium() -> bool:
    return shutil.which("chromium") is not None


@dataclass(frozen=True)
class Need:
    """What a marker stands for: is it there, what is missing otherwise, and what helps."""

    present: Callable[[], bool]
    missing: str
    remedy: str
    required_in_ci: bool = False


SERVICES = "`make services` starts it (root, Debian)"
NEEDS = {
    "slurm": Need(slurm.available, "no Slurm of the tests answers", SERVICES, required_in_ci=True),
    "s3": Need(
        lambda: shared().available(), f"no S3 server answers at {shared().endpoint}", SERVICES, required_in_ci=True
    ),
    "browser": Need(_has_chromium, "no chromium is installed", "`apt-get install chromium`", required_in_ci=True),
    "gpu": Need(_has_gpu, "no CUDA device", "run the tests on a machine with one"),
    "real_data": Need(REAL_DATA.is_dir, f"{REAL_DATA} is absent", "put the data there"),
}
NOT_RUN = pytest.StashKey[dict[str, list[str]]]()


@pytest.hookimpl(trylast=True)  # after -m and -k have made their choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes away the tests whose need is not met.

    Raises:
        UsageError: in CI, a service is missing.
    """
    wanted = {marker for marker in NEEDS if any(item.get_closest_marker(marker) for item in items)}
    absent = [marker for marker in NEEDS if marker in wanted and not NEEDS[marker].present()]
    if os.environ.get("CI") == "true":
        for need in (NEEDS[marker] for marker in absent):
            if need.required_in_ci:
                raise pytest.UsageError(f"CI=true, but {need.missing}; {need.remedy}")
    not_run: dict[str, list[str]] = {marker: [] for marker in absent}
    for item in list(items):
        lacks = next((marker for marker in absent if item.get_closest_marker(marker)), None)
        if lacks:
            items.remove(item)
            config.hook.pytest_deselected(items=[item])
            not_run[lacks].append(item.nodeid)
    items.sort(key=lambda item: not _on_slurm(item.path))
    config.stash[NOT_RUN] = not_run
    if hasattr(config, "workeroutput"):  # one of several processes: the one that reports has collected nothing
        config.workeroutput["not_run"] = not_run


@cache
def _on_slurm(path: Path) -> bool:
    return "@pytest.mark.slurm" in path.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, all files with tests on Slurm go to one process, and first.

    They wait more than they compute, and so belong beside others; and one of them takes nodes away.
    """
    from xdist.scheduler import LoadFileScheduling

    class BySlurm(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "slurm" if _on_slurm(config.rootpath / file) else file

    return BySlurm(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Takes over what a process of tests has taken away; each has taken away the same."""
    node.config.stash[NOT_RUN] = getattr(node, "workeroutput", {}).get("not_run", {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Lists the tests that were taken away."""
    for marker, tests in config.stash.get(NOT_RUN, {}).items():
        need = NEEDS[marker]
        terminalreporter.section(f"NOT RUN: {len(tests)} tests marked {marker}", yellow=True)
        terminalreporter.line(f"{need.missing}; {need.remedy}")
        for test in tests:
            terminalreporter.line(f"  {test}")


@pytest.fixture
def real_data() -> Path:
    """The folder of real archives; for tests marked `real_data`."""
    return REAL_DATA


@pytest.fixture(name="slurm")
def _slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The Slurm of the tests; for tests marked `slurm`. What they submit through it is cancelled at their end."""
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket of this session, removed with all it holds at the end."""
    import boto3

    key = shared().environment()
    server = boto3.resource(
        "s3",
        endpoint_url=key["AWS_ENDPOINT_URL"],
        aws_access_key_id=key["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=key["AWS_SECRET_ACCESS_KEY"],
        region_name=key["AWS_REGION"],
    )
    bucket = server.create_bucket(Bucket=f"tests-{uuid.uuid4().hex[:12]}")
    yield bucket.name
    bucket.objects.all().delete()
    bucket.delete()


@pytest.fixture
def s3_url(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place, s3://BUCKET/PREFIX, and the environment to reach it; for tests marked `s3`."""
    for name, value in shared().environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_bucket}/{uuid.uuid4().hex[:12]}"
