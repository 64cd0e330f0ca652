"""Random rows of large tables, drawn without a list of all rows."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

MANY_ROWS = 1 << 20  # up to which a list of all rows does not matter
BLOCK_ROWS = 1_024
POOL_BLOCKS = 256


def sample_rows(total: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws different rows; what it keeps in memory grows with `count`, not with `total`.

    Args:
        total: Rows there are.
        count: Rows to draw.
        generator: Of random numbers.

    Returns:
        Row numbers, int64 `(count,)`, ascending; all of them if there are no more.
    """
    if total <= 4 * count:
        return np.sort(generator.permutation(total)[:count])
    found = np.empty(0, np.int64)
    while len(found) < count:  # no more than are missing, so that every set of rows is as likely
        found = np.union1d(found, generator.integers(total, size=count - len(found)))
    return found


class PooledSampler(Sampler[int]):
    """All rows once in an epoch, in random order, without a list of all rows.

    Blocks of neighbouring rows are taken in random order, many at a time, and the rows of these are shuffled. Beside
    memory this saves reads: a table that is larger than memory is read in blocks, not row by row.

    Args:
        total: Rows of the table.
        seed: Decides the order, together with the epoch: all ranks have to go through the same one.
        block_rows: Rows of a block.
        pool_blocks: Blocks whose rows are shuffled together.
    """

    def __init__(self, total: int, seed: int, block_rows: int = BLOCK_ROWS, pool_blocks: int = POOL_BLOCKS):
        self.total, self.seed, self.epoch = total, seed, 0
        self.block_rows, self.pool_blocks = block_rows, pool_blocks

    def __len__(self) -> int:
        return self.total

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; the Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        blocks = generator.permutation(-(-self.total // self.block_rows))
        for start in range(0, len(blocks), self.pool_blocks):
            firsts = blocks[start : start + self.pool_blocks, None] * self.block_rows
            rows = (firsts + np.arange(self.block_rows)).reshape(-1)
            rows = rows[rows < self.total]
            generator.shuffle(rows)
            yield from rows.tolist()
