"""RQ-MoE: residual quantization with codebooks that a mixture of experts deforms (arXiv 2605.14359).

The paper's letters, used in shape comments only: d hidden_size, M num_codebooks, K codebook_size, N num_experts,
H intermediate_size, c condition_size (the paper's D_e), n vectors, S steps with experts (M - 1).
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .blocks_rqmoe import block_of, blocks_of, find_codes
from .codes import bytes_per_vector, check_codes, pack_codes, unpack_codes
from .configuration_rqmoe import RQMoEConfig
from .decoding_rqmoe import decode_codes
from .encoding_rqmoe import Tables, build_tables
from .experts_rqmoe import RQMoEExperts
from .pretrained_rqmoe import RQMoEPreTrainedModel

_BUILDING = threading.Lock()  # of all models: one in each could not be copied or pickled
PROGRESS_BAR_FROM = 100_000  # vectors; below this, compress and decompress are silent unless asked


@dataclass
class RQMoEOutput(ModelOutput):
    """What training sees.

    Args:
        loss: Scalar, present if `return_loss`.
        reconstruction: `(batch, hidden_size)`, in the units of the embeddings.
        codes: `(batch, num_codebooks)`, int64.
        step_errors: `(num_codebooks,)`: squared error, summed over dimensions and averaged over the batch, that is
            left after each step, in the units of the embeddings.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    step_errors: torch.Tensor | None = None


@dataclass
class RQMoEEncoderOutput(ModelOutput):
    """Codes, int64 `(batch, num_codebooks)`, and the reconstruction `(batch, hidden_size)` that they stand for."""

    codes: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


@dataclass
class RQMoEDecoderOutput(ModelOutput):
    """The reconstruction, `(batch, hidden_size)`."""

    reconstruction: torch.Tensor | None = None


