"""How many training vectors a method can use within about two hours on two cores, and why not more."""

HOURS = "more would take over two hours on two cores"
MEMORY = "training keeps beam x vectors x dimensions numbers, twice: more would not fit into 24 GiB"

# (method, bytes): most vectors and the reason. LSQ with 8 codes of 8 bits takes 4 to 5 ms of a core for each training
# vector (16 codes 24 ms), which grows with codes^2 x codewords, and 14 s to invert matrices of all 2,048 codewords,
# which grows with the cube of their number.
MAX_TRAINING_VECTORS: dict[tuple[str, int], tuple[int, str]] = {
    ("LSQ", 16): (500_000, HOURS),
    ("LSQ", 32): (100_000, HOURS),
    ("LSQ x9", 16): (400_000, HOURS),
    ("LSQ x10", 8): (800_000, HOURS),
    ("LSQ x10", 16): (200_000, HOURS),
    ("PLSQ", 32): (400_000, HOURS),
    ("PLSQ", 64): (200_000, HOURS),
    ("RQ x10, beam 5", 64): (100_000, HOURS),
    ("RQ x12, beam 5", 32): (250_000, HOURS),
    ("RQ x12, beam 5", 64): (150_000, HOURS),
    ("RQ x12 and rest, beam 5", 32): (250_000, HOURS),
    ("RQ x12 and rest, beam 5", 64): (150_000, HOURS),
}
LEFT_OUT: dict[tuple[str, int], str] = {
    ("LSQ", 64): "inverting matrices of 16,384 columns takes hours before any vector is encoded",
    ("LSQ x9", 32): "two hours on two cores are enough for 50,000 vectors, too few for 14,336 codewords",
    ("LSQ x9", 64): "tables of (56 x 512)^2 numbers: 3 GiB, and days to train",
    ("LSQ x10", 32): "tables of (25 x 1,024)^2 numbers: 2.4 GiB, and days to train",
    ("LSQ x10", 64): "tables of (51 x 1,024)^2 numbers: 10 GiB, and days to train",
}
MAX_BEAM_FLOATS = 1 << 31  # 8 GiB


def training_vectors(method: str, size: int, dimension: int, available: int, beam: int = 5) -> tuple[int, str | None]:
    """Number of training vectors for one cell, and the reason if it is not all.

    Args:
        method: A rival.
        size: Bytes.
        dimension: Of the vectors.
        available: Training vectors that there are.
        beam: Of the training of residual quantizers.

    Returns:
        The number, 0 if the cell is left out, and the reason for fewer than `available`.
    """
    method = method.removesuffix(", 128 iterations")  # which change nothing in training
    if (method, size) in LEFT_OUT:
        return 0, LEFT_OUT[method, size]
    most, reason = MAX_TRAINING_VECTORS.get((method, size), (available, ""))
    in_memory = MAX_BEAM_FLOATS // (beam * dimension)
    if method.startswith("RQ") and in_memory < min(most, available):
        return in_memory, MEMORY
    return (most, reason) if most < available else (available, None)
