"""The page over an index: in a real browser, and what its server refuses."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from conftest import COMMON, MEMBERS, ROOT, SIZE, randomize
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner
from webdriver import CHROMIUM, ENTER, Browser

from rqmoe_hf import RQMoEConfig, RQMoEModel
from rqmoe_hf.cli import app as command_line
from rqmoe_hf.index import RQMoEIndex
from rqmoe_hf.serve import LiveIndex, make_app
from rqmoe_hf.serve.connections import Connection
from rqmoe_hf.serve.guard import Workers
from rqmoe_hf.serve.live import Setting
from rqmoe_hf.training import initialize

HOSTILE = "<img src=x onerror=\"document.title='broken'\"></script><script>document.title='broken'</script> to copy"
VECTORS = 300


class Letters:
    """An encoder of no meaning, in which only like texts are alike."""

    def encode_query(self, texts):
        return np.stack([np.random.default_rng(list(text.encode())).normal(size=SIZE) for text in texts])

    encode_document = encode_query


def make_index(folder: Path, member: RQMoEConfig | str = "paper", **settings) -> RQMoEModel:
    """An index of 300 texts in a folder; its quantizer."""
    model = randomize(RQMoEModel(MEMBERS[member] if isinstance(member, str) else member))
    with RQMoEIndex(model, folder, encoder=Letters(), **settings) as index:
        texts = [f"text {number}" for number in range(VECTORS - 1)] + ["long " * 2000]
        ids = [2**60 + number for number in range(VECTORS)]
        index.add(texts=texts, ids=ids, metadata=[{"a": [1, "x" * 999]}] * VECTORS)
    return model


@contextmanager
def serving(live: LiveIndex, **arguments):
    """A server in this process; its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = make_app(live, **arguments)
    server = uvicorn.Server(uvicorn.Config(app, http=Connection, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def ask(port: int, path: str, body=None, method: str | None = None, **headers):
    """Status, headers and text of an answer."""
    sent = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method or ("GET" if body is None else "POST"), path, sent,
                           {"Content-Type": "application/json", **headers})  # fmt: skip
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def found(port: int, path: str, **body) -> dict:
    status, _, text = ask(port, path, body)
    assert status == 200, text
    return json.loads(text)


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> LiveIndex:
    folder = tmp_path_factory.mktemp("serve") / "index"
    return LiveIndex(folder, make_index(folder), Letters())


@pytest.fixture(scope="module")
def port(live):
    with serving(live) as port:
        yield port


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(encoder, passages, tmp_path_factory):
    """Where `rqmoe serve` serves an index of real texts, a hostile one among them, in a process of its own."""
    root = tmp_path_factory.mktemp("served")
    folder = root / "<b>notes"
    texts = [HOSTILE, *(passage[:80] for passage in passages[:119])]
    ids = ["</li><b>bold", *(f"passage {number}" for number in range(1, len(texts)))]
    metadata = [{"<i>name": "<svg onload=\"document.title='broken'\">"}] + [{"kind": "doc"}] * 119
    config = RQMoEConfig(num_codebooks=12, codebook_size=16, intermediate_size=8, instruction_size=8)
    vectors = SentenceTransformer(encoder, device="cpu").encode(texts)
    initialize(RQMoEModel(config), vectors).save_pretrained(root / "quantizer")
    with RQMoEIndex(str(root / "quantizer"), folder, encoder=encoder) as index:
        index.add(texts=texts, ids=ids, metadata=metadata)
    command = [sys.executable, "-m", "rqmoe_hf", "serve", str(folder), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_command_serves_on_loopback_only(address):
    port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)", address)[1])
    assert ask(port, "/")[0] == 200
    assert ask(port, "/", Host="evil.example")[0] == 421
    with pytest.raises(OSError):  # listening at all addresses would include this one
        socket.create_connection(("127.0.0.2", port), timeout=2)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium, chromium-driver)")
