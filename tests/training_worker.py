"""One rank of a training run that keeps what the tests compare: its final weights, and the rows that it is given.

    torchrun --nproc-per-node 2 tests/training_worker.py '{"embeddings": ..., "output": ..., "arguments": {...}}'
"""

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rqmoe_hf import RQMoEConfig
from rqmoe_hf.data import load_embeddings
from rqmoe_hf.training import RQMoETrainer, RQMoETrainingArguments, train_quantizer


def write_slowly() -> None:
    """From now on a rank's random numbers are only half in their file for a while."""
    save = torch.save

    def slowly(state, file, *arguments, **options):
        if "rng_state" not in str(file):
            return save(state, file, *arguments, **options)
        save(state, whole := io.BytesIO())
        with open(file, "wb") as opened:
            opened.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            opened.flush()
            time.sleep(0.3)
            opened.write(whole.getvalue()[len(whole.getvalue()) // 2 :])

    torch.save = slowly


def main(job: dict) -> None:
    """Trains by the package's own loop, then walks through one epoch of this rank's data loader."""
    output = Path(job["output"])
    args = RQMoETrainingArguments(output_dir=str(output), report_to=[], disable_tqdm=True, **job["arguments"])
    if job.get("slow_rank") == args.process_index:
        write_slowly()
    dataset = load_embeddings(job["embeddings"], streaming=job.get("streaming", False))
    held_out = load_embeddings(job["held_out"])
    model = train_quantizer(RQMoEConfig(**job["config"]), dataset, held_out, args)
    weights = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, output / f"rank-{args.process_index}.safetensors")
    if job.get("streaming"):
        trainer = RQMoETrainer(model=model, args=args, train_dataset=dataset, eval_dataset=held_out)
        loader = trainer.get_train_dataloader()
        rows = np.concatenate([batch["embeddings"].cpu().numpy() for batch in loader])
        np.save(output / f"rank-{args.process_index}.npy", rows)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
