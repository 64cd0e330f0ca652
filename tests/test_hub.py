"""Sharing over a real HTTP Hub on loopback: unmodified clients, each in a process and with a cache of its own."""

import json
import re
import shutil
import site
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard, ModelCard

from rqmoe_hf import RQMoEModel, bundled_quantizers
from rqmoe_hf.hub.cards import is_generated
from rqmoe_hf.hub.codes import origin
from rqmoe_hf.hub.push import write_repository


@pytest.fixture(scope="module")
def just_trained(tmp_path_factory, clustered) -> RQMoEModel:
    """A small quantizer as training returns it."""
    from rqmoe_hf import RQMoEConfig
    from rqmoe_hf.data import dataset_from_array
    from rqmoe_hf.training import RQMoETrainingArguments, train_quantizer

    folder = tmp_path_factory.mktemp("trained") / "small"
    config = RQMoEConfig(hidden_size=16, num_codebooks=3, codebook_size=16, intermediate_size=8, base_model="org/tiny")
    arguments = RQMoETrainingArguments(output_dir=str(folder), num_train_epochs=1, report_to="none", disable_tqdm=True)
    train, test = dataset_from_array(clustered[2000:]), dataset_from_array(clustered[:2000])
    vectors = train.with_format("torch"), test.with_format("torch")
    return train_quantizer(config, *vectors, arguments, description="Made up.")


@pytest.fixture(scope="module")
def small(just_trained) -> Path:
    """Its folder, with evaluation and training notes."""
    return Path(just_trained.name_or_path)


PUSH = """
    from rqmoe_hf import RQMoEModel
    RQMoEModel.from_pretrained({folder!r}).push_to_hub({repo!r}, **{options!r})
"""
LOAD = """
    import numpy as np, rqmoe_hf
    from transformers import AutoModel
    model = AutoModel.from_pretrained({repo!r}, **{options!r})
    np.save({output!r}, model.compress(np.load({vectors!r})))
"""


def push(client, folder, repo, **options):
    return client(PUSH.format(folder=str(folder), repo=repo, options=options))


def compressed(client, tmp_path, clustered, repo, home="loader", **options) -> np.ndarray:
    np.save(tmp_path / "vectors.npy", clustered[:200])
    client(LOAD.format(repo=repo, options=options, output=str(tmp_path / "codes.npy"),
                       vectors=str(tmp_path / "vectors.npy")), home=home)  # fmt: skip
    return np.load(tmp_path / "codes.npy")


def test_push_sends_everything_in_one_commit_and_codes_survive(hub, client, small, clustered, tmp_path):
    push(client, small, "org/small")
    repository = hub.repositories["model", "org/small"]
    assert list(repository.messages.values()) == ["initial commit", "Upload quantizer"]
    files = hub.files("org/small")
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors", "evaluation.json",
                          "training.json", "training_log.json"}  # fmt: skip
    card = files["README.md"].content.decode()
    assert "# RQ-MoE quantizer for tiny" in card and "library_name: rqmoe_hf" in card and "model-index:" in card
    here = RQMoEModel.from_pretrained(small).eval()
    np.testing.assert_array_equal(compressed(client, tmp_path, clustered, "org/small"), here.compress(clustered[:200]))


def test_the_bundled_quantizer_brings_its_results(hub, client):
    name = "minilm-384-32-bytes"
    client(f"from rqmoe_hf import load_quantizer; load_quantizer({name!r}).push_to_hub('org/{name}')")
    files, folder = hub.files(f"org/{name}"), bundled_quantizers()[name]
    assert ".eval_results/stsbenchmark-sts.yaml" in files
    for name in (".eval_results/stsbenchmark-sts.yaml", "evaluation.json", "training.json", "recipe.yaml"):
        assert files[name].content == (folder / name).read_bytes(), name
    assert len(files["model.safetensors"].content) == (folder / "model.safetensors").stat().st_size  # not twice it
    card = files["README.md"].content.decode()
    assert 'RQMoEQuantizer.from_pretrained("org/minilm-384-32-bytes")' in card
    assert card.split("## Results")[1] == (folder / "README.md").read_text("utf-8").split("## Results")[1].replace(
        *(re.search(r"text \w+\.", text)[0] for text in ((folder / "README.md").read_text("utf-8"), card))
    )


