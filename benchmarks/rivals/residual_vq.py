"""ResidualVQ of vector-quantize-pytorch (pip install vector-quantize-pytorch), as its README uses it."""

import numpy as np
import torch

CODEWORDS = 256
EPOCHS = 10
BATCH = 8_192  # 32 vectors per codeword and step; with the library's decay of 0.8 a codeword averages about 160


class ResidualVQCodec:
    """One codebook of 256 per byte: k-means on the first batch, then exponential moving averages over ten epochs.

    Decay (0.8), k-means iterations (10) and the replacement of dead codes (below 2 uses) are those of the library's
    README and defaults.

    Args:
        dimension: Of the vectors.
        size: Bytes.
    """

    def __init__(self, dimension: int, size: int):
        from vector_quantize_pytorch import ResidualVQ

        self.code_bits = 8 * size
        self.codebook_bytes = 4 * size * CODEWORDS * dimension
        self.size = size
        settings = {"decay": 0.8, "kmeans_init": True, "kmeans_iters": 10, "threshold_ema_dead_code": 2}
        self.module = ResidualVQ(dim=dimension, num_quantizers=size, codebook_size=CODEWORDS, **settings)

    @torch.no_grad()
    def train(self, vectors: np.ndarray) -> None:
        """The codebooks learn by averages: no gradient is needed without an encoder."""
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        batch = min(BATCH, len(vectors))
        self.module.train()
        for _ in range(EPOCHS):
            order = torch.randperm(len(vectors), generator=generator).numpy()
            for start in range(0, len(vectors) - batch + 1, batch):
                self.module(torch.from_numpy(vectors[np.sort(order[start : start + batch])])[None])
        self.module.eval()

    @torch.no_grad()
    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """uint8 `(n, size)`."""
        codes = np.empty((len(vectors), self.size), np.uint8)
        for start in range(0, len(vectors), BATCH):
            batch = torch.from_numpy(np.array(vectors[start : start + BATCH], np.float32))
            codes[start : start + BATCH] = self.module(batch[None])[1][0].numpy()
        return codes

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See [`Quantizer.decode`]."""
        parts = np.array_split(codes, max(1, len(codes) // BATCH))
        indices = (torch.from_numpy(part.astype(np.int64))[None] for part in parts)
        return np.concatenate([self.module.get_output_from_indices(part)[0].numpy() for part in indices])
