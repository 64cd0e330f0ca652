"""Embedding compression with RQ-MoE: 8 to 64 bytes per vector, as ordinary Hugging Face models."""

from transformers import AutoConfig, AutoModel

from .bundled import bundled_quantizers, load_quantizer
from .codes import bytes_per_vector, pack_codes, truncate_codes, unpack_codes
from .configuration_rqmoe import RQMoEConfig
from .modeling_rqmoe import RQMoEDecoderOutput, RQMoEEncoderOutput, RQMoEModel, RQMoEOutput
from .search import quantize_embeddings, semantic_search

AutoConfig.register("rqmoe", RQMoEConfig, exist_ok=True)
AutoModel.register(RQMoEConfig, RQMoEModel, exist_ok=True)

__version__ = "0.1.0"
__all__ = [
    "RQMoEConfig",
    "RQMoEDecoderOutput",
    "RQMoEEncoderOutput",
    "RQMoEModel",
    "RQMoEOutput",
    "bundled_quantizers",
    "bytes_per_vector",
    "load_quantizer",
    "pack_codes",
    "quantize_embeddings",
    "semantic_search",
    "truncate_codes",
    "unpack_codes",
]
