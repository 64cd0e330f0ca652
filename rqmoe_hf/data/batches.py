"""Compression and embedding of batches as picklable callables, for frameworks that bring their own processes.

The same object works in `datasets.Dataset.map(batched=True, num_proc=...)`, in `ray.data.Dataset.map_batches` and,
through its method `in_pandas`, in Spark's `DataFrame.mapInPandas`.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..bundled import load_quantizer, named_dtype
from ..machine import warn_of_slow_bfloat16
from ..modeling_rqmoe import RQMoEModel

if TYPE_CHECKING:
    import pandas as pd

Batch = dict[str, Any]


class CompressBatch:
    """Adds the column of codes to a batch that has a column of embeddings.

    A pickled instance carries the name of its quantizer, or the weights if it was given a model. A quantizer given by
    name is loaded by the first batch in each process.

    Args:
        model: Quantizer: bundled name, folder, Hub id, or the model itself.
        column: Column that holds the embeddings.
        codes_column: Column that is added.
        keep_embeddings: Whether the result has the embeddings too.
        num_codebooks: See `RQMoEModel.compress`.
        num_candidates: See `RQMoEModel.compress`.
        beam_size: See `RQMoEModel.compress`.
        local_search: See `RQMoEModel.compress`.
        dtype: Of the arithmetic of a quantizer given by name: "float32" or "bfloat16".
        revision: Branch, tag or commit of a quantizer on the Hub.
        device: Where to run, default where the model is; one given by name is on the processor.
        num_threads: Threads of torch and Faiss in each process. `None` leaves them alone; where several processes
            share a machine, give each its part of the cores.
    """

    def __init__(
        self,
        model: str | RQMoEModel,
        column: str = "embeddings",
        codes_column: str = "codes",
        keep_embeddings: bool = True,
        num_codebooks: int | None = None,
        num_candidates: int | None = None,
        beam_size: int | None = None,
        local_search: int | None = None,
        dtype: str = "float32",
        revision: str | None = None,
        device: str | None = None,
        num_threads: int | None = None,
    ):
        self.model = model
        self.column, self.codes_column, self.keep_embeddings = column, codes_column, keep_embeddings
        self.search: dict[str, Any] = {"num_codebooks": num_codebooks, "num_candidates": num_candidates,
                                       "beam_size": beam_size, "local_search": local_search}  # fmt: skip
        self.dtype, self.revision, self.device, self.num_threads = dtype, revision, device, num_threads
        self._loaded: RQMoEModel | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_loaded": None}

    def __call__(self, batch: Batch) -> Batch:
        """Compresses one batch.

        Args:
            batch: Columns by name. The embeddings are `(n, hidden_size)` floats, or n vectors of that length.

        Returns:
            The columns and the codes, uint8 `(n, bytes_per_vector)`.

        Raises:
            ValueError: If there is no column of embeddings, or what it holds is not embeddings of this quantizer.
        """
        embeddings = as_matrix(_column(batch, self.column), self.column)
        if self._loaded is None:
            self._loaded = self._load()
        codes = self._loaded.compress(embeddings, **self.search, show_progress_bar=False)
        kept = {name: values for name, values in batch.items() if self.keep_embeddings or name != self.column}
        return kept | {self.codes_column: codes}

    def in_pandas(self, frames: "Iterable[pd.DataFrame]") -> "Iterator[pd.DataFrame]":
        """Compresses an iterator of DataFrames, as `mapInPandas` of Spark wants it.

        Spark has no unsigned bytes: a vector's codes are one value of type `binary` there.

        Args:
            frames: Each with a column of embeddings.

        Yields:
            The same columns (without the embeddings unless they are kept), and the codes as `bytes`.
        """
        for frame in frames:
            codes = self({self.column: _column(frame, self.column)})[self.codes_column]
            kept = frame if self.keep_embeddings else frame.drop(columns=self.column)
            yield kept.assign(**{self.codes_column: [row.tobytes() for row in codes]})

    def _load(self) -> RQMoEModel:
        limit_threads(self.num_threads)
        model = load_quantizer(self.model, self.dtype, self.revision) if isinstance(self.model, str) else self.model
        if self.device is not None:
            model = model.to(self.device)  # type: ignore[arg-type]
        if model.experts is not None:  # codebooks alone are searched in float32 in any case
            warn_of_slow_bfloat16(model.experts.up_proj.dtype, model.device)
        return model


class EmbedBatch:
    """Adds the column of embeddings to a batch that has a column of texts.

    Args:
        encoder: sentence-transformers encoder: Hub id or folder. The first batch in each process loads it.
        column: Column that holds the texts.
        embeddings_column: Column that is added.
        dtype: Of the encoder's arithmetic, see `rqmoe_hf.data.embed_texts`.
        batch_size: Texts per forward pass.
        device: Where to run, default the best there is.
        num_threads: Threads of torch in each process; `None` leaves them alone.
    """

    def __init__(
        self,
        encoder: str,
        column: str = "text",
        embeddings_column: str = "embeddings",
        dtype: str = "float32",
        batch_size: int = 64,
        device: str | None = None,
        num_threads: int | None = None,
    ):
        self.encoder, self.column, self.embeddings_column = str(encoder), column, embeddings_column
        self.dtype, self.batch_size, self.device, self.num_threads = dtype, batch_size, device, num_threads
        self._loaded: Any = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_loaded": None}

    def __call__(self, batch: Batch) -> Batch:
        """Embeds one batch.

        Args:
            batch: Columns by name; the texts are n strings.

        Returns:
            The columns and the embeddings, float32 `(n, d)`.

        Raises:
            ValueError: If there is no column of texts, or it holds anything else.
        """
        texts = list(_column(batch, self.column))
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise ValueError(
                f"The column {self.column!r} should hold texts, it has {wrong[0]!r}: drop such rows first."
            )
        if self._loaded is None:
            limit_threads(self.num_threads)
            self._loaded = load_encoder(self.encoder, self.dtype, self.device)
        return dict(batch) | {self.embeddings_column: encode_batches(self._loaded, texts, self.batch_size)}


def load_encoder(encoder: str, dtype: str = "float32", device: str | None = None):
    """Loads a SentenceTransformer whose weights have the dtype named: float32, bfloat16 or float16."""
    kind = named_dtype(dtype, ("float32", "bfloat16", "float16"))
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder), device=device, model_kwargs={"dtype": kind})
    warn_of_slow_bfloat16(kind, model.device)
    return model


def encode_batches(model, texts: list[str], batch_size: int, show_progress_bar: bool = False) -> np.ndarray:
    """Embeds texts, float32 `(n, d)`; unit norms that bfloat16 has blurred are restored."""
    encode = partial(model.encode, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True)
    batches = token_batches(model, texts, batch_size)
    bar = tqdm(batches, desc="Batches", disable=not show_progress_bar)
    embeddings = torch.cat([encode([texts[row] for row in rows]).float() for rows in bar])
    norms = embeddings.norm(dim=-1, keepdim=True)
    if bool((norms - 1).abs().max() < 0.02):  # unit norm up to bfloat16's rounding
        embeddings = embeddings / norms
    return embeddings.cpu().numpy()[np.argsort(np.concatenate(batches))]


def token_batches(model: Any, texts: Sequence[str], batch_size: int) -> list[np.ndarray]:
    """Divides texts into batches of about equally many tokens, the longest first.

    sentence-transformers sorts by characters, and texts of equally many differ so much in tokens that much of what it
    computes is padding (docs/scaling.md has both times). Tokens beyond what the encoder reads do not count.

    Args:
        model: A sentence-transformers model, or another encoder.
        texts: n texts.
        batch_size: Texts per batch.

    Returns:
        Places in `texts`. One batch of all if they fit into one, or the encoder has no tokenizer that counts quickly.
    """
    tokenizer = getattr(model, "tokenizer", None)
    few = len(texts) <= batch_size  # one batch however they are sorted
    if few or not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        return [np.arange(len(texts))]
    longest = getattr(model, "max_seq_length", None)
    limit = {"truncation": True, "max_length": longest} if longest else {}
    tokens = tokenizer(list(texts), return_attention_mask=False, **limit)["input_ids"]
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def limit_threads(count: int | None) -> None:
    """Sets the threads of torch and Faiss in this process, unless `count` is None."""
    if count is not None:
        torch.set_num_threads(count)
        faiss.omp_set_num_threads(count)


def as_matrix(values: Any, column: str) -> np.ndarray:
    """A column of vectors, in any of the shapes that frameworks give it, as floats `(n, d)`.

    Raises:
        ValueError: If the rows are not all vectors of one length.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float().numpy()
    if isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype != object:
        return values
    try:
        rows = [np.asarray(row, dtype=np.float32) for row in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"The column {column!r} should hold vectors of floats: {error}.") from error
    shapes: Sequence[tuple] = sorted({row.shape for row in rows})
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise ValueError(
            f"The column {column!r} should hold vectors of one length, it has rows of shapes {shapes[:5]}: drop "
            "missing and cut rows first."
        )
    return np.stack(rows)


def _column(batch: Any, name: str) -> Any:
    names = list(batch.keys())
    if name not in names:
        raise ValueError(f"There is no column {name!r}; the columns are {', '.join(names)}. Name it with `column`.")
    return batch[name]
