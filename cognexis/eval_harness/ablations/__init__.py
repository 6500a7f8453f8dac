"""Ablations: what a part of the model, of its training or of its use is worth, one changed factor at a time."""
