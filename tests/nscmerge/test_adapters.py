"""Adapters in and out: plain PEFT must compute the same logits from what we write as from what we read."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from nscmerge import Adapter, LowRank, load_adapter, merge, save_adapter
from nscmerge.errors import AdapterError
from nscmerge.peft_config import pattern_key, rank_pattern, target_pattern
from tests.fakes.peft_folder import IDS, QV, bert, expert, gpt2, llama, rewrite, shard


class Convolutions(nn.Module):
    """A convolution of either dimension between two linear layers."""

    def __init__(self):
        super().__init__()
        self.inp, self.c2, self.c1, self.out = nn.Linear(6, 16), nn.Conv2d(4, 5, 3), nn.Conv1d(5, 3, 2), nn.Linear(9, 2)

    def forward(self, ids):
        x = torch.relu(self.inp(ids.float() / 10)).reshape(-1, 1, 4, 4).expand(-1, 4, -1, -1)
        x = torch.relu(self.c2(x)).flatten(2)
        return self.out(torch.relu(self.c1(x)).flatten(1))


TRAITS = {
    "alpha_is_rank": (llama, {"r": 4, "lora_alpha": 4, "target_modules": QV}),
    "alpha": (llama, {"r": 3, "lora_alpha": 7, "target_modules": QV}),
    "rslora": (llama, {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": QV}),
    "patterns_and_regex": (
        llama,
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": r"(.*\.(q_proj|v_proj))|lm_head",
            "rank_pattern": {"q_proj": 5, r"^model\.layers\.1\..*v_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 11, "lm_head": 1},
        },
    ),
    "embedding": (llama, {"r": 3, "lora_alpha": 7, "target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": (llama, {"r": 3, "target_modules": QV, "modules_to_save": ["lm_head", "norm"]}),
    "head": (bert, {"r": 3, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias_lora_only": (bert, {"r": 3, "target_modules": ["query"], "bias": "lora_only"}),
    "bias_all": (bert, {"r": 3, "target_modules": ["query", "word_embeddings"], "bias": "all", "task_type": "SEQ_CLS"}),
    "transposed_weights": (gpt2, {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "convolutions": (Convolutions, {"r": 3, "lora_alpha": 7, "target_modules": ["inp", "c2", "c1"]}),
}


def logits(base, folder):
    """What plain PEFT computes with an adapter folder."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("trait", TRAITS)