def test_the_page_in_a_browser(address, browser):
    recall = "return document.querySelector('#recall').textContent"
    compared = f"const shown = (() => {{ {recall} }})(); return shown !== '\u2013' && shown"
    browser.open(address)
    browser.wait("return document.title === '<b>notes - rqmoe'")
    assert "120 vectors of 384 dimensions" in browser.run("return document.querySelector('#summary').textContent")
    assert browser.run("return document.querySelector('#smaller').textContent") == "256\u00d7"

    browser.type("#query", "copy" + ENTER)
    browser.wait("return document.querySelectorAll('#hits > li').length === 10")
    assert "searched in" in browser.run("return document.querySelector('#status').textContent")
    hits = browser.run("return [...document.querySelectorAll('#hits > li')].map((hit) => hit.innerText)")
    hostile = next(hit for hit in hits if HOSTILE in hit)
    assert "</li><b>bold" in hostile
    assert "<i>name" in hostile
    assert "<svg onload=\"document.title='broken'\">" in hostile
    made_of_text = "#hits :is(img, script, svg, i), #hits b b, h1 b"
    assert browser.run("return document.querySelectorAll(arguments[0]).length", made_of_text) == 0

    move = "const slider = document.querySelector(arguments[0]); slider.value = arguments[1]; " \
           "slider.dispatchEvent(new Event('input'))"  # fmt: skip
    browser.run(move, "#shortlist", 99)
    browser.wait("return document.querySelector('#shortlist-words').textContent === 'all 120'")
    browser.wait(f"{recall} === '1.00'")
    browser.run(move, "#bytes", 0)
    browser.wait("return document.querySelector('#bytes-words').textContent === '1 B, 1 of 12 codes'")
    browser.wait("return document.querySelector('#lost li') && document.querySelector('#dots .missed')")
    assert float(browser.wait(compared)) < 1
    assert browser.run("return document.querySelector('#smaller').textContent") == "1536\u00d7"
    browser.run(move, "#bytes", 11)
    browser.wait(f"{recall} === '1.00'")

    assert browser.run("return document.title") == "<b>notes - rqmoe"
    assert browser.messages() == []
    browser.run("const script = document.createElement('script'); script.textContent = \"document.title = 'broken'\"; "
                "document.body.append(script)")  # fmt: skip
    assert browser.run("return document.title") == "<b>notes - rqmoe"  # the policy refuses what got in nevertheless
    assert "Content Security Policy" in browser.messages()[0]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium, chromium-driver)")
def test_the_page_says_why_joint_codes_cannot_be_cut_and_that_a_server_is_gone(browser, tmp_path):
    model = make_index(tmp_path / "joint", RQMoEConfig.additive(**COMMON, local_search=4))
    with serving(LiveIndex(tmp_path / "joint", model, Letters())) as port:
        browser.open(f"http://localhost:{port}")
        browser.wait("return document.title === 'joint - rqmoe'")
        assert browser.run("return document.querySelector('#bytes').checkVisibility()") is False
        assert "found together" in browser.run("return document.querySelector('#why-not-bytes').innerText")
    model = make_index(tmp_path / "blocks", RQMoEConfig.additive(**COMMON, local_search=4, search_blocks=[3, 1]))
    with serving(LiveIndex(tmp_path / "blocks", model, Letters())) as port:
        browser.open(f"http://localhost:{port}")
        browser.wait("return document.title === 'blocks - rqmoe'")
        assert "to whole blocks" in browser.run("return document.querySelector('#why-not-bytes').innerText")
        browser.run("const slider = document.querySelector('#bytes'); slider.stepDown(); "
                    "slider.dispatchEvent(new Event('input'))")  # fmt: skip
        assert "B, 3 of 4 codes" in browser.run("return document.querySelector('#bytes-words').textContent")
    browser.type("#query", "text 1" + ENTER)
    browser.wait("return document.querySelector('#status.error')?.textContent.includes('does not answer')")


# --- over HTTP -------------------------------------------------------------------------------------------------------


def test_hits_are_those_of_the_index(live, port):
    scores, ids = live.index.search(live.embed("text 7")[0], 5)
    answer = found(port, "/api/search", query="text 7", top_k=5)
    assert [hit["id"] for hit in answer["hits"]] == [str(id) for id in ids]
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], scores, rtol=1e-6)
    assert answer["hits"][0]["text"] == "text 7"
    assert len(answer["hits"][0]["metadata"][0][1]) < 250
    assert max(len(hit["text"]) for hit in found(port, "/api/search", query="x", top_k=100)["hits"]) <= 4001


def test_recall_counts_what_exact_search_finds(live, port):
    everything = found(port, "/api/compare", query="a query", shortlist=VECTORS)
    assert everything["recall"] == 1
    assert [hit["id"] for hit in everything["exact"]] == [
        str(id) for id in live.index.search(live.embed("a query")[0], 10, shortlist=VECTORS)[1]
    ]
    shorter = found(port, "/api/compare", query="a query", shortlist=VECTORS, num_codebooks=1)
    assert shorter["recall"] == sum(hit["found"] for hit in shorter["exact"]) / 10 < 1
    hits = found(port, "/api/search", query="a query", shortlist=VECTORS, num_codebooks=1)["hits"]
    assert {hit["id"] for hit in shorter["exact"] if hit["found"]} <= {hit["id"] for hit in hits}


