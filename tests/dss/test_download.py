"""A hub id is downloaded once, with huggingface_hub and without, from a hub on this machine."""

import hashlib
import http.server
import shutil
import sys
import threading

import pytest
from checkpoints import LAYOUTS, relayout, same
from running import V1_1, student

from dss.download import download
from dss.weights import load_t5, save_t5

T5 = "google/t5-test"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves a directory as google/t5-test. Weights and spiece.model lie on another host, to which
    it redirects; before, it states their sha256 and size, as Hugging Face's hub does."""

    def do_HEAD(self):
        server = self.server
        prefix, _, name = self.path.rpartition("/")
        server.log.append((name, prefix, self.headers.get("Authorization")))
        path = server.directory / name
        commit = {"X-Repo-Commit": "c" * 40}
        if server.status.get(name, 200) != 200:
            return self.reply(server.status[name])
        if not path.exists() or not prefix.startswith((f"/{T5}/resolve/", "/cdn")):
            return self.reply(404, commit | {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        headers = commit | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        large = name.endswith((".safetensors", ".bin", ".model"))
        if large and prefix != "/cdn":
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"http://localhost:{server.server_port}/cdn/{name}"
            return self.reply(302, headers)
        return self.reply(200, headers, server.instead.get(name, content), len(content))

    do_GET = do_HEAD

    def reply(self, status, headers={}, content=b"", length=0):  # noqa: B006
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def model():
    return student(**V1_1).eval()


@pytest.fixture
def hub(model, spiece, tmp_path, monkeypatch):
    directory = tmp_path / "served"
    save_t5(model, directory)
    shutil.copy(spiece / "spiece.model", directory)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.directory, server.log = directory, []
    server.status, server.instead = {}, {}  # by name of the file: another status, other bytes
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("HF_TOKEN", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def without(monkeypatch):
    """huggingface_hub is not installed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.fixture(params=["huggingface_hub", "torch.hub"])
def either(request):
    """With huggingface_hub and without."""
    if request.param == "torch.hub":
        request.getfixturevalue("without")
    else:
        pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


def asked(hub):
    return [name for name, *_ in hub.log]


def weights_asked(hub):
    return [name for name in asked(hub) if name.startswith(("model", "pytorch_model"))]


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]])
def test_every_layout_is_downloaded_once(hub, either, model, tmp_path, layout):
    relayout(hub.directory, layout)
    assert same(model, T5)
    hub.log.clear()
    assert same(model, T5)
    assert not [name for name in asked(hub)[1:] if (hub.directory / name).exists()]
    hub.log.clear()
    directory = download(T5, weights=False)
    assert directory.is_relative_to(tmp_path / "cache") and (directory / "spiece.model").exists()
    assert not weights_asked(hub)


def test_a_model_without_a_tokenizer_is_refused_before_its_weights(hub, either):
    (hub.directory / "spiece.model").unlink()
    (hub.directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{T5} has no tokenizer that can be used: .*spiece.model"):
        download(T5)
    assert not weights_asked(hub)


def test_a_model_that_the_hub_does_not_have(hub, either):
    with pytest.raises(FileNotFoundError, match="google/nothing: no such directory here, and no s"):
        load_t5("google/nothing")
    (hub.directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors or pytorch_model.bin"):
        load_t5(T5)


@pytest.mark.parametrize(
    "name, change",
    [
        ("model.safetensors", lambda content: bytes(len(content))),
        ("model.safetensors", lambda content: content[:-9]),
        ("config.json", lambda content: content[:-9]),
    ],
)
def test_a_file_that_is_damaged_or_cut_on_its_way_is_not_kept(hub, without, model, name, change):
    hub.instead[name] = change((hub.directory / name).read_bytes())
    with pytest.raises(ConnectionError, match=name):
        load_t5(T5)
    hub.instead.clear()
    assert same(model, T5)


@pytest.mark.parametrize("status", [401, 500])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_refusal_is_one_line_and_not_taken_for_a_missing_file(hub, without, model, status, name):
    hub.status[name] = status
    with pytest.raises(OSError, match=f"{name}: HTTP {status}.*install huggingface_hub") as error:
        load_t5(T5)
    assert "\n" not in str(error.value)
    hub.status.clear()
    assert same(model, T5)


def test_only_huggingface_hub_sends_the_token_and_to_the_hub_alone(hub, either, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    load_t5(T5)
    sent = {(prefix == "/cdn", token) for _, prefix, token in hub.log}
    token = "Bearer hf_secret" if sys.modules.get("huggingface_hub") else None
    assert sent == {(False, token), (True, None)}


def test_a_hub_that_refuses_or_is_out_of_reach(hub, either, monkeypatch):
    hub.status["config.json"] = 403
    with pytest.raises(ConnectionError, match=f"{T5}: no such directory here, and .*403"):
        load_t5(T5)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between huggingface_hub's tries
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=f"{T5}: no such directory here, and"):
        load_t5(T5)
