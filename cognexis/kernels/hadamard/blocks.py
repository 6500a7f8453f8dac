"""How a width is cut into powers of two."""


def hadamard_blocks(size: int) -> list[tuple[int, int]]:
    """Start and length of each block, the longest first: 13 gives (0, 8), (8, 4), (12, 1)."""
    blocks, start = [], 0
    for exponent in reversed(range(size.bit_length())):
        if size >> exponent & 1:
            blocks.append((start, 1 << exponent))
            start += 1 << exponent
    return blocks
