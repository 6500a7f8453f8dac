"""The operations in plain torch, one module per operation."""
