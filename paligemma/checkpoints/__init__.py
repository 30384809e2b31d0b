"""Checkpoints: files of weights, downloads from the hub, and a model in memory."""