def test_saving_can_push_too(hub, client, small):
    client(f"""
        from rqmoe_hf import RQMoEModel
        model = RQMoEModel.from_pretrained({str(small)!r})
        settings = dict(commit_message="Saved", private=True, token="hf_given", tags=["mine"])
        model.save_pretrained("here", push_to_hub=True, repo_id="org/saved", **settings)
        RQMoEModel.from_pretrained("here")
    """)
    repository = hub.repositories["model", "org/saved"]
    assert list(repository.messages.values()) == ["initial commit", "Saved"] and repository.private
    card = hub.files("org/saved")["README.md"].content.decode()
    assert "# RQ-MoE quantizer for tiny" in card and "- mine\n" in card
    assert "Bearer hf_given" in hub.tokens


def test_branch_tag_and_commit(hub, client, small, clustered, tmp_path):
    push(client, small, "org/versions")
    first = hub.repositories["model", "org/versions"].branches["main"]
    client("from huggingface_hub import HfApi; HfApi().create_tag('org/versions', tag='v1')")
    other = RQMoEModel.from_pretrained(small)
    other.mean.data += 1.0
    other.save_pretrained(tmp_path / "other")
    push(client, tmp_path / "other", "org/versions", revision="experiment")
    push(client, tmp_path / "other", "org/versions")
    old = RQMoEModel.from_pretrained(small).eval().compress(clustered[:200])
    new = RQMoEModel.from_pretrained(tmp_path / "other").eval().compress(clustered[:200])
    assert (old != new).any()
    expected = {"v1": old, first: old, "experiment": new, "main": new}
    np.save(tmp_path / "vectors.npy", clustered[:200])
    client(
        f"""
        import numpy as np
        from rqmoe_hf import RQMoEModel
        for revision in {list(expected)!r}:
            model = RQMoEModel.from_pretrained("org/versions", revision=revision)
            np.save(revision, model.compress(np.load("vectors.npy")))
        """,
        home="loader",
    )
    for revision, codes in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{revision}.npy"), codes)


def test_a_card_that_was_edited_is_kept_and_one_that_was_not_is_renewed(hub, client, small, tmp_path):
    push(client, small, "org/cards")
    generated = hub.files("org/cards")["README.md"].content
    measured = json.loads((small / "evaluation.json").read_text("utf-8"))
    changed = tmp_path / "changed"
    RQMoEModel.from_pretrained(small).save_pretrained(changed)
    measured["reports"][-1]["mse"] = 12.34
    (changed / "evaluation.json").write_text(json.dumps(measured), "utf-8")
    push(client, changed, "org/cards")  # nobody has edited the card: it follows the evaluation
    renewed = hub.files("org/cards")["README.md"].content
    assert b"12.3" in renewed and b"12.3" not in generated

    edit = """
        from huggingface_hub import ModelCard
        card = ModelCard.load("org/cards"); card.text += "\\nA sentence that a person wrote."
        card.push_to_hub("org/cards")
    """
    client(edit)
    assert "has a card of its own, which is kept" in push(client, small, "org/cards").stderr
    kept = hub.files("org/cards")["README.md"].content.decode()
    assert "A sentence that a person wrote." in kept and "12.3" in kept
    push(client, small, "org/cards", replace_card=True)
    assert hub.files("org/cards")["README.md"].content == generated

    (changed / "README.md").write_text("---\nlicense: mit\n---\nMy own card.\n", "utf-8")
    push(client, changed, "org/own-card")
    assert hub.files("org/own-card")["README.md"].content.decode().rstrip().endswith("My own card.")