def test_kept_floats_are_what_is_exact(tmp_path):
    model = make_index(tmp_path / "index", keep_floats=True)
    live = LiveIndex(tmp_path / "index", model, Letters())
    with serving(live) as port:
        assert found_index(port)["exact"] == "floats"
        vectors = Letters().encode_document([*(f"text {number}" for number in range(VECTORS - 1)), "long " * 2000])
        cosines = vectors @ Letters().encode_query(["q"])[0] / np.linalg.norm(vectors, axis=1)
        exact = found(port, "/api/compare", query="q", shortlist=10, num_codebooks=2)
        assert [int(hit["id"]) - 2**60 for hit in exact["exact"]] == np.argsort(-cosines)[:10].tolist()
        assert exact["recall"] < 1
        assert found(port, "/api/compare", query="q", shortlist=VECTORS, num_codebooks=2)["recall"] == 1
        assert found(port, "/api/compare", query="q", shortlist=VECTORS, rescore="codes")["recall"] < 1


def found_index(port: int) -> dict:
    return json.loads(ask(port, "/api/index")[2])


def test_what_another_writer_adds_is_found(tmp_path):
    model = make_index(tmp_path / "index")
    live = LiveIndex(tmp_path / "index", model, Letters())

    def texts(steps: int) -> list[str]:
        return [document.text for document in live.search("late", 1000, Setting(1000, steps)).documents]

    for steps in (4, 2):
        assert (len(texts(steps)), "late" in texts(steps)) == (VECTORS, False)
    before = live.compare("late", Setting(1000))
    with RQMoEIndex.load(tmp_path / "index", model, Letters()) as writer:
        writer.remove([document.id for document in before.exact])
        writer.add(texts=["late"])
    for steps in (4, 2):
        assert (len(texts(steps)), "late" in texts(steps)) == (VECTORS - 9, True)
    after = live.compare("late", Setting(1000))
    assert after.recall == 1
    assert not {document.id for document in after.exact} & {document.id for document in before.exact}


def test_a_large_index_is_searched_but_not_compared(tmp_path):
    live = LiveIndex(tmp_path / "index", make_index(tmp_path / "index"), Letters(), exact_up_to=VECTORS - 1)
    with serving(live) as port:
        described = found_index(port)
        assert (described["exact"], described["cuts"]) == (None, [4])
        assert "299" in described["why_not_exact"]
        assert found(port, "/api/search", query="text 7")["hits"]
        for path, more in (("/api/compare", {}), ("/api/search", {"num_codebooks": 2})):
            assert ask(port, path, {"query": "text 7", **more})[0] == 422


def test_codes_that_were_found_block_by_block_are_cut_to_whole_blocks(tmp_path):
    model = make_index(tmp_path / "index", RQMoEConfig.additive(**COMMON, local_search=4, search_blocks=[3, 1]))
    first = RQMoEIndex(model, num_codebooks=3, encoder=Letters())
    first.add(texts=[f"text {number}" for number in range(VECTORS - 1)], ids=[2**60 + n for n in range(VECTORS - 1)])
    with serving(LiveIndex(tmp_path / "index", model, Letters())) as port:
        assert found_index(port)["cuts"] == [3, 4]
        hits = found(port, "/api/search", query="text 7", num_codebooks=3)["hits"]
        ids = first.search(Letters().encode_query(["text 7"])[0], 10)[1]
        assert [int(hit["id"]) for hit in hits] == ids.tolist()
        status, _, text = ask(port, "/api/search", {"query": "text 7", "num_codebooks": 2})
        assert (status, json.loads(text)["error"]) == (422, "num_codebooks must be 3 or 4, got 2.")


