"""Synthetic tasks that show what a memory cell can keep, count and combine.

Every task is a data set of distinct token sequences with one label each; ``cognexis.tasks.registry.TASKS`` lists them.
"""
