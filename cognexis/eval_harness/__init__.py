"""Evaluations: what trained memory stacks can do, measured on tasks with known answers."""
