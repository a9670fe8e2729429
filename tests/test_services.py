"""What becomes of tests whose service is absent."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import ServiceError
from tests.services.daemon import Daemon, answers, run

ROOT = Path(__file__).resolve().parents[1]


def collect(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Collects the Slurm tests where no Slurm is."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            *options,
            "tests/test_slurm.py",
        ],
        cwd=ROOT,
        env={**os.environ, "CI": "", "MCF_SERVICES": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )


def test_absent_slurm_is_listed_as_not_run(tmp_path: Path) -> None:
    done = collect(tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search(r"NOT RUN: \d+ tests marked slurm", done.stdout), done.stdout
    before, _, after = done.stdout.partition("NOT RUN")
    assert "make services" in after
    assert "test_a_job_that_hangs_is_requeued_so_often_and_no_more" in after
    assert "test_a_job_that_hangs_is_requeued_so_often_and_no_more" not in before
    assert "test_the_preset_loads" in before


def test_absent_slurm_fails_in_ci(tmp_path: Path) -> None:
    done = collect(tmp_path, CI="true")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "CI=true, but no Slurm of the tests answers; `make services`" in done.stderr + done.stdout


def test_who_does_not_ask_for_slurm_may_go_on_in_ci(tmp_path: Path) -> None:
    done = collect(tmp_path, "-m", "not slurm", CI="true")
    assert done.returncode == 0
    assert "NOT RUN" not in done.stdout


def test_a_daemon_is_started_once_and_stopped(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "sleeper", ("sleep", "60"))
    assert daemon.pid() is None
    daemon.start()
    first = daemon.pid()
    daemon.start()
    assert daemon.pid() == first is not None
    daemon.stop()
    assert daemon.pid() is None
    daemon.stop()


def test_another_process_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "impostor", ("sleep", "60"))
    (tmp_path / "impostor.pid").write_text(f"{os.getpid()} 1")
    assert daemon.pid() is None
    daemon.stop()  # would end this very process


def test_a_daemon_that_dies_is_said_with_its_log(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "broken", ("sh", "-c", "echo what went wrong; exit 3"))
    daemon.start()
    with pytest.raises(ServiceError, match=r"broken ended by itself[\s\S]*what went wrong"):
        daemon.wait_until(lambda: False, seconds=30)


def test_commands_say_what_failed() -> None:
    with pytest.raises(ServiceError, match=r"exit 4[\s\S]*alas"):
        run(["sh", "-c", "echo alas >&2; exit 4"])
    assert run(["sh", "-c", "echo $GREETING"], {"GREETING": "hello"}) == "hello\n"
    assert not answers(["/no/such/program"])


@pytest.mark.s3
def test_the_s3_server_answers_exactly(s3_url: str) -> None:
    """Ranges, listing, and a refused checksum: what makes it worth testing against."""
    import boto3
    from botocore.exceptions import ClientError

    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    body = bytes(range(256)) * 4096
    client.put_object(Bucket=bucket, Key=f"{prefix}/bytes", Body=body)
    part = client.get_object(Bucket=bucket, Key=f"{prefix}/bytes", Range="bytes=1000-500000")["Body"].read()
    assert part == body[1000:500001]
    listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    assert [(item["Key"], item["Size"]) for item in listed] == [(f"{prefix}/bytes", len(body))]
    with pytest.raises(ClientError, match="BadDigest"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/wrong", Body=b"abc", ChecksumCRC32="AAAAAA==")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        boto3.client("s3", aws_access_key_id="test:tester", aws_secret_access_key="wrong").list_buckets()