def test_a_model_straight_from_training_knows_its_results(just_trained, small, tmp_path):
    write_repository(just_trained, tmp_path, "org/straight")
    for name in ("evaluation.json", "training.json", "training_log.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes(), name
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "## Results" in card and "Made up." in card and "org/tiny" in card
    assert ModelCard(card).data.license == "apache-2.0" and "this checkpoint its own training" in card


def test_weights_that_were_not_trained_here_have_the_licence_that_is_given(hub, client, small, tmp_path):
    RQMoEModel.from_pretrained(small).save_pretrained(tmp_path / "converted")
    tuned = shutil.copytree(tmp_path / "converted", tmp_path / "tuned")
    notes = json.loads((small / "training.json").read_text("utf-8"))
    (tuned / "training.json").write_text(json.dumps(notes | {"started_from": "converted"}), "utf-8")
    for folder in ("converted", "tuned"):
        write_repository(RQMoEModel.from_pretrained(tmp_path / folder), tmp_path / "pushed", "org/converted")
        card = (tmp_path / "pushed" / "README.md").read_text("utf-8")
        assert ModelCard(card).data.license is None and "own training" not in card, folder
    command = """
        from rqmoe_hf.cli import app
        app(["push", "converted", "org/licensed", "--license", {!r}], standalone_mode=False)
    """
    client(command.format("cc-by-nc-4.0"))
    card = hub.files("org/licensed")["README.md"].content.decode()
    assert ModelCard(card).data.license == "cc-by-nc-4.0" and is_generated(card)
    (tmp_path / "converted" / "README.md").write_text("My own card.\n", "utf-8")
    client(command.format("mit"))
    card = hub.files("org/licensed")["README.md"].content.decode()
    assert ModelCard(card).data.license == "mit" and "My own card." in card


def test_a_quantizer_that_was_pulled_is_pushed_with_all_that_lay_beside_it(hub, client, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "small", ignore=shutil.ignore_patterns("checkpoint-*"))
    (folder / "recipe.yaml").write_text("epochs: 1\n", "utf-8")
    push(client, folder, "org/first", private=True)
    before = hub.files("org/first")
    client("""
        from rqmoe_hf import RQMoEModel
        model = RQMoEModel.from_pretrained("org/first", token="hf_given")
        for name in ("org/first", "org/second"):
            model.push_to_hub(name, token="hf_given")
    """, home="reader", HF_TOKEN="")  # fmt: skip
    assert hub.files("org/first") == before
    for name in ("evaluation.json", "training.json", "training_log.json", "recipe.yaml"):
        assert hub.files("org/second")[name].content == (folder / name).read_bytes(), name
    assert b"Made up." in hub.files("org/second")["README.md"].content
    said = client("""
        from rqmoe_hf import RQMoEModel
        model = RQMoEModel.from_pretrained("org/first", token="hf_given")
        model.commit_hash = "0" * 40
        model.push_to_hub("org/third", token="hf_given")
    """).stderr
    assert f"org/first at revision {'0' * 40}" in said and "without evaluation" in said
    model = RQMoEModel.from_pretrained(small)
    model.name_or_path, model.commit_hash = "org/first", "0" * 40
    with pytest.raises(FileNotFoundError):  # this process is offline
        write_repository(model, tmp_path / "offline", "org/offline")


def test_numbers_of_other_weights_are_shown_nowhere(hub, client, small, clustered, tmp_path):
    model = RQMoEModel.from_pretrained(small)
    model.codebooks.data *= 1.5
    model.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "evaluation.json").write_text((small / "evaluation.json").read_text("utf-8"), "utf-8")
    hub.put_folder("org/tuned", bundled_quantizers()["minilm-384-32-bytes"])  # whose figures are others
    said = push(client, tmp_path / "tuned", "org/tuned").stderr
    assert "was measured with other weights" in said
    assert set(hub.files("org/tuned")) == {"README.md", "config.json", "model.safetensors"}
    card = hub.files("org/tuned")["README.md"].content.decode()
    assert "## Results" not in card and "## Training" not in card
    np.save(tmp_path / "vectors.npy", clustered[:400])
    shown = client("""
        from rqmoe_hf.cli import app
        from rqmoe_hf.hub import write_card
        app(["info", "tuned"], standalone_mode=False)
        app(["evaluate", "vectors.npy", "--model", "tuned"], standalone_mode=False)
        write_card("tuned")
    """)
    assert shown.stderr.count("evaluation.json of tuned was measured with other weights") == 3, shown.stderr
    assert "recall@10  0" not in shown.stdout and "Verdict" not in shown.stdout
    assert "## Results" not in (tmp_path / "tuned" / "README.md").read_text("utf-8")


