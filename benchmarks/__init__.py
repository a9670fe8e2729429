"""Speeds as ratios: both sides do the same work in one run, in turn, and medians are compared."""
