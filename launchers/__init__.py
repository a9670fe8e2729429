"""Where a stage runs: in this process, in several on this machine, or on Slurm. The stages do not know."""

FLOORS = ("configs", "shards", "pipeline", "launchers")


def is_message(error: BaseException) -> bool:
    """Whether an error is one of ours, whose text is all that a user needs; any other is a defect with a traceback."""
    return type(error).__module__.split(".")[0] in FLOORS