def test_code_in_the_repository_runs_without_the_package(hub, client, small, clustered, tmp_path):
    push(client, small, "org/with-code", include_code=True)
    files = hub.files("org/with-code")
    parts = ("modeling", "pretrained", "configuration", "encoding", "decoding")
    assert {f"{part}_rqmoe.py" for part in parts} | {"codes.py"} <= set(files)
    assert "auto_map" not in json.loads((small / "config.json").read_text("utf-8"))
    np.save(tmp_path / "vectors.npy", clustered[:200])
    loader = f"""
        try:
            import rqmoe_hf.modeling_rqmoe
            raise SystemExit("the package is installed")
        except ModuleNotFoundError:
            pass
        import numpy as np
        from transformers import AutoModel
        model = AutoModel.from_pretrained("org/with-code", trust_remote_code=True)
        codes = model.compress(np.load({str(tmp_path / "vectors.npy")!r}))
        np.save({str(tmp_path / "codes.npy")!r}, codes)
        model.push_to_hub("org/copied")
    """
    # Plain site-packages on the path, without the .pth files through which this checkout is installed.
    client(loader, python_flags=["-S"], PYTHONPATH=":".join(site.getsitepackages()))
    here = RQMoEModel.from_pretrained(small).eval()
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), here.compress(clustered[:200]))
    assert "model.safetensors" in hub.files("org/copied")


def test_a_push_that_is_cut_off_leaves_nothing_and_the_next_succeeds(hub, client, small, clustered, tmp_path):
    code = PUSH.format(folder=str(small), repo="org/cut", options={})
    for broken in ("/lfs/", "/commit/"):
        hub.drop[broken] = 500
        failed = client(code, check=False)
        assert failed.returncode != 0
        assert set(hub.files("org/cut")) == {".gitattributes"}, broken
        hub.drop.clear()
    client(code)
    assert "model.safetensors" in hub.files("org/cut")
    hub.drop["model.safetensors"] = 1000  # now the way down, with the cache of the try before
    np.save(tmp_path / "vectors.npy", clustered[:200])
    load = LOAD.format(repo="org/cut", options={}, output=str(tmp_path / "codes.npy"),
                       vectors=str(tmp_path / "vectors.npy"))  # fmt: skip
    failed = client(load, home="down", check=False)
    assert failed.returncode != 0 and not (tmp_path / "codes.npy").exists()
    hub.drop.clear()
    here = RQMoEModel.from_pretrained(small).eval()
    np.testing.assert_array_equal(
        compressed(client, tmp_path, clustered, "org/cut", home="down"), here.compress(clustered[:200])
    )


def test_the_command_line_shares_and_describes(hub, client, small):
    command = "import sys; from rqmoe_hf.cli import main; sys.argv = {!r}; main()"
    said = client(command.format(["rqmoe", "push", str(small), "org/from-cli", "-m", "First"])).stdout
    assert f"Pushed: {hub.url}/org/from-cli/commit/" in said
    assert list(hub.repositories["model", "org/from-cli"].messages.values())[-1] == "First"
    shown = client(command.format(["rqmoe", "info", "org/from-cli"])).stdout
    assert "3 x 16 codewords, 12 bits" in shown and "among 1,800 vectors" in shown
    missing = client(command.format(["rqmoe", "info", "org/nothing-here"]), check=False)
    assert missing.returncode == 1 and "org/nothing-here" in missing.stderr and "Traceback" not in missing.stderr