class RQMoEModel(RQMoEPreTrainedModel):
    """A quantizer for embeddings: any member of the family that [`RQMoEConfig`] describes.

    A new model knows nothing about data; `rqmoe_hf.training.initialize` or `rqmoe train` give it its mean, its scale
    and its codebooks, and until then it refuses to work.

    Threads may share a model for `encode`, `decode`, `compress` and `decompress`, as long as none of them trains it,
    moves it, or changes its weights.
    """

    def __init__(self, config: RQMoEConfig):
        super().__init__(config)
        steps, size = config.num_codebooks, config.hidden_size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.zeros(()))
        self.codebooks = nn.Parameter(torch.empty(steps, config.codebook_size, size))
        self.experts = RQMoEExperts(config) if config.has_experts else None
        # The last step's instructions would influence nothing: they are not allocated.
        uses_instructions = config.has_experts and config.conditioning == "instruction"
        shape = (steps - 1, config.codebook_size, config.condition_size)
        self.instructions = nn.Parameter(torch.empty(shape)) if uses_instructions else None
        self.commit_hash: str | None = None  # on the Hub, of the weights loaded from there
        self.cast_from: tuple[str, str] | None = None  # checksums: of the weights as they are, and as they are stored
        self._tables: dict[tuple[torch.dtype, int | None], tuple[tuple, Tables]] = {}
        self.post_init()

    def train(self, mode: bool = True) -> "RQMoEModel":
        """Switches between training and evaluation, after either of which the weights may have changed."""
        if mode != self.training:  # sentence-transformers calls eval() before it encodes a single text
            self._tables.clear()
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Refuses `nn.DataParallel`: its copies have no parameters, and would share the tables of one device."""
        raise ValueError(
            "An RQMoEModel cannot be copied to several GPUs within one process (nn.DataParallel): start one process "
            "for each with torchrun --nproc-per-node, or let the process see one GPU (CUDA_VISIBLE_DEVICES=0)."
        )

    def __getstate__(self) -> dict:  # without the tables: they are rebuilt, and can be twenty times the weights
        return super().__getstate__() | {"_tables": {}}

    @property
    def is_initialized(self) -> bool:
        """Whether the model has been given the statistics and codebooks of some data."""
        return bool(self.scale > 0)

    @property
    def is_unit_norm(self) -> bool:
        """Whether the embeddings that it was initialised on had norm 1, so that cosine is what ranks them.

        Where that is not on record, whether their squared norm was 1 in the mean: it is that of the mean plus the
        variance of all dimensions.
        """
        if self.config.unit_norm is not None:
            return self.config.unit_norm
        mean_square = self.mean.float().square().sum() + self.config.hidden_size * self.scale.float().square()
        return bool((mean_square - 1).abs() < 0.01)

    # --- tensors -------------------------------------------------------------------------------------------------

    @can_return_tuple
    @torch.no_grad()
    def encode(
        self,
        embeddings: torch.Tensor | np.ndarray,
        num_candidates: int | None = None,
        beam_size: int | None = None,
        exact: bool = False,
        num_codebooks: int | None = None,
        local_search: int | None = None,
    ) -> RQMoEEncoderOutput:
        """Finds the codes of embeddings.

        Args:
            embeddings: Floating point `(n, hidden_size)`, in the units of the training embeddings; an array, too.
            num_candidates: Codewords evaluated exactly per beam entry and step; default from the config.
            beam_size: Partial codes kept per vector; default from the config.
            exact: Evaluate all codewords (`num_candidates` = `codebook_size`).
            num_codebooks: Stop after this many steps.
            local_search: Rounds of local search that improve the codes of the beam; default from the config.

        Returns:
            The codes, int64 `(n, num_codebooks)`, and their reconstruction, float32 `(n, hidden_size)`. In float32 a
            vector gets the same codes in any batch (on a GPU too, as long as TF32 stays off, as it is unless asked
            for); in bfloat16 up to ties.

        Raises:
            ValueError: If the model is not initialised, or the embeddings are no finite floats of the right shape.
        """
        settings = self._search_settings(num_candidates, beam_size, exact, num_codebooks)
        codes, reconstruction = self._encode(torch.as_tensor(embeddings), settings, local_search)
        return RQMoEEncoderOutput(codes=codes, reconstruction=reconstruction)

    @can_return_tuple
    @torch.no_grad()
    def decode(self, codes: torch.Tensor | np.ndarray) -> RQMoEDecoderOutput:
        """Decodes codes, int `(n, m)` with m up to num_codebooks: a prefix of the codes gives a coarser vector.

        Raises:
            ValueError: If the model is not initialised, or the codes have a wrong shape, type or range.
        """
        self._require_initialized("decode")
        codes = torch.as_tensor(codes)
        check_codes(codes, self.config.num_codebooks, self.config.code_sizes)
        tables = self._tables_for(self._compute_dtype())
        return RQMoEDecoderOutput(self._unstandardize(decode_codes(codes.to(self.codebooks.device), tables)))

    @can_return_tuple
    def forward(
        self, embeddings: torch.Tensor, return_loss: bool = True, num_codebooks: int | None = None
    ) -> RQMoEOutput:
        """Quantizes embeddings `(n, hidden_size)` and measures the loss of the config's `training_loss`.

        The codes are found first, without gradient and without dropout; the gradient then flows through the
        reconstruction of these codes into codebooks, instructions and experts. With `num_codebooks` only the first so
        many of them.
        """
        self._require_initialized("train")
        self._check_embeddings(embeddings)
        target = self._standardize(embeddings)
        self._forget_tables()
        # Ties may fall either way in training: no need to settle them in double precision.
        search = self._search_settings(None, None, False, num_codebooks)
        codes, _ = self._find_codes(target, search, self.config.local_search, settle_ties=False)
        self._forget_tables()
        partial_sums = self.contributions(codes).float().cumsum(dim=1)  # (n, M, d)
        errors = (target[:, None] - partial_sums).square().sum(dim=-1)  # (n, M)
        return RQMoEOutput(
            loss=self._loss(target, errors) if return_loss else None,
            reconstruction=self._unstandardize(partial_sums[:, -1]),
            codes=codes,
            step_errors=errors.detach().mean(dim=0) * self.scale.float().square(),
        )

    def contributions(self, codes: torch.Tensor) -> torch.Tensor:
        """What each code adds to the reconstruction, in standardised units and with gradient: `(n, m, d)`."""
        steps = codes.shape[1]
        codewords = _look_up(self.codebooks[:steps], codes)  # (m, n, d)
        if self.experts is None or steps == 1:
            return codewords.transpose(0, 1)
        if self.instructions is not None:
            instructions = _look_up(self.instructions[: steps - 1], codes[:, :-1]).cumsum(dim=0)
            deformed = self.experts(codewords[1:], instructions, slice(steps - 1))
            return torch.cat([codewords[:1].to(deformed.dtype), deformed]).transpose(0, 1)
        outputs = [codewords[0]]
        for step in range(steps - 1):
            reconstruction = torch.stack(outputs).sum(dim=0)
            deformed = self.experts(codewords[step + 1][None], reconstruction[None], slice(step, step + 1))
            outputs.append(deformed[0])
        return torch.stack(outputs, dim=1)

    def _loss(self, target: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
        """The training loss from the squared errors after each step, `(n, M)`, in standardised units."""
        if self.config.training_loss == "normalized_residual":  # paper, section on the normalised residual loss
            before = torch.cat([target.square().sum(-1, keepdim=True), errors[:, :-1]], dim=1).detach()
            return torch.log1p(errors / (before + 1e-6)).sum(dim=1).mean()
        if self.config.training_loss == "per_step":
            return errors.sum(dim=1).mean() / self.config.hidden_size
        return errors[:, -1].mean() / self.config.hidden_size

    # --- numpy ---------------------------------------------------------------------------------------------------

    def compress(
        self,
        embeddings: np.ndarray,
        num_codebooks: int | None = None,
        num_candidates: int | None = None,
        beam_size: int | None = None,
        exact: bool = False,
        batch_size: int = 16384,
        show_progress_bar: bool | None = None,
        local_search: int | None = None,
    ) -> np.ndarray:
        """Compresses embeddings to packed codes.

        Args:
            embeddings: Floating point `(n, hidden_size)`; a memory map is read batch by batch.
            num_codebooks: Keep only this many codes, hence fewer bytes.
            num_candidates: See [`encode`].
            beam_size: See [`encode`].
            exact: See [`encode`].
            batch_size: Vectors per call of [`encode`]. It has no influence on the codes.
            show_progress_bar: `None` shows it for 100,000 vectors and more.
            local_search: See [`encode`].

        Returns:
            uint8 `(n, bytes_per_vector)`: the codes as little-endian bit strings, Faiss's layout.
        """
        embeddings = np.asarray(embeddings) if not isinstance(embeddings, np.ndarray) else embeddings
        self._check_embeddings(embeddings)
        settings = self._search_settings(num_candidates, beam_size, exact, num_codebooks)
        size = bytes_per_vector(settings["num_codebooks"], self.config.code_sizes)
        packed = np.empty((len(embeddings), size), dtype=np.uint8)
        for start, stop in _batches(len(embeddings), batch_size, "compress", show_progress_bar):
            batch = torch.from_numpy(np.array(embeddings[start:stop], dtype=np.float32))  # a copy: may be read-only
            codes, _ = self._encode(batch, settings, local_search, first=start)
            packed[start:stop] = pack_codes(codes.cpu().numpy(), self.config.code_sizes)
        return packed

    def decompress(
        self,
        codes: np.ndarray,
        num_codebooks: int | None = None,
        batch_size: int = 16384,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Restores embeddings from packed codes.

        Args:
            codes: uint8 `(n, bytes)`, whole codes or those of a prefix (`compress(..., num_codebooks=...)`,
                [`truncate_codes`]).
            num_codebooks: Codes per vector. `None` infers it from the bytes, which is ambiguous only for prefixes of
                codes that are shorter than a byte.
            batch_size: Vectors per call of [`decode`].
            show_progress_bar: `None` shows it for 100,000 vectors and more.

        Returns:
            float32 `(n, hidden_size)`.
        """
        steps = self._packed_steps(codes, num_codebooks)
        restored = np.empty((len(codes), self.config.hidden_size), dtype=np.float32)
        for start, stop in _batches(len(codes), batch_size, "decompress", show_progress_bar):
            batch = unpack_codes(codes[start:stop], steps, self.config.code_sizes)
            restored[start:stop] = self.decode(torch.from_numpy(batch)).reconstruction.cpu().numpy()
        return restored

    def _standardize(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings.to(self.codebooks.device, torch.float32) - self.mean.float()) / self.scale.float()

    def _unstandardize(self, standardized: torch.Tensor) -> torch.Tensor:
        return standardized.float() * self.scale.float() + self.mean.float()

    def _compute_dtype(self) -> torch.dtype:
        """16 bits if the experts' weights have them or autocast asks for them, float32 otherwise."""
        device = self.codebooks.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        dtype = self.codebooks.dtype if self.experts is None else self.experts.up_proj.dtype
        return torch.float32 if dtype == torch.float64 else dtype  # float64 is for near ties

    def _forget_tables(self) -> None:
        """Before and after a pass with gradient: fused optimizers leave no trace on the weights' versions."""
        if torch.is_grad_enabled():
            self._tables.clear()

    def _tables_for(self, dtype: torch.dtype, start: int | None = None) -> Tables:
        """The engine's tables, of all codebooks or of a block of them, rebuilt if a weight has changed."""
        start = start if self.config.search_blocks else None  # with one block its tables are all tables
        key = tuple((weight.data_ptr(), weight._version) for weight in self.parameters())
        kept = self._tables.get((dtype, start))
        if kept is None or kept[0] != key:
            with _BUILDING:  # threads that come at once wait for the first one's tables
                kept = self._tables.get((dtype, start))
                if kept is None or kept[0] != key:
                    codebooks, sizes = block_of(self.codebooks, self.config, start)
                    weights = (codebooks, self.instructions, self.experts)
                    kept = self._tables[dtype, start] = (key, build_tables(*weights, dtype, sizes))
        return kept[1]

    def _packed_steps(self, codes: np.ndarray, num_codebooks: int | None) -> int:
        """How many codes per vector the packed `codes` hold."""
        steps, codewords = self.config.num_codebooks, self.config.code_sizes
        size = codes.shape[1] if isinstance(codes, np.ndarray) and codes.ndim == 2 and codes.dtype == np.uint8 else 0
        fitting = [
            m for m in range(1, steps + 1) if bytes_per_vector(m, codewords) == size and num_codebooks in (None, m)
        ]
        if not fitting or not len(codes):
            raise ValueError(
                f"decompress expects packed codes, uint8 (n, {self.config.bytes_per_vector}) or those of a prefix, "
                f"got {getattr(codes, 'dtype', type(codes).__name__)} {getattr(codes, 'shape', '')}. "
                "Pack integer codes with rqmoe_hf.pack_codes first, or give them to decode()."
            )
        if len(fitting) > 1 and fitting[-1] != steps:
            raise ValueError(f"{size} bytes may hold {fitting[0]} to {fitting[-1]} codes: give num_codebooks.")
        return fitting[-1]

    @torch.no_grad()
    def _encode(
        self, embeddings: torch.Tensor, settings: dict[str, Any], local_search: int | None, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and reconstructions of a batch whose first row is number `first` of what the user gave."""
        self._require_initialized("encode")
        self._check_embeddings(embeddings, first)
        target, rounds = self._standardize(embeddings), self._local_search(local_search)
        codes, reconstruction = self._find_codes(target, settings, rounds)
        return codes, self._unstandardize(reconstruction)

    def _find_codes(
        self, target: torch.Tensor, settings: dict[str, Any], local_search: int, settle_ties: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and standardised reconstructions of standardised vectors: beam search, then local search."""
        search = dict(settings)
        blocks, dtype = blocks_of(self.config, search.pop("num_codebooks")), self._compute_dtype()
        return find_codes(target, self._tables_for, dtype, blocks, local_search, settle_ties, **search)

    def _local_search(self, rounds: int | None) -> int:
        if rounds is not None and rounds < 0:
            raise ValueError(f"local_search must be 0 (none) or a number of rounds, got {rounds}.")
        return self.config.local_search if rounds is None else rounds

    def _search_settings(
        self, num_candidates: int | None, beam_size: int | None, exact: bool, num_codebooks: int | None
    ) -> dict[str, Any]:
        config = self.config
        steps = config.num_codebooks if num_codebooks is None else num_codebooks
        candidates = config.num_candidates if num_candidates is None else num_candidates
        beam = config.beam_size if beam_size is None else beam_size
        if not 1 <= steps <= config.num_codebooks:
            raise ValueError(f"num_codebooks must lie between 1 and {config.num_codebooks}, got {num_codebooks}.")
        if candidates < 1 or beam < 1:
            raise ValueError(f"num_candidates and beam_size must be at least 1, got {candidates} and {beam}.")
        candidates = config.codebook_size if exact else min(candidates, config.codebook_size)
        return {"num_candidates": candidates, "beam_size": beam, "num_codebooks": steps}

    def _require_initialized(self, verb: str) -> None:
        if not self.is_initialized:
            raise ValueError(
                f"This RQMoEModel was never initialised on data, so it cannot {verb}. Run `rqmoe train`, or call "
                "rqmoe_hf.training.initialize(model, embeddings) with a sample of your embeddings, or load trained "
                "weights with RQMoEModel.from_pretrained(...)."
            )

    def _check_embeddings(
        self, embeddings: torch.Tensor | np.ndarray, first: int = 0, what: str = "embeddings"
    ) -> None:
        """Raises ValueError unless they are floats `(n, hidden_size)`, finite if a tensor; rows count from `first`."""
        size = self.config.hidden_size
        if embeddings.ndim != 2 or embeddings.shape[1] != size or not len(embeddings):
            hint = " Reshape a single vector to (1, hidden_size)." if embeddings.ndim == 1 else ""
            raise ValueError(f"Expected {what} of shape (n, {size}), n >= 1, got {tuple(embeddings.shape)}.{hint}")
        tensor = embeddings if isinstance(embeddings, torch.Tensor) else None
        floating = tensor.is_floating_point() if tensor is not None else np.issubdtype(embeddings.dtype, np.floating)  # type: ignore[arg-type]
        if not floating:
            raise ValueError(
                f"Expected floating point {what}, got {embeddings.dtype}. Convert them to float32, in the units "
                "of the training embeddings; int8-quantized embeddings must be rescaled first."
            )
        if tensor is not None and not torch.isfinite(tensor).all():
            row = first + int((~torch.isfinite(tensor)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"{what.capitalize()} must be finite, but row {row} of those given holds NaN or infinity: drop it."
            )


def _look_up(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Rows of stacked tables: `(m, K, w)` and `(n, m)` to `(m, n, w)`."""
    offsets = torch.arange(tables.shape[0], device=codes.device) * tables.shape[1]
    return F.embedding((codes + offsets).T, tables.flatten(0, 1))


def _batches(total: int, batch_size: int, verb: str, show: bool | None) -> list[tuple[int, int]]:
    """Start and stop of each batch, behind a progress bar on long work."""
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    ranges = [(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
    return tqdm(ranges, desc=verb, unit="batch", disable=total < PROGRESS_BAR_FROM if show is None else not show)
