"""A real Slurm and a real S3 server on this one machine, for the tests that carry the marker `slurm` or `s3`.

`python -m tests.services start | status | stop` (`make services` is the first) needs root and Debian. It
installs what is missing, keeps all state under one folder and ends only what it started itself. Nothing else
on the machine is configured: Slurm's clients find the cluster through the environment variable SLURM_CONF.

Stdlib only, so that it runs before anything is installed.
"""

import os
from pathlib import Path

ROOT_VARIABLE = "MCF_SERVICES"


def root() -> Path:
    """Returns the folder that holds the services' state: $MCF_SERVICES or /var/tmp/mcf-services."""
    return Path(os.environ.get(ROOT_VARIABLE, "/var/tmp/mcf-services"))


class ServiceError(RuntimeError):
    """A service could not be installed, started or stopped; the message says which, and where its log is."""
