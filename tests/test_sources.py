"""utils/sources.py: weights by address and by name, from a server of the test's own."""

import hashlib
import http.server
import logging
import re
import threading

import pytest
import torch
from safetensors.torch import save

from main_finetune import ConvNeXtV2
from tests.small_runs import TINY
from utils import sources
from utils.distributed import setup_logging
from utils.errors import UsageError
from utils.layouts import to_timm
from utils.weights import load_checkpoint


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_response(404)
            if "resolve" in self.path:
                self.send_header("X-Error-Code", self.server.hub_error)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: self.server.breaks_off])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of `files`, by path, for addresses and for the hub's names, with empty caches."""
    import huggingface_hub.constants as hub

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    server.files, server.asked, server.breaks_off, server.hub_error = {}, [], None, "EntryNotFound"
    server.address = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()


def classifier(seed=0):
    torch.manual_seed(seed)
    return ConvNeXtV2(**TINY, num_classes=4, stem_stride=1)


def as_file(state_dict, folder) -> bytes:
    torch.save(state_dict, folder / "made.pth")
    return (folder / "made.pth").read_bytes()


def loaded(source) -> dict:
    return load_checkpoint(source, lambda c: ConvNeXtV2(**c.encoder(), num_classes=c.num_classes), "--finetune").model


def same(a, b) -> bool:
    return all(torch.equal(v, b.state_dict()[name]) for name, v in a.state_dict().items())


def left(folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("place", ["{}/best.pth", "best.pth?id={}", "long/" * 80 + "{}/best.pth"])
def test_an_address_is_downloaded_once_and_files_of_one_name_are_told_apart(place, server, tmp_path):
    for i in range(2):
        server.files[f"/{place.format(i)}"] = as_file(classifier(i).state_dict(), tmp_path)
    for _ in range(2):
        for i in range(2):
            assert same(loaded(f"{server.address}/{place.format(i)}"), classifier(i))
    assert len(server.asked) == 2
    assert left(tmp_path / "torch") == ["best.pth"] * 2


def test_the_hash_of_a_name_counts(server, tmp_path):
    content = as_file(classifier().state_dict(), tmp_path)
    digest = hashlib.sha256(content).hexdigest()[:8]
    server.files = {f"/a-{digest}.pth": content, "/a-01234567.pth": content, "/checkpoint-799.pth": content}
    for name in (f"a-{digest}.pth", "checkpoint-799.pth"):
        assert same(loaded(f"{server.address}/{name}"), classifier())
    with pytest.raises(UsageError, match=r"--finetune http://\S+/a-01234567.pth: cannot be downloaded .*hash"):
        loaded(f"{server.address}/a-01234567.pth")
    assert "a-01234567.pth" not in left(tmp_path / "torch")


def test_what_is_no_whole_checkpoint_leaves_nothing(server, tmp_path):
    server.files = {"/a.pth": as_file(classifier().state_dict(), tmp_path), "/page.pth": b"<html>sorry</html>"}
    server.breaks_off = 5000
    for name, message in (
        ("a.pth", ": (cannot be downloaded|what the server gives is no checkpoint)"),
        ("page.pth", ": what the server gives is no checkpoint"),
        ("absent.pth", r": cannot be downloaded \(HTTP Error 404: Not Found\)"),
    ):
        with pytest.raises(UsageError, match=f"--finetune {server.address}/{name}{message}") as caught:
            loaded(f"{server.address}/{name}")
        assert "\n" not in str(caught.value)
        assert left(tmp_path / "torch") == []
    server.breaks_off = None
    assert same(loaded(f"{server.address}/a.pth"), classifier())


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"a.pth: cannot be downloaded \(.*Not a directory"):
        loaded(f"{server.address}/a.pth")


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n9",
        b"HTTP/1.1 302 Found\r\nLocation: /a.pth\r\nContent-Length: 0\r\n\r\n",
    ],
)  # fmt: skip
def test_a_server_that_says_something_else(reply, server, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(reply))
    with pytest.raises(UsageError, match=r"^--finetune \S+: cannot be downloaded \(.+\)$"):
        loaded(f"{server.address}/a.pth")