def test_codes_as_a_data_set(hub, client, small, clustered, tmp_path):
    model = RQMoEModel.from_pretrained(small).eval()
    whole, short = model.compress(clustered[:500]), model.compress(clustered[:300], num_codebooks=2)
    np.savez(tmp_path / "codes.npz", whole=whole, short=short)
    push(client, small, "org/small")
    shared = client("""
        import numpy as np
        from rqmoe_hf import RQMoEModel
        from rqmoe_hf.hub import push_codes_to_hub
        codes = np.load("codes.npz")
        model = RQMoEModel.from_pretrained("org/small")
        for rows in (50, 500):  # what was first pushed is replaced, and the last push says so
            push_codes_to_hub(codes["whole"][:rows], "org/codes", model, ids=[f"text {row}" for row in range(rows)])
            push_codes_to_hub(codes["short"], "org/codes", model, num_codebooks=2)
        print(model.commit_hash)
    """)
    files = hub.files("org/codes", "dataset")
    assert {path for path in files if path.endswith("parquet")} == {
        "3x16/train-00000-of-00001.parquet", "2x16/train-00000-of-00001.parquet"}  # fmt: skip
    assert shared.stdout.strip() == hub.repositories["model", "org/small"].branches["main"]
    card = files["README.md"].content.decode()
    for row in (("3x16", "500", "2"), ("2x16", "300", "1")):
        assert f"| {' | '.join(row)} | org/small | {shared.stdout.strip()} |" in card

    client("""
        import numpy as np, pyarrow as pa
        from datasets import load_dataset
        from rqmoe_hf import RQMoEModel
        from rqmoe_hf.hub import load_codes, push_codes_to_hub
        codes, model = np.load("codes.npz"), RQMoEModel.from_pretrained("org/small")
        whole = load_codes("org/codes", model, "3x16")
        assert whole[:]["codes"].dtype == np.uint8
        np.testing.assert_array_equal(whole[:]["codes"], codes["whole"])
        assert whole[7]["id"] == "text 7"
        np.testing.assert_array_equal(load_codes("org/codes", model, "2x16")[:]["codes"], codes["short"])
        plain = load_dataset("org/codes", "3x16", split="train")  # whoever has only datasets
        assert plain.data.schema.field("codes").type == pa.list_(pa.uint8(), 2)
        assert plain[3]["codes"] == codes["whole"][3].tolist()
        for name in (None, "9x16"):
            try:
                load_codes("org/codes", model, name)
                raise SystemExit("loaded a configuration that does not exist")
            except ValueError as error:
                assert "which are 2x16, 3x16" in str(error), error
        for codes_, options, message in (
            (codes["whole"], {"ids": [1, 2]}, "There are 2 ids for 500 codes"),
            (codes["whole"], {"config_name": "../up"}, "config_name must be letters"),
            (codes["whole"].astype(np.int64), {}, "expects packed codes"),
        ):
            try:
                push_codes_to_hub(codes_, "org/bad", model, **options)
                raise SystemExit(f"pushed {options}")
            except ValueError as error:
                assert message in str(error), error
        model.mean += 1
        try:
            load_codes("org/codes", model, "3x16")
            raise SystemExit("another quantizer was accepted")
        except ValueError as error:
            assert "were made by org/small at revision" in str(error), error
    """, home="reader")  # fmt: skip
    assert ("dataset", "org/bad") not in hub.repositories
    snippet = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    client(f"{snippet}\nassert restored.shape == (2, 16)", home="snippet")


