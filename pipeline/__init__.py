"""The model and the stages that train, evaluate and apply it. Importing this package imports nothing else."""
