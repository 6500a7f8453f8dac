"""The parts of the language model: norms, rotary positions, attention, blocks, the looped core and its cache."""