def test_codes_of_a_command_keep_their_ids_and_an_edited_card_its_text(hub, client, small, clustered, tmp_path):
    model = str(small)
    Dataset.from_dict({"id": list(range(400)), "embeddings": clustered[:400].tolist()}).to_parquet(
        tmp_path / "x.parquet"
    )
    said = client(f"""
        from datasets import load_dataset
        from huggingface_hub import DatasetCard
        from rqmoe_hf import RQMoEModel
        from rqmoe_hf.cli import app
        from rqmoe_hf.hub import load_codes
        def rqmoe(*arguments):
            app(list(arguments), standalone_mode=False)
        rqmoe("push", {model!r}, "org/named")
        rqmoe("compress", "x.parquet", "-o", "codes", "--model", "org/named", "--shard-size", "150")
        rqmoe("push", "codes", "org/more-codes", "--model", "org/named")
        card = DatasetCard.load("org/more-codes")
        card.text = "Written by a person."
        card.data["configs"].append({{"config_name": "texts", "data_files": "texts/*.csv"}})
        card.push_to_hub("org/more-codes")
        for name in ("again", "third", "again"):
            rqmoe("push", "codes", "org/more-codes", "--model", "org/named", "--config-name", name)
        quantizer = RQMoEModel.from_pretrained("org/named")
        assert load_codes("org/more-codes", quantizer, "again")[:]["id"] == list(range(400))
        assert load_codes("codes", RQMoEModel.from_pretrained({model!r}))[:]["id"] == list(range(400))
        assert len(load_dataset("org/more-codes", "again", split="train")) == 400
        try:
            rqmoe("push", "codes", "org/more-codes", "--model", {model!r})
            raise SystemExit("codes of a quantizer that nobody else can load were pushed")
        except ValueError as error:
            print(error)
    """).stdout  # fmt: skip
    assert "Nobody else could decode these codes" in said
    card = hub.files("org/more-codes", "dataset")["README.md"].content.decode()
    assert "Written by a person." in card
    assert {entry["config_name"]: entry["data_files"] for entry in DatasetCard(card).data["configs"]} == {
        "3x16": "3x16/*.parquet", "again": "again/*.parquet", "third": "third/*.parquet", "texts": "texts/*.csv",
    }  # fmt: skip


def test_a_commit_is_recorded_only_with_its_own_repository(small):
    model = RQMoEModel.from_pretrained(small)
    assert origin(model, "org/copy") == {"model": "org/copy", "revision": None}
    model.name_or_path, model.commit_hash = "org/small", "0" * 40
    for name in (None, "org/small"):
        assert origin(model, name) == {"model": "org/small", "revision": "0" * 40}
    assert origin(model, "org/copy") == {"model": "org/copy", "revision": None}


def test_a_combined_model_travels_through_the_hub(hub, client, encoder):
    hub.put_folder("org/another-encoder", encoder)
    said = client("""
        import json
        from sentence_transformers import SentenceTransformer
        from rqmoe_hf.st import RQMoEQuantizer
        model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2", device="cpu")
        model.append(RQMoEQuantizer.from_pretrained("minilm-384-32-bytes"))
        model.push_to_hub("org/combined")
        texts = ["how do I read a csv file", "a short text"]
        json.dump(model.encode(texts, quantize="codes").tolist(), open("codes.json", "w"))
        SentenceTransformer("org/another-encoder", device="cpu").append(model[-1])
    """).stderr
    assert "embeddings of sentence-transformers/all-MiniLM-L6-v2, but the encoder is org/another-encoder" in said
    files = hub.files("org/combined")
    assert "rqmoe-hf" in json.loads(files["config_sentence_transformers.json"].content)["requirements"]
    card = files["README.md"].content.decode()
    assert "RQMoEQuantizer" in card and "- rqmoe\n" in card and "base_model: sentence-transformers/all-" in card
    snippet = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    assert "org/combined" in snippet
    client(f"{snippet}\nassert restored.shape == (2, 384) and codes.shape == (2, 32)", home="snippet")
    client("""
        import json
        from sentence_transformers import SentenceTransformer
        from rqmoe_hf import RQMoEModel
        model = SentenceTransformer("org/combined", device="cpu", trust_remote_code=True)
        codes = model.encode(["how do I read a csv file", "a short text"], quantize="codes")
        assert codes.tolist() == json.load(open("codes.json"))
        assert RQMoEModel.from_pretrained("org/combined", subfolder="3_RQMoEQuantizer").config.num_codebooks == 26
    """, home="elsewhere")  # fmt: skip
