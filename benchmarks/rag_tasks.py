"""Retrieval of known items (`tasks.py`) through LangChain: our store beside its in-memory store of floats."""

import time

import numpy as np
from rivals.family import Ours
from tasks import Tasks

CHUNK = 4_096
TOP_K = 10


def name_of(given: str | None) -> str:
    """The name of a quantizer in the results; None is the in-memory store."""
    return "InMemoryVectorStore, floats" if given is None else Ours(given).name


def measure(given: str | None, tasks: Tasks, queries: int) -> dict:
    """Retrieves the first so many known items, one by one as a retriever does.

    Args:
        given: A quantizer of ours, or None for langchain_core's `InMemoryVectorStore`.
        tasks: Embeddings of queries and documents.
        queries: How many.
    """
    store, bytes_per_vector = make_store(given, tasks)
    start = time.perf_counter()
    for first in range(0, len(tasks.documents), CHUNK):
        rows = [str(row) for row in range(first, min(first + CHUNK, len(tasks.documents)))]
        store.add_texts(rows, ids=rows)
    added = time.perf_counter()
    found = [
        [int(document.id) for document in store.similarity_search_by_vector(query, k=TOP_K)]
        for query in tasks.queries[:queries]
    ]
    return {
        "method": name_of(given),
        "bytes": bytes_per_vector,
        "documents": len(tasks.documents),
        "queries": len(found),
        "known_item_ndcg_at_10": ndcg(found, tasks.relevant[:queries]),
        "add_seconds": round(added - start, 1),
        "milliseconds_per_query": round(1e3 * (time.perf_counter() - added) / len(found), 2),
    }


def make_store(given: str | None, tasks: Tasks):
    """An empty store whose texts are row numbers, and the bytes that it keeps of a vector."""
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import InMemoryVectorStore

    from rqmoe_hf.integrations.langchain import RQMoEVectorStore

    class Known(Embeddings):
        """Looks embeddings up: a text is the number of its row."""

        def embed_documents(self, texts: list[str]) -> list[np.ndarray]:
            return list(tasks.documents[[int(text) for text in texts]])

        def embed_query(self, text: str) -> np.ndarray:
            return tasks.queries[int(text)]

    if given is None:
        return InMemoryVectorStore(Known()), 4 * tasks.documents.shape[1]
    quantizer = Ours(given)
    return RQMoEVectorStore(Known(), quantizer.model, num_codebooks=quantizer.codes), -(-quantizer.code_bits // 8)


def ndcg(found: list[list[int]], relevant: list[list[int]]) -> float:
    """nDCG@10; a document is relevant or not."""
    discounts = 1 / np.log2(np.arange(2, TOP_K + 2))
    gains = []
    for row, wanted in zip(found, relevant, strict=True):
        match = np.array([document in wanted for document in row])
        gains.append(discounts[: len(row)][match].sum() / discounts[: len(wanted)].sum())
    return float(np.mean(gains))
