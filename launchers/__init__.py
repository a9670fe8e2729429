"""Where a stage runs: in this process, in several on this machine, or on Slurm. The stages do not know."""
