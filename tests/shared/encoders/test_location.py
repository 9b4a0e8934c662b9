"""Models that are not there are told before anything waits for them; the hub is a server that answers as it does."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig
from preprocess.job.settled import check_models
from shared.cache.dataset import Cache
from shared.encoders.location import require_model
from shared.errors import InputError
from tests.local_server import serving
from tests.shared.clips.planning import PROVENANCE

ANSWERS = {"/owner/empty/": "EntryNotFound", "/owner/guarded/": "GatedRepo", "/owner/none/": "RepoNotFound"}


class Hub(BaseHTTPRequestHandler):
    asked: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        refusal = next((code for name, code in ANSWERS.items() if name in self.path), None)
        self.send_response(503 if "/owner/busy/" in self.path else 200 if refusal is None else 404)
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", "0")
        if refusal is not None:
            self.send_header("X-Error-Code", refusal)
        self.end_headers()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that the hub was asked for; it runs meanwhile."""
    found: list[str] = []
    with serving(type("Handler", (Hub,), {"asked": found})) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield found


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("owner/none", "--vae owner/none: no folder here, and the hub has no such model .*: check the name"),
        ("owner/guarded", "--vae owner/guarded: its owner lets only some have it: .* set HF_TOKEN"),
        ("owner/empty", "--vae owner/empty: the hub has no config.json of it"),
        ("owner/n a m e", "--vae owner/n a m e: neither a folder here nor the name of a hub's model"),
        ("vae", "--vae: model 'vae': no such folder: expected a folder or a hub id"),
        ("demo:unet", "--vae: model 'demo:unet': expected demo:t5 or demo:vae"),
    ],
)
def test_a_model_that_is_nowhere_is_told(asked: list[str], model: str, complaint: str) -> None:
    for is_here in (True, False):
        with pytest.raises(InputError, match=complaint):
            require_model(model, option="--vae", is_here=is_here)


def test_a_model_that_is_there_or_that_the_hub_says_nothing_of_is_left_to_who_loads_it(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("owner/name", "owner/busy"):
        require_model(model, option="--vae")
    assert [path for path in asked if path.endswith("/config.json")] == asked
    assert len(asked) == 2
    require_model("demo:vae", option="--vae")
    (tmp_path / "config.json").write_text("{}")
    require_model(str(tmp_path), option="--vae")
    assert len(asked) == 2
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    require_model("owner/none", option="--vae")


def test_a_folder_of_the_workers_need_not_be_where_a_job_is_started(asked: list[str], tmp_path: Path) -> None:
    models = {"vae": str(tmp_path / "vae"), "text_encoder": "owner/none"}
    config = PreprocessConfig(manifest="unused.csv", output=str(tmp_path / "cache"), buckets=("4x64x64",), **models)
    with pytest.raises(InputError, match="--text-encoder owner/none: no folder here"):
        check_models(config)
    with pytest.raises(InputError, match="--vae: model .*: no such folder"):
        require_model(models["vae"], option="--vae")
    Cache.open_or_create(tmp_path / "cache", PROVENANCE)
    check_models(config)
