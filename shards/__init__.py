"""Scenes in, samples out: archives are tiled into shards, and shards are streamed back. No torch on this floor."""
