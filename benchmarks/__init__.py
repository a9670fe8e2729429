"""Speeds as ratios: both sides do the same work in one run, in turn, and medians are compared.

One study is of accuracy: `corrections.py` with `mechanisms.py` and `holes.py`.
"""