@pytest.mark.parametrize("address", ["http://localhost:1/a b.pth", "http://localhost:x/a.pth", "http://[::1/a.pth"])
def test_addresses_that_are_none(address, server):
    with pytest.raises(UsageError, match=f"^--finetune {re.escape(address)}: cannot be downloaded "):
        loaded(address)


def test_without_a_network():
    with pytest.raises(UsageError, match=r"--finetune http://localhost:1/a.pth: cannot be downloaded \(.*refused"):
        loaded("http://localhost:1/a.pth")


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/convnextv2_atto.fcmae", "timm/convnextv2_atto.fcmae", "convnextv2_atto.fcmae"]
)
@pytest.mark.parametrize("file", sources.HUB_FILES)
def test_names_on_the_hub(name, file, server, tmp_path):
    state = to_timm(classifier().state_dict())
    state = {key: v.contiguous() for key, v in state.items()}
    content = save(state) if file.endswith("safetensors") else as_file(state, tmp_path)
    server.files[f"/timm/convnextv2_atto.fcmae/resolve/main/{file}"] = content
    for _ in range(2):
        assert same(loaded(name), classifier())
    assert [command for command, path in server.asked if path.endswith(file)].count("GET") == 1


def test_names_that_the_hub_has_not(server):
    with pytest.raises(UsageError, match="owner/name holds neither model"):
        loaded("hf-hub:owner/name")
    server.hub_error = "RepoNotFound"
    with pytest.raises(
        UsageError, match=r"the hub has no timm/convnextv2_ato.fcmae .* \(did you mean timm/convnextv2_atto"
    ):
        loaded("timm/convnextv2_ato.fcmae")


def test_names_that_nobody_knows(scripts):
    with pytest.raises(UsageError, match=r"no such file .did you mean convnextv2_atto.fcmae"):
        loaded("convnextv2_ato.fcmae")
    for run, flag in ((scripts.finetune, "--finetune"), (scripts.pretrain, "--initial_checkpoint")):
        result = run(flag, "convnextv2_tiny.fcmea")
        message = f"error: {flag} convnextv2_tiny.fcmea: no such file (did you mean convnextv2_tiny.fcmae?)\n"
        assert (result.code, result.err) == (2, message)
    result = scripts.finetune("--resume", "https://localhost/a.pth")
    assert (result.code, result.err) == (2, "error: --resume https://localhost/a.pth: no such file\n")


def test_a_run_starts_from_an_address(server, scripts, tmp_path):
    server.files["/a.pth"] = as_file(classifier().state_dict(), tmp_path)
    result = scripts.finetune("--finetune", f"{server.address}/a.pth", "--epochs", 1, "--warmup_epochs", 0)
    assert result.code == 0, result.err
    assert f"--finetune {server.address}/a.pth: " in result.out
    result = scripts.finetune("--eval", "true", "--resume", f"{server.address}/a.pth")
    assert result.code == 0, result.err


def test_the_releases_are_those_of_the_docs():
    table = (sources.Path(__file__).parent.parent / "docs/weights.md").read_text()
    assert set(re.findall(r"`(convnextv2_\w+\.\w+)`", table)) == set(sources.releases())


def test_no_line_shows_what_is_secret_in_an_address(scripts, capfd):
    """Neither the mistake's nor a warning's; what follows the address stays."""
    result = scripts.finetune("--finetune", "http://me:s3cret@localhost:1/a.pth?token=s3cret")
    assert result.code == 2
    assert result.err.startswith("error: --finetune http://***@localhost:1/a.pth?***: cannot be downloaded (")
    assert "s3cret" not in result.out + result.err
    setup_logging()
    logging.getLogger("fcmae").warning("http://host/a.pth?sig=s3cret: read")
    assert capfd.readouterr().out == "http://host/a.pth?***: read\n"