def test_an_empty_index(tmp_path):
    model = randomize(RQMoEModel(MEMBERS["paper"]))
    RQMoEIndex(model, tmp_path / "index").close()
    with serving(LiveIndex(tmp_path / "index", model, Letters())) as port:
        assert found(port, "/api/search", query="x", num_codebooks=2)["hits"] == []
        assert found(port, "/api/compare", query="x")["recall"] is None


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"query": ""}, 422, "The query is empty"),
        ({"query": " \n\t"}, 422, "The query is empty"),
        ({"query": "x" * 2001}, 422, "query: String should have at most 2000 characters"),
        ({"query": 5}, 422, "query: Input should be a valid string"),
        ({}, 422, "query: Field required"),
        ([], 422, "body: "),
        ({"query": "x", "top_k": 0}, 422, "top_k: Input should be greater than or equal to 1"),
        ({"query": "x", "top_k": 101}, 422, "top_k: Input should be less than or equal to 100"),
        ({"query": "x", "top_k": "5"}, 422, "top_k: Input should be a valid integer"),
        ({"query": "x", "top_k": 1e400}, 422, "top_k: "),
        ({"query": "x", "shortlist": 10_001}, 422, "shortlist: Input should be less than or equal to 10000"),
        ({"query": "x", "num_codebooks": 5}, 422, "num_codebooks must lie between 1 and 4, got 5"),
        ({"query": "x", "rescore": "floats"}, 422, "rescore must be one of codes, tables, got floats"),
        ({"query": "x", "rescore": "magic"}, 422, "rescore: "),
        ({"query": "x", "limit": 5}, 422, "limit: Extra inputs are not permitted"),
        ('{"query": "\\ud800"}', 422, "query: "),
        ("{", 422, "JSON decode error"),
        ("[" * 16_000, 400, ""),
        (b"\xff\xfe", 422, "JSON decode error"),
        ("x" * 16_385, 413, "at most 16,384 bytes"),
    ],
)
def test_bad_requests_get_a_readable_error(port, body, status, message):
    for path in ("/api/search", "/api/compare"):
        answered, headers, text = ask(port, path, body)
        assert (answered, list(json.loads(text))) == (status, ["error"]), text
        assert message in json.loads(text)["error"]
        assert "Traceback" not in text
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_queries_may_be_anything_that_is_text(port):
    for query in (HOSTILE, "\x00", "'; DROP TABLE vectors; --", "雪" * 2000, "\u202eleft", "💥", "%s {0}"):
        assert len(found(port, "/api/search", query=query)["hits"]) == 10


def test_other_sites_can_neither_ask_nor_frame_the_page(port):
    body = {"query": "x"}
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost@evil.example", "[", ""):
        status, _, text = ask(port, "/api/search", body, Host=host)
        assert status in (400, 421), host
        assert status == 400 or "answers to" in json.loads(text)["error"]
    for host in ("localhost", f"LOCALHOST:{port}", "[::1]:1"):
        assert ask(port, "/api/search", body, Host=host)[0] == 200
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/json ;charset=UTF-8"):
        assert ask(port, "/api/search", body, **{"Content-Type": kind})[0] == 200
    unasked = ("text/plain", "application/x-www-form-urlencoded", "")  # what browsers send to other sites
    for kind in (*unasked, "text/plain; application/json", "text/plain;charset=application/json"):
        assert ask(port, "/api/search", body, **{"Content-Type": kind})[0] == 415
    _, headers, page = ask(port, "/")
    assert "Access-Control-Allow-Origin" not in headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert not re.search(r"https?://|innerHTML|\son\w+=", page)  # nothing from elsewhere, no handler in an attribute


def test_unknown_paths_and_methods(port):
    for path, method, expected in (("/docs", "GET", 404), ("/page.html", "GET", 404), ("/api/search", "GET", 405),
                                   ("/../../etc/passwd", "GET", 404), ("/", "DELETE", 405)):  # fmt: skip
        status, _, text = ask(port, path, method=method)
        assert status == expected
        assert "error" in json.loads(text)


def test_a_body_without_a_length_is_measured_as_it_comes(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        connection.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n" + b"2001\r\n" + b"x" * 0x2001 + b"\r\n")
        assert b" 413 " in connection.recv(65_536)


WHOLE = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" \
        b'Content-Length: 13\r\n\r\n{"query":"x"}'  # fmt: skip


def read_answers(connection: socket.socket, count: int) -> int:
    """Reads to the end of so many answers to searches; how many of them were good."""
    read = b""
    while (read.count(b'"search_seconds"') < count or read[-1:] != b"}") and (more := connection.recv(65_536)):
        read += more
    return read.count(b" 200 OK")


@pytest.mark.parametrize(("begun", "earlier"), [(b"", 0), (b"GET / HTTP/1.1\r\nHost: local", 0), (b"GET / HTTP", 2)])
def test_a_connection_whose_head_does_not_arrive_is_closed(port, monkeypatch, begun, earlier):
    monkeypatch.setattr("rqmoe_hf.serve.connections.HEAD_SECONDS", 1)
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=4) as connection:  # uvicorn's own time would be 5
        for _ in range(earlier):
            connection.sendall(WHOLE)
            assert read_answers(connection, 1) == 1
        connection.sendall(begun)
        time.sleep(0.3)
        connection.sendall(begun and b"/1.1\r\nX: ")  # more of it gains no time
        assert (connection.recv(1), time.monotonic() - start > 0.9) == (b"", True)


def test_a_request_may_take_longer_than_its_head(live, monkeypatch):
    monkeypatch.setattr("rqmoe_hf.serve.connections.HEAD_SECONDS", 1)
    with serving(slow := Slow(live)) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(WHOLE[:-5])
        time.sleep(1.5)
        connection.sendall(WHOLE[-5:] + WHOLE)  # the next head has come before the answer
        threading.Timer(1.5, slow.go.set).start()
        assert read_answers(connection, 2) == 2


class Slow:
    """Workers' tasks end when they are told to."""

    def __init__(self, live: LiveIndex):
        self.live, self.go = live, threading.Event()

    def __getattr__(self, name):
        return getattr(self.live, name)

    def search(self, query, *arguments):
        if query == "fail":
            raise RuntimeError("a secret")
        self.go.wait(20)
        return self.live.search(query, *arguments)


def test_more_searches_than_may_wait_are_refused(live):
    slow = Slow(live)
    with serving(slow, searches=Workers(1, 2, 20)) as port, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, port, "/api/search", {"query": "x"}) for _ in range(8)]
        while sum(one.done() for one in asked) < 5:
            time.sleep(0.01)
        slow.go.set()
        answers = [one.result() for one in asked]
        assert sorted(status for status, _, _ in answers) == [200] * 3 + [503] * 5
        refused = next(answer for answer in answers if answer[0] == 503)
        assert refused[1]["Retry-After"] == "1"
        assert "Too many searches" in json.loads(refused[2])["error"]
        assert ask(port, "/api/search", {"query": "x"})[0] == 200  # places are given back


