"""The command: `python -m tests.services start | status | stop`."""

import argparse
import os
import sys

from tests.services import ServiceError, root, slurm
from tests.services.s3 import shared


def main() -> int:
    """Runs one action on both services; returns the exit code: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser("python -m tests.services", description=f"Slurm and S3 under {root()}")
    parser.add_argument("action", choices=("start", "status", "stop"))
    action, s3 = parser.parse_args().action, shared()
    try:
        if action == "start":
            if os.geteuid() != 0:
                raise ServiceError("Slurm's daemons must be started by root")
            slurm.start()
            s3.start()
        elif action == "stop":
            s3.stop()
            slurm.stop()
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    up = {"slurm": slurm.available(), "s3": s3.available()}
    for name, environment in (("slurm", slurm.environment()), ("s3", s3.environment())):
        settings = " ".join(f"{key}={value}" for key, value in environment.items())
        print(f"{name}: {'answers' if up[name] else 'does not run'}   {settings}")
    return 0 if action == "stop" or all(up.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
