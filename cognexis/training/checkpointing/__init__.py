"""Checkpoints of training runs: committed in one step, verified before they are believed, kept with care."""
