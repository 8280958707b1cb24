"""The hub, played by a server on this machine: what it refuses, and how that is told."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from datasets import Dataset, DatasetDict

from datamodules.sources import DatasetSpec, Part, Place, TrainTestSplit, open_source
from datamodules.tokenizer import context_length, load_tokenizer
from datamodules.twins.models import write_llama
from nscmerge.errors import ConfigError, DatasetNotFoundError

SPEC = DatasetSpec(
    "Toy",
    [Place("owner/first", "pairs"), Place("owner/second", splits={"test": Part("val")})],
    {"text": "text"},
    {"test": Part("validation", cut=TrainTestSplit(0.5, shuffle=False))},
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Let datasets and transformers ask a server here, which refuses everything as told."""
    import huggingface_hub.constants

    class Refusing(BaseHTTPRequestHandler):
        status, code = 404, "RepoNotFound"
        asked = 0

        def do_HEAD(self):
            type(self).asked += 1
            self.send_response(self.status)
            self.send_header("X-Error-Code", self.code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(f"datasets.config.{name}", False, raising=False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", url)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield Refusing
    server.shutdown()
    server.server_close()


REFUSALS = [
    (403, "GatedRepo", "it is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"),
    (401, "GatedRepo", "it is gated: accept its terms"),
    (404, "RepoNotFound", "it is not there, or is private and needs a login"),
    (401, "RepoNotFound", "it is not there, or is private and needs a login"),
]


@pytest.mark.parametrize(("status", "code", "said"), REFUSALS)
def test_refusals_are_told_copy_by_copy(hub, status, code, said):
    hub.status, hub.code = status, code
    with pytest.raises(DatasetNotFoundError) as raised:
        open_source(SPEC)
    first, one, two, last = str(raised.value).splitlines()
    assert first == "Toy cannot be had from the hub:"
    assert one.startswith(f"  owner/first:pairs: {said}")
    assert two.startswith(f"  owner/second: {said}")
    assert last.startswith("Or set the data module's `source` to a local copy: a folder written by save_to_disk")
    assert hub.asked


@pytest.mark.parametrize(("status", "code", "said"), REFUSALS)
def test_a_refused_tokenizer_is_told_alike(hub, status, code, said):
    hub.status, hub.code = status, code
    with pytest.raises(DatasetNotFoundError, match="AutoTokenizer 'owner/gated' cannot be loaded: ") as raised:
        load_tokenizer("owner/gated")
    assert said in str(raised.value)


def test_without_the_network_what_is_not_cached_is_named(hub, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetNotFoundError, match="HF_HUB_OFFLINE forbids to fetch it") as raised:
        open_source(SPEC)
    assert "the splits validation (for test), with the columns text" in str(raised.value)
    assert not hub.asked


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    asked = []

    def fail(place):
        asked.append(place.id)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datamodules.sources.resolve.load_place", fail)
    with pytest.raises(DatasetNotFoundError, match=r"the hub cannot be reached \(ConnectionError: no route to host\)"):
        open_source(SPEC)
    assert asked == ["owner/first"]
    with pytest.raises(DatasetNotFoundError, match="owner/second: not tried"):
        open_source(SPEC)


def test_a_fallback_is_read_by_its_own_splits_and_told(monkeypatch):
    rows = Dataset.from_dict({"text": list("abcd")})

    def load(place):
        if place.id == "owner/first":
            raise RuntimeError("Dataset scripts are no longer supported, but found first.py")
        return DatasetDict({"val": rows})

    monkeypatch.setattr("datamodules.sources.resolve.load_place", load)
    why = "owner/first:pairs: it is a loading script, which `datasets` no longer runs"
    with pytest.warns(UserWarning, match="Toy: reading owner/second instead of owner/first:pairs"):
        opened = open_source(SPEC)
    assert opened.split("test").column("text") == list("abcd")
    assert opened.describe() == {"source": "owner/second", "instead_of": [why]}


def test_a_hub_id_may_name_configuration_and_revision(monkeypatch):
    asked = []
    rows = DatasetDict({"validation": Dataset.from_dict({"text": list("abcd")})})
    monkeypatch.setattr("datamodules.sources.resolve.load_place", lambda place: asked.append(place) or rows)
    assert open_source(SPEC).split("test").column("text") == ["a", "b"]
    for source in ("mine/copy", "mine/copy:two@refs/convert/parquet", "owner/first@v1"):
        open_source(SPEC, source)
    assert [(p.id, p.config, p.revision) for p in asked] == [
        ("owner/first", "pairs", None),
        ("mine/copy", None, None),
        ("mine/copy", "two", "refs/convert/parquet"),
        ("owner/first", "pairs", "v1"),
    ]
    with pytest.raises(ConfigError, match="neither a path nor a hub id"):
        open_source(SPEC, "mine/copy:")
    with pytest.raises(DatasetNotFoundError, match="owner/second has no split 'val', which 'test' is made from"):
        open_source(SPEC, "owner/second").split("test")


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(tmp_path):
    write_llama(tmp_path / "llama")
    tokenizer = load_tokenizer(str(tmp_path / "llama"))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end_of_text|>"
    assert (context_length(tokenizer, 3000), context_length(tokenizer, 100)) == (2048, 100)
    tokenizer.model_max_length = 10**30
    assert context_length(tokenizer, 3000) == 3000


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path):
    from transformers import PreTrainedTokenizerFast

    write_llama(tmp_path / "llama")
    whole = load_tokenizer(str(tmp_path / "llama"))
    PreTrainedTokenizerFast(tokenizer_object=whole.backend_tokenizer).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"neither a pad token nor an end token.*`pad_token`"):
        load_tokenizer(str(tmp_path / "bare"))


def test_a_missing_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"AutoTokenizer: .*nowhere is no folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetNotFoundError, match="empty' cannot be loaded: "):
        load_tokenizer(str(tmp_path / "empty"))
