"""What comes into an index: texts by whatever encoder the user has, embeddings and codes by the quantizer."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..codes import bytes_per_vector, unpack_codes
from ..limits_rqmoe import LARGEST_WEIGHT
from ..modeling_rqmoe import RQMoEModel
from .documents import CHUNK, Id, Row
from .inputs import as_metadata, as_texts, as_vectors, check_finite, check_lengths
from .rescoring import normalized


class EncodesTexts(Protocol):
    """What an encoder must do; sentence-transformers models do."""

    def encode_query(self, texts: list[str], /) -> Any:
        """Embeds queries, `(n, d)`."""

    def encode_document(self, texts: list[str], /) -> Any:
        """Embeds documents, `(n, d)`."""


Encoder = str | EncodesTexts
BATCH_SIZE = 32  # texts that go through an encoder together; sentence-transformers' default


class TextEncoder:
    """An encoder that is loaded when it is first needed, and asked by one thread at a time.

    Args:
        encoder: Name of a sentence-transformers model, or an encoder; None if there is none.
    """

    def __init__(self, encoder: Encoder | None):
        self.encoder = encoder
        self._asking = threading.Lock()  # tokenizers refuse to be used by two threads at once

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds queries, float32 `(n, d)`."""
        with self._asking:
            return np.asarray(self._loaded().encode_query(list(texts)), np.float32)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds documents, float32 `(n, d)`."""
        from ..data.batches import token_batches

        with self._asking:
            encoder = self._loaded()
            batches = token_batches(encoder, texts, BATCH_SIZE)
            parts = [np.asarray(encoder.encode_document([texts[row] for row in rows]), np.float32) for rows in batches]
        return np.concatenate(parts)[np.argsort(np.concatenate(batches))]

    def _loaded(self) -> EncodesTexts:
        if self.encoder is None:
            raise ValueError(
                "Texts need an encoder, and the quantizer does not record its own: give RQMoEIndex an `encoder`, or "
                "pass embeddings instead of texts."
            )
        if not isinstance(self.encoder, str):
            return self.encoder
        from ..data.batches import load_encoder

        loaded: EncodesTexts = load_encoder(self.encoder)
        self.encoder = loaded
        return loaded


@dataclass
class Batch:
    """What is to be written for some vectors, checked; what was not given is None.

    Args:
        size: Number of vectors.
        codes: uint8 `(n, bytes)`.
        floats: float16 `(n, d)`.
        texts: n texts.
        metadata: n JSON objects, or None for those without.
    """

    size: int
    codes: np.ndarray | None
    floats: np.ndarray | None
    texts: list[str] | None
    metadata: list[str | None] | None

    def __len__(self) -> int:
        return self.size

    def row(self, place: int, id: Id) -> Row:
        """The row of one vector, under an id."""
        return self.change(place, Row(id, b""))

    def change(self, place: int, row: Row) -> Row:
        """A row with everything in its place that was given."""
        if self.codes is not None:
            row.code = self.codes[place].tobytes()
            row.floats = None if self.floats is None else self.floats[place].tobytes()
        if self.texts is not None:
            row.text = self.texts[place]
        if self.metadata is not None:
            row.metadata = self.metadata[place]
        return row


class Intake:
    """Turns what users give into codes and queries, and refuses what is none.

    Args:
        quantizer: Makes the codes.
        steps: Codes per vector.
        encoder: Embeds texts.
        keep_floats: Keep the embeddings, too.
    """

    def __init__(self, quantizer: RQMoEModel, steps: int, encoder: Encoder | None, keep_floats: bool):
        self.quantizer, self.steps, self.keep_floats = quantizer, steps, keep_floats
        self.encoder = TextEncoder(encoder)
        self.size = quantizer.config.hidden_size
        self.code_bytes = bytes_per_vector(steps, quantizer.config.code_sizes)

    def batch(
        self, embeddings: Any, texts: Iterable[str] | None, codes: Any, metadata: Iterable[Any] | None,
        size: int | None = None,
    ) -> Batch:  # fmt: skip
        """Checks and compresses what is given. With a size, that of the batch, vectors need not be among it."""
        written = None if texts is None else as_texts(texts)
        notes = None if metadata is None else as_metadata(metadata)
        packed = floats = None
        if size is None or not (embeddings is None and written is None and codes is None):
            packed, floats = self.codes(embeddings, written, codes)
        count = len(packed) if packed is not None else size or 0
        check_lengths(count, texts=written, metadata=notes)
        return Batch(count, packed, floats, written, notes)

    def codes(self, embeddings: Any, texts: list[str] | None, codes: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Packed codes, uint8 `(n, bytes)`, of what is given, and float16 vectors `(n, d)` if they are kept."""
        if embeddings is not None and codes is not None:
            raise ValueError("Give embeddings or codes, not both.")
        if codes is not None:
            return self._checked(codes), None
        if embeddings is None:
            if texts is None:
                raise ValueError("Nothing to add: give embeddings, texts or codes.")
            embeddings = self.encoder.documents(texts) if texts else []
        if len(embeddings) == 0:
            return np.empty((0, self.code_bytes), np.uint8), None
        vectors = as_vectors(embeddings, self.size)
        packed = np.empty((len(vectors), self.code_bytes), np.uint8)
        floats = np.empty(vectors.shape, np.float16) if self.keep_floats else None
        for start in range(0, len(vectors), CHUNK):
            part = np.array(vectors[start : start + CHUNK], np.float32)
            check_finite(part, first=start)
            # Codes are best at the norm that the quantizer knows, and the norm is not what ranks.
            part = normalized(part) if self.quantizer.is_unit_norm else part
            packed[start : start + CHUNK] = self.quantizer.compress(part, self.steps, show_progress_bar=False)
            if floats is not None:
                with np.errstate(over="ignore"):
                    floats[start : start + CHUNK] = part
                check_finite(floats[start : start + CHUNK], "embeddings as float16, which ends at 65504,", start)
        return packed, floats

    def _checked(self, codes: Any) -> np.ndarray:
        if not isinstance(codes, np.ndarray) or codes.dtype != np.uint8 or codes.shape[1:] != (self.code_bytes,):
            kind, shape = getattr(codes, "dtype", type(codes).__name__), getattr(codes, "shape", "")
            raise ValueError(f"Expected packed codes, uint8 (n, {self.code_bytes}), got {kind} {shape}.")
        for start in range(0, len(codes), CHUNK):
            unpack_codes(codes[start : start + CHUNK], self.steps, self.quantizer.config.code_sizes)
        return codes

    def queries(self, queries: Any) -> tuple[np.ndarray, bool]:
        """Queries as finite float32 `(n, d)`, n >= 1, and whether it was a single one."""
        single = isinstance(queries, str)
        if single or (isinstance(queries, (list, tuple)) and queries and isinstance(queries[0], str)):
            texts = as_texts(queries, "queries")
            if not all(text.strip() for text in texts):
                raise ValueError("A query is empty: give it some text.")
            queries = self.encoder.queries(texts)
        elif len(queries):
            single = np.ndim(queries[0]) == 0
        if not len(queries):
            raise ValueError("There is no query: give at least one.")
        vectors = as_vectors(queries, self.size, "queries").astype(np.float32)
        check_finite(vectors, "queries", largest=LARGEST_WEIGHT)  # scores of larger ones may be no numbers
        return vectors, single
