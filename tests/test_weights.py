"""Checkpoints in every public layout load alike; damaged or foreign ones are refused by file name; downloads resume."""

import hashlib
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutation import compress, relayout
from running import ROOT, V1_1, student

import dss.hub
from dss.weights import load_t5, locate, read_safetensors, save_t5, write_safetensors

INPUT, TARGET = [[5, 6, 7, 1]], [[0, 9, 10]]


@pytest.fixture(scope="module")
def model():
    return student(**V1_1).eval()


@pytest.fixture
def saved(model, tmp_path):
    """A directory with the model."""
    save_t5(model, tmp_path / "student")
    return tmp_path / "student"


def same(model, directory):
    return torch.equal(load_t5(directory).logits(INPUT, TARGET)[0], model.logits(INPUT, TARGET)[0])


LAYOUTS = ["model.safetensors", "pytorch_model.bin", "legacy pytorch_model.bin"]
LAYOUTS += ["model.safetensors in shards", "pytorch_model.bin in shards"]


def test_transformers_own_shards_load(saved, model, transformers, tmp_path):
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(saved)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert same(model, tmp_path / "shards")


shapes = st.lists(st.integers(0, 4), max_size=3)


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), shapes, max_size=5))
def test_safetensors_files_are_read_as_written_and_as_the_library_reads_them(tmp_path_factory, many):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in many.items()}
    write_safetensors(path, tensors)
    back = read_safetensors(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], tensors[n]) for n in tensors)
    try:
        from safetensors.torch import load_file
    except ImportError:
        return
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys() and all(torch.equal(theirs[n], tensors[n]) for n in tensors)


def test_half_precision_checkpoints_load_in_fp32(saved, model, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors, which writes half precision here, is not installed")
    from safetensors.torch import save_file

    tensors = {n: t.to(torch.bfloat16) for n, t in read_safetensors(saved / "model.safetensors").items()}
    save_file(tensors, saved / "model.safetensors")
    loaded = load_t5(saved)
    assert all(p.dtype == torch.float32 for p in loaded.parameters()) and not loaded.training
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.bfloat16().float())


def test_loading_leaves_the_file_alone(saved):
    """Tensors are views of a mapped file; training in place on them would write to it, or crash if it is replaced."""
    before = (saved / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in load_t5(saved).parameters():
            parameter.zero_()
    assert (saved / "model.safetensors").read_bytes() == before


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_weights(directory, change):
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(directory / "model.safetensors").items()}
    change(tensors)
    write_safetensors(directory / "model.safetensors", tensors)


WEIGHTS = "model.safetensors"
Q, COPY = "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.embed_tokens.weight"


