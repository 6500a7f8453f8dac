"""The terms of a training loss beside the next-token loss of the last loop, and that loss without its logits."""
