"""docs/guide-slurm.md is followed on a real Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.services.cluster import Cluster
from tests.test_docs import follow


@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_the_guide_to_slurm_is_followed_to_the_letter(slurm: Cluster, tmp_path: Path) -> None:
    try:
        follow("guide-slurm.md", tmp_path)
    finally:
        for script in tmp_path.rglob("*_submission.sh"):
            slurm.cancel(script.name.partition("_")[0])