def make_bin(directory):
    relayout(directory, "pytorch_model.bin")
    return directory / "pytorch_model.bin"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "config.json").unlink(), "config.json: missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "model_type"),
        (lambda d: edit_config(d, model_type="umt5"), "model_type is 'umt5'"),
        (lambda d: edit_config(d, feed_forward_proj="gated-silu"), "feed_forward_proj is 'gated-silu'"),
        (lambda d: edit_config(d, d_model="wide"), "d_model is 'wide', not int"),
        (lambda d: (d / WEIGHTS).unlink(), "no model.safetensors or pytorch_model.bin"),
        (lambda d: (d / WEIGHTS).write_bytes(b""), "model.safetensors: not a complete safetensors"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-10]), "not all there"),
        (lambda d: edit_weights(d, lambda t: t.update(x=torch.zeros(1))), "1 tensors have no place in this T5: x"),
        (lambda d: edit_weights(d, lambda t: t.pop("shared.weight")), "lack shared.weight"),
        (lambda d: edit_config(d, vocab_size=10**9), "config.json: vocab_size is 1000000000, not from 1 to 1048576"),
        (lambda d: edit_config(d, num_layers=10**6), "config.json: num_layers is 1000000, not from 1 to 100"),
        (lambda d: edit_config(d, d_model=2**20), "shared.weight is .*, but config.json makes it"),
        (lambda d: edit_config(d, d_kv=-8), "d_kv is -8"),
        (lambda d: edit_config(d, d_ff=True), "d_ff is True, not int"),
        (lambda d: edit_config(d, layer_norm_epsilon=-1e-6), "layer_norm_epsilon is -1e-06"),
        (lambda d: edit_config(d, dropout_rate=float("nan")), "config.json: not JSON .NaN is not a finite number"),
        (lambda d: edit_config(d, relative_attention_num_buckets=300), "max_distance is 128, not from 151"),
        (lambda d: edit_config(d, eos_token_id=61), "eos_token_id is 61, not from 0 to 60"),
        (lambda d: edit_config(d, dense_act_fn="silu"), "is 'silu', but feed_forward_proj is 'gated-gelu'"),
        (lambda d: (d / WEIGHTS).unlink() or os.mkfifo(d / WEIGHTS), "not a regular file"),
        (lambda d: edit_weights(d, lambda t: t[Q].view(-1)[3].fill_(float("nan"))), f"{Q} holds a number that is not"),
        (lambda d: edit_weights(d, lambda t: t.update({COPY: t["shared.weight"] + 1})), "is not shared.weight"),
        (lambda d: (d / WEIGHTS).open("ab").write(b"x") and None, "1 bytes belong to no tensor"),
        (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 7 + b"\0" * 9), "a header of"),
        (lambda d: compress(make_bin(d)), "pytorch_model.bin: .*compressed"),
        (lambda d: torch.save([1.0], make_bin(d)), "not a dict of named dense tensors"),
        (lambda d: torch.save({Q: torch.eye(2).to_sparse()}, make_bin(d)), "not a dict of named dense tensors"),
        (lambda d: torch.save({Q: torch.zeros(1).expand(9999, 9999)}, make_bin(d)), "larger than the file"),
        (lambda d: make_bin(d).write_bytes(b""), "pytorch_model.bin: not a PyTorch checkpoint"),
    ],
)
def test_what_is_no_t5_is_refused_by_name(saved, damage, words):
    damage(saved)
    with pytest.raises((ValueError, OSError), match=words) as error:
        load_t5(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_pickle_that_would_run_code_is_refused(saved, monkeypatch):
    monkeypatch.chdir(saved)
    (saved / "model.safetensors").unlink()
    torch.save({"shared.weight": Evil()}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: not a PyTorch checkpoint"):
        load_t5(saved)
    assert not (saved / "pwned").exists()


def test_an_interrupted_save_leaves_the_old_file(saved, model, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()
    monkeypatch.setattr(struct, "pack", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_t5(model, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors"}


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves a directory as ORG/NAME of a hub. Weights lie on another host, "localhost", to which it redirects; as the
    hub does, it states their sha256 and size, and git's sha1 of small files. `server.fault` spoils a reply."""

    def do_GET(self):
        server, name = self.server, os.path.basename(self.path)
        server.log.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        fault = server.fault if name in server.faulty else None
        if server.busy:
            return self.reply(server.busy.pop(0), b"", {"Retry-After": "0", "Location": self.path})
        if isinstance(fault, int):
            return self.reply(fault)
        path = server.directory / name
        known = self.path.startswith(("/google/t5-test/resolve/main/", "/cdn/")) and path.exists()
        if not known:
            return self.reply(404)
        content = path.read_bytes()
        if self.path.startswith("/google/") and name.endswith((".safetensors", ".bin")) and server.stating:
            stated = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
            return self.reply(302, b"", stated | {"Location": f"http://localhost:{server.server_port}/cdn/{name}"})
        headers = {"ETag": f'"{hashlib.sha1(b"blob %d" % len(content) + bytes(1) + content).hexdigest()}"'}
        headers = headers if server.stating else {"ETag": '"a tag that says nothing of the content"'}
        if isinstance(fault, bytes):  # a captive portal's page, or nothing at all
            return self.reply(200, fault)
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(content):
            return self.reply(416)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, content[start:], headers, most=20_000 if fault == "breaks off" else 1 << 30)

    def reply(self, status, content=b"", headers={}, most=1 << 30):  # noqa: B006
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        time.sleep(self.server.delay)
        self.wfile.write(content[:most])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(saved, spiece, tmp_path, monkeypatch):
    shutil.copy(spiece / "spiece.model", saved)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.directory, server.log, server.busy, server.delay = saved, [], [], 0
    server.fault, server.faulty, server.stating = None, ["model.safetensors"], True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("DSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr(dss.hub, "WAITS", (0, 0))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hub_id_is_downloaded_once_in_every_layout(hub, model, layout):
    if layout != "model.safetensors":
        relayout(hub.directory, layout)
    assert same(model, "google/t5-test")
    asked = len(hub.log)
    assert same(model, "google/t5-test") and len(hub.log) == asked, "the second time nothing is asked for"
    assert (locate("google/t5-test") / "spiece.model").exists()
    next(locate("google/t5-test").glob("*.bin*" if "bin" in layout else "*.safetensors*")).unlink()
    assert same(model, "google/t5-test"), "a file deleted by hand is downloaded again"


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, model):
    hub.fault = "breaks off"
    with pytest.raises(ConnectionError, match="model.safetensors.*20000 of .* bytes came; run again"):
        load_t5("google/t5-test")
    hub.fault = None
    assert same(model, "google/t5-test")
    assert ("/cdn/model.safetensors", "bytes=20000-", None) in hub.log


@pytest.mark.parametrize("stating", [True, False])
def test_the_rest_of_another_version_is_not_joined_to_a_part(hub, model, stating):
    """The hub's file changed between two tries; with the same length the join went unnoticed. The digest tells, and
    where the hub states none, nothing is joined."""
    path, hub.fault, hub.stating = hub.directory / "model.safetensors", "breaks off", stating
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(ConnectionError):
        load_t5("google/t5-test")
    hub.fault = None
    path.write_bytes(whole)
    assert same(model, "google/t5-test")


PAGE = b"<html><form>Log in to the airport's network</form></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 31\n"


@pytest.mark.parametrize("stating", [True, False])
@pytest.mark.parametrize("name", ["config.json", "spiece.model", "model.safetensors"])
@pytest.mark.parametrize("fault", [PAGE, b"", POINTER, "breaks off"])
def test_what_is_not_the_file_is_not_kept(hub, model, fault, name, stating):
    """A captive portal's page was taken for the model for good. The second try, from the hub itself, succeeds."""
    hub.fault, hub.faulty, hub.stating = fault, [name], stating
    if fault != "breaks off" or (hub.directory / name).stat().st_size > 20_000:
        with pytest.raises((ValueError, ConnectionError), match=f"{name}.*run again"):
            load_t5("google/t5-test")
    hub.fault = None
    assert same(model, "google/t5-test") and not list(locate("google/t5-test").glob("*.part"))


def test_a_busy_hub_is_asked_again_and_a_long_wait_is_not_waited(hub, model, capsys, monkeypatch):
    hub.busy = [429, 503]
    assert same(model, "google/t5-test")
    assert capsys.readouterr().err.count("asking again in 0 s") == 2
    monkeypatch.setattr(dss.hub, "LONGEST_WAIT", -1)
    hub.busy = [429]
    with pytest.raises(ConnectionError, match="HTTP 429"):
        locate("google/other")


def test_the_token_goes_to_the_hub_alone_and_is_never_shown(hub, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.busy = [307]  # to another address of the hub itself, which may know who asks
    load_t5("google/t5-test")
    assert {who for path, _, who in hub.log if path.startswith("/google/")} == {"Bearer hf_secret"}
    assert {who for path, _, who in hub.log if path.startswith("/cdn/")} == {None}, "the other host"
    hub.fault, hub.faulty = 403, ["config.json"]
    with pytest.raises(PermissionError, match="HF_TOKEN") as error:
        locate("google/other")
    shown = str(error.value) + "".join(capfd.readouterr())
    for name, value in {"HF_TOKEN": "hf_sec\nret", "HF_ENDPOINT": "me:pass%40word@hub"}.items():
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="HF_ENDPOINT or HF_TOKEN") as error:
            locate("google/other")
        shown += str(error.value)
    assert not any(secret in shown for secret in ("ret", "pass", "me:"))


def test_what_hugging_face_has_downloaded_is_used(hub, model, tmp_path, monkeypatch):
    other = tmp_path / "huggingface" / "hub" / "models--google--t5-test"
    (other / "refs").mkdir(parents=True)
    (other / "refs" / "main").write_text("abc")
    shutil.copytree(hub.directory, other / "snapshots" / "abc")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same(model, "google/t5-test") and hub.log == []
    relayout(other / "snapshots" / "abc", "pytorch_model.bin")  # the hub has them in another form
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert same(model, "google/t5-test") and not any("safetensors" in path for path, *_ in hub.log)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (other / "snapshots" / "abc" / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: missing, and HF_HUB_OFFLINE is set"):
        load_t5("google/t5-test")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert same(model, "google/t5-test")
    assert not any(path.endswith(("config.json", "spiece.model")) and "tok" not in path for path, *_ in hub.log)


def test_the_check_prints_one_line(hub, capsys):
    save_t5(student(vocab_size=500), hub.directory)  # as many as the tokenizer needs
    assert dss.hub.main(["google/t5-test", "--check"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "parameters; 'translate English to German: The house is wonderful.' -> " in out
    assert dss.hub.main(["google/nothing", "--check"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dss.hub: google/nothing: no such directory here")


def test_a_model_or_a_hub_that_is_nowhere_is_one_clear_line(hub, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="google/nothing: no such directory here, and http.* no config.json"):
        load_t5("google/nothing")
    assert not list((tmp_path / "cache").iterdir()), "a name mistyped leaves nothing"
    for name in (tmp_path / "missing", "../no-such-weights", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such directory of weights"):
            load_t5(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="google/t5-test: no such directory here, and http://127.0.0.1:9"):
        load_t5("google/t5-test")


def test_two_downloads_of_one_model_do_not_spoil_each_other(hub, model, tmp_path):
    """They appended to one .part file. The second waits, says so, and finds the model there."""
    hub.delay = 0.3
    code = "import sys; from dss.weights import load_t5; load_t5('google/t5-test')"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert same(model, "google/t5-test")
    asked = [path for path, *_ in hub.log]
    assert len(set(asked)) == len(asked) and "waiting for another download of google/t5-test" in "".join(errors)


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("name", ["config.json", "spiece.model", "model.safetensors"])
def test_a_refusal_is_not_taken_for_a_file_that_does_not_exist(hub, model, tmp_path, status, name):
    hub.fault, hub.faulty = status, [name]
    error, words = (ConnectionError, "HTTP 500") if status == 500 else (PermissionError, "HTTP 40.*HF_TOKEN")
    with pytest.raises(error, match=f"{name}: {words}"):
        load_t5("google/t5-test")
    assert not (tmp_path / "cache" / "google--t5-test" / ".complete").exists()
    hub.fault = None
    assert same(model, "google/t5-test")


def test_a_model_without_a_tokenizer_shows_before_its_weights_are_downloaded(hub):
    (hub.directory / "spiece.model").unlink()
    assert not (locate("google/t5-test", weights=False) / "spiece.model").exists()
    assert not any("safetensors" in path for path, *_ in hub.log)


@pytest.mark.parametrize("shard", ["../../outside.bin", "..", ".", ""])
def test_an_index_that_names_a_file_elsewhere_is_refused(hub, shard):
    (hub.directory / "model.safetensors").unlink()
    index = {"weight_map": {"shared.weight": shard}}
    (hub.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="another directory"):
        load_t5("google/t5-test")


@pytest.mark.parametrize("shard", ["weights.pt", "README"])
def test_an_index_that_names_no_weights_is_refused(hub, shard):
    (hub.directory / "model.safetensors").rename(hub.directory / shard)
    index, hub.stating = {"weight_map": {"shared.weight": shard}}, False
    (hub.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{shard}: not the expected file"):
        load_t5("google/t5-test")
