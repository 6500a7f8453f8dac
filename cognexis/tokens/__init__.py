"""The parts of the tokenizer: control-token guard, truncation, chat rendering, manifest, streaming decoder."""
