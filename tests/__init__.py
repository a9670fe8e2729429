"""The tests: `python -m pytest` from the repository root. tests/conftest.py says which needs what."""