def test_searches_that_take_too_long_or_fail(live):
    slow = Slow(live)
    with serving(slow, searches=Workers(1, 0, 0.2)) as port:
        status, _, text = ask(port, "/api/search", {"query": "x"})
        assert (status, json.loads(text)) == (504, {"error": "The search took longer than 0.2 seconds."})
        assert ask(port, "/api/search", {"query": "x"})[0] == 503  # the thread is still at work
        slow.go.set()
        while (answer := ask(port, "/api/search", {"query": "fail"}))[0] == 503:
            time.sleep(0.01)
        assert answer[0] == 500
        assert list(json.loads(answer[2])) == ["error"]
        assert "secret" not in answer[2]
        assert answer[1]["X-Content-Type-Options"] == "nosniff"


# --- the command -----------------------------------------------------------------------------------------------------


def test_help():
    result = CliRunner().invoke(command_line, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    for option in ("--encoder", "--host", "127.0.0.1", "--port", "--exact-up-to"):
        assert option in result.output


def test_mistakes_are_said_before_anything_is_served(tmp_path, monkeypatch):
    from rqmoe_hf.serve.server import run

    with pytest.raises(ValueError, match="holds no index"):
        run(tmp_path, None, None, "127.0.0.1", 0)
    model = make_index(tmp_path / "index")
    with pytest.raises(ValueError, match="Texts need an encoder"):
        LiveIndex(tmp_path / "index", model)

    class Other:
        def encode_query(self, texts):
            return np.zeros((len(texts), SIZE + 1))

        encode_document = encode_query

    with pytest.raises(ValueError, match="have 17 dimensions, those of the index 16: name the encoder"):
        LiveIndex(tmp_path / "index", model, Other())
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="Address already in use"):
        run(tmp_path / "index", None, None, "127.0.0.1", taken.getsockname()[1])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "rqmoe_hf.serve.server")
    result = CliRunner().invoke(command_line, ["serve", str(tmp_path / "index")])
    assert "pip install 'rqmoe-hf[serve]'" in str(result.exception)


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_only_loopback_is_served_without_a_warning(tmp_path, monkeypatch, capsys, host, warns):
    from rqmoe_hf.serve import server

    made = []
    monkeypatch.setattr(server, "LiveIndex", lambda *arguments: None)
    monkeypatch.setattr(server, "make_app", lambda live, loopback_only: made.append(loopback_only))
    run = lambda self, sockets: made.extend([sockets[0].getsockname()[0], self.config.http])  # noqa: E731
    monkeypatch.setattr(server.uvicorn.Server, "run", run)
    server.run(tmp_path, None, None, host, 0)
    assert made == [not warns, "0.0.0.0" if warns else "127.0.0.1", Connection]
    assert ("there is no password" in capsys.readouterr().err) == warns