def test_saved_again_gives_the_same_logits(tmp_path, trait):
    make, options = TRAITS[trait]
    base = make().eval()
    expert(tmp_path / "in", base, **options)
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    expected = logits(base, tmp_path / "in")
    with torch.no_grad():
        plain = base(IDS)
    assert (expected - (plain if isinstance(plain, torch.Tensor) else plain.logits)).abs().max() > 0.02
    torch.testing.assert_close(logits(base, tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["use_rslora"] is False
    assert config["task_type"] is None


@pytest.mark.parametrize("trait", [t for t in TRAITS if not t.startswith(("bias", "modules", "head"))])
@pytest.mark.parametrize("method", ["task_arithmetic", "weight_average", "linear", "svd"])
def test_merged_alone_at_one_gives_the_same_logits(tmp_path, trait, method):
    make, options = TRAITS[trait]
    base = make().eval()
    expert(tmp_path / "in", base, **options)
    adapter = load_adapter(tmp_path / "in")
    base_weights = {name: tensor for name, tensor in base.state_dict().items() if name in adapter.saved}
    merge([adapter], method, base=base_weights).save(tmp_path / "out")
    torch.testing.assert_close(
        logits(base, tmp_path / "out"), logits(base, tmp_path / "in"), rtol=1e-4, atol=1e-5
    )  # svd factors are rounded to fp32 once more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [8, 7])  # scaling 2 folds exactly into half precision, 7 / 4 does not
def test_dtypes_are_kept_and_folding_loses_nothing(tmp_path, dtype, alpha):
    base = llama().eval()
    expert(tmp_path / "in", base, r=4, lora_alpha=alpha, target_modules=QV)
    rewrite(tmp_path / "in", lambda tensors: {k: t.to(dtype) for k, t in tensors.items()})
    adapter = load_adapter(tmp_path / "in")
    assert {t.dtype for layer in adapter.layers.values() for t in (layer.A, layer.B)} == {dtype}
    save_adapter(adapter, tmp_path / "out")
    written = {k[-13:]: t.dtype for k, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert written["lora_A.weight"] == dtype
    assert written["lora_B.weight"] == (dtype if alpha == 8 else torch.float32)
    torch.testing.assert_close(logits(base, tmp_path / "out"), logits(base, tmp_path / "in"), rtol=1e-5, atol=1e-6)


def test_shards_are_read_as_one(tmp_path):
    base = llama().eval()
    expert(tmp_path / "in", base, r=3, lora_alpha=7, target_modules=QV)
    expected = logits(base, tmp_path / "in")
    shard(tmp_path / "in")
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    torch.testing.assert_close(logits(base, tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


def test_heads_are_told_from_shared_tensors(tmp_path):
    expert(tmp_path / "head", bert(), **TRAITS["head"][1])
    adapter = load_adapter(tmp_path / "head")
    assert sorted(adapter.head) == ["classifier.bias", "classifier.weight"]
    assert adapter.saved == {}
    expert(tmp_path / "saved", llama(), **TRAITS["modules_to_save"][1])
    adapter = load_adapter(tmp_path / "saved")
    assert adapter.head == {}
    assert "model.norm.weight" in adapter.saved


def test_a_head_file_beside_the_adapter_is_read_and_written(tmp_path):
    expert(tmp_path / "in", llama(), r=3, target_modules=QV)
    save_file({"regressor.weight": torch.ones(1, 4)}, tmp_path / "in" / "head.safetensors")
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    assert load_adapter(tmp_path / "out").head["regressor.weight"].tolist() == [[1.0] * 4]


def test_on_base_gives_deltas(tmp_path):
    base = llama()
    expert(tmp_path / "in", base, **TRAITS["modules_to_save"][1])
    adapter = load_adapter(tmp_path / "in")
    delta = adapter.on_base(base.state_dict())
    assert delta.saved == {}
    expected = adapter.saved["model.norm.weight"] - base.model.norm.weight.data
    assert torch.equal(delta.dense["model.norm.weight"], expected)
    with pytest.raises(ValueError, match=r"no tensor 'lm_head.weight'; did you mean 'lm_heat.weight'"):
        adapter.on_base({"lm_heat.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'model.norm.weight' is \(32,\), the base model's \(3,\)"):
        adapter.on_base(base.state_dict() | {"model.norm.weight": torch.zeros(3)})


class Lookalikes(nn.Module):
    """Module names that are each other's ends or beginnings."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Linear(6, 6)})
        self.x = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(6, 6)})})
        self.layer = nn.ModuleList([nn.Linear(6, 6) for _ in range(12)])

    def forward(self, x):
        x = self.x["a"]["b"](self.a["b"](x))
        for layer in self.layer:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "ranks",
    [
        {"a.b": 2, "layer.1": 3, "layer.11": 3},  # x.a.b and layer.{0, 2..10} must stay as they are
        {"a.b": 2, "x.a.b": 3, "layer.0": 3},
        {"x.a.b": 2, "a.b": 3, "layer.0": 3, "layer.2": 3},
        {"layer.1": 2, "layer.11": 4, "layer.0": 4, "layer.10": 1},
    ],
)
def test_plain_peft_finds_exactly_these_layers_and_ranks(tmp_path, ranks):
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LowRank(torch.randn(r, 6, generator=generator), torch.randn(6, r, generator=generator), 0.5)
        for name, r in ranks.items()
    }
    save_adapter(Adapter(layers), tmp_path / "out")
    model = PeftModel.from_pretrained(Lookalikes(), tmp_path / "out")
    found = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(found) == set(ranks)
    for name, layer in layers.items():
        torch.testing.assert_close(found[name], layer.dense())


def test_rank_patterns_by_hand():
    assert rank_pattern({"a": 4, "b": 4, "c": 2}) == (4, {"c": 2})
    # As a suffix 'a.b' would also give x.a.b rank 2, so every layer is anchored.
    default, pattern = rank_pattern({"a.b": 2, "x.a.b": 3, "c": 3})
    assert (default, pattern) == (3, {r"^a\.b": 2, "^c": 3, r"^x\.a\.b": 3})
    assert pattern_key(list(pattern), "x.a.b") == r"^x\.a\.b"
    assert pattern_key(["layer.1"], "layer.11") == "layer.11"
    assert target_pattern(["b", "a.b"]) == r"a\.b|b"


def test_made_in_memory_then_saved_then_loaded(tmp_path):
    layer = LowRank(torch.ones(2, 3), torch.ones(4, 2), 0.3)
    empty = LowRank(torch.ones(0, 3), torch.ones(4, 0))
    made = Adapter({"m.l": layer, "m.zero": empty}, base_model="owner/base", dense={"p.bias": torch.ones(2)}, name="me")
    read = load_adapter(save_adapter(made, tmp_path / "out"), name="me")
    torch.testing.assert_close(read.layers["m.l"].dense(), layer.dense())
    assert not read.layers["m.zero"].dense().any()
    assert read.base_model == "owner/base"
    assert read.dense["p.bias"].tolist() == [1, 1]
    assert len(read.sha256) == 64
    assert layer.scaling == 0.3


def test_saving_says_what_it_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="it has no low-rank layer"):
        save_adapter(Adapter(name="me"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"adapter 'me', layer 'l': got Tensor; expected LowRank"):
        Adapter({"l": torch.ones(2, 2)}, name="me")
    layer = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"unknown key"):
        save_adapter(Adapter({"l": layer}, saved={"norm.weight": torch.ones(2)}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_fetches_safetensors_and_json_and_opens_no_pickle(tmp_path, monkeypatch):
    folder = expert(tmp_path / "snapshot", llama(), r=3, target_modules=QV)
    asked = {}

    def snapshot(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    adapter = load_adapter("owner/sst2-lora", revision="v1")
    assert (adapter.name, adapter.source) == ("sst2-lora", "owner/sst2-lora")
    assert (asked["repo_id"], asked["revision"]) == ("owner/sst2-lora", "v1")
    others = [pattern for pattern in asked["patterns"] if not pattern.endswith((".safetensors", ".json"))]
    # Fetched to be refused: never opened, but a projector beside the adapter must not be lost in silence.
    assert others == ["non_lora_trainables.bin"]
    (folder / others[0]).write_bytes(b"anything")
    with pytest.raises(AdapterError, match="nscmerge convert"):
        load_adapter("owner/sst2-lora")
