"""A GPU gives what the processor gives."""

import numpy as np
import pytest
import torch
from conftest import MEMBERS, randomize

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.data import load_embeddings
from rqmoe_hf.training import RQMoETrainingArguments, initialize, train_quantizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BLOCKS = {"hidden_size": 16, "num_codebooks": 5, "codebook_sizes": [16, 16, 4, 32, 8], "codebook_size": 32}
KINDS = MEMBERS | {
    "local search": RQMoEConfig.additive(**BLOCKS, local_search=4),
    "blocks": RQMoEConfig.additive(**BLOCKS, local_search=4, search_blocks=[3, 2]),
}


@pytest.fixture(params=list(KINDS))
def pair(request) -> tuple[RQMoEModel, RQMoEModel]:
    """The same quantizer on the processor and on the GPU."""
    models = [randomize(RQMoEModel(KINDS[request.param])) for _ in range(2)]
    return models[0], models[1].cuda()


def test_codes_and_reconstructions_are_those_of_the_processor(pair, clustered):
    cpu, gpu = pair
    codes, found = cpu.compress(clustered[:2000]), gpu.compress(clustered[:2000])
    assert (codes == found).all(axis=1).mean() > 0.999
    errors = [np.square(clustered[:2000] - cpu.decompress(some)).sum(axis=1).mean() for some in (codes, found)]
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-4)
    np.testing.assert_allclose(gpu.decompress(codes), cpu.decompress(codes), atol=1e-4)


def test_codes_do_not_depend_on_the_batch(pair, clustered):
    together = pair[1].compress(clustered[:3000])
    np.testing.assert_array_equal(
        together[:50], np.concatenate([pair[1].compress(clustered[i : i + 1]) for i in range(50)])
    )


def test_weights_come_back_from_a_file_of_a_gpu_model(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    for name, weight in RQMoEModel.from_pretrained(tmp_path).state_dict().items():
        torch.testing.assert_close(weight, pair[0].state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [None, [2, 2]])
def test_lsq_is_as_good_as_on_the_processor(clustered, blocks):
    config = RQMoEConfig.additive(
        hidden_size=16, num_codebooks=4, codebook_size=32, local_search=8, search_blocks=blocks
    )
    errors = []
    for device in ("cpu", "cuda"):
        model = initialize(RQMoEModel(config).to(device), clustered[:5000], "lsq", rounds=25, show_progress_bar=False)
        assert model.codebooks.device.type == device
        restored = model.eval().decompress(model.compress(clustered[5000:]))
        errors.append(np.square(clustered[5000:] - restored).sum(axis=1).mean())
    assert errors[1] < 1.1 * errors[0]  # two local optima of random starts


@pytest.mark.parametrize("init", ["rq", "lsq"])
def test_training_lowers_the_error(clustered, tmp_path, init):
    config = RQMoEConfig(hidden_size=16, num_codebooks=4, codebook_size=20, intermediate_size=32)
    train, held_out = load_embeddings(clustered[:5000]), load_embeddings(clustered[5000:])
    args = RQMoETrainingArguments(
        str(tmp_path / "run"), num_train_epochs=3, per_device_train_batch_size=128, report_to="none", bf16=True
    )
    before = initialize(RQMoEModel(config).cuda(), clustered[:5000], init, show_progress_bar=False).eval()
    trained = train_quantizer(config, train, held_out, args, init)
    assert trained.codebooks.is_cuda
    errors = [
        np.square(clustered[5000:] - model.decompress(model.compress(clustered[5000:]))).sum(axis=1).mean()
        for model in (before, RQMoEModel.from_pretrained(tmp_path / "run").eval())
    ]
    assert errors[1] < errors[0]
