"""Tables in and out: texts and embeddings from where users keep them, and resumable jobs over them."""

from .batches import CompressBatch, EmbedBatch
from .jobs import codes_info, compress_shards, decompress_shards, embed_texts
from .parquet import ParquetFiles
from .sources import as_array, dataset_from_array, load_embeddings, load_table

__all__ = [
    "CompressBatch",
    "EmbedBatch",
    "ParquetFiles",
    "as_array",
    "codes_info",
    "compress_shards",
    "dataset_from_array",
    "decompress_shards",
    "embed_texts",
    "load_embeddings",
    "load_table",
]
