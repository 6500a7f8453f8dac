"""The operations where Triton was asked for.

Each function is the operation itself, which takes its Triton kernel where it has one that can run and otherwise the
vectorised form; ``cognexis.kernels.dispatch`` decides, and a log message says once per operation what is the case.
"""
