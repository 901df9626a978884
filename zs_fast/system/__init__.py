"""Machines: seeds, memory, weights, checkpoints, metrics, processes."""
