"""Parts that can't be traced, through the whole run: they stay whole and are named, and the rest is pruned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor, nn

from passdeploy.config import make_config, merge
from passdeploy.console import Ui
from passdeploy.errors import BadInput
from passdeploy.pipeline import Run
from passdeploy.subject import load_subject
from tests import scripted
from tests.groups.nets import Reverse


def test_what_stays_whole_is_in_the_report(one_thread: None, tmp_path: Path) -> None:
    values = merge(
        scripted.SETTINGS,
        {
            "model": "tests.groups.nets:Untraceable", "data": "stripes", "latency": "1.5x", "epochs": 0.5,
            "dense": {"epochs": 0.5, "min_steps": 12}, "search": {"epochs": 0.5, "min_steps": 12},
            "finetune": {"min_steps": 8}, "profile": {"structures": 12},
        },
    )  # fmt: skip
    Run(make_config(values), tmp_path / "run", Ui(quiet=True), data=scripted.data()).run()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["status"] == "within_budget"
    assert max(report["equivalence"][k] for k in ("masked_vs_thin", "thin_vs_onnx", "onnx_vs_engine")) <= 1e-4
    assert set(report["frozen"]) == {"even", "ahead", "fc"}
    page, drawn = ((tmp_path / "run" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for module, reason in report["frozen"].items():
        assert module in page and module in drawn
        assert reason.split(":")[0].replace("'", "&#39;") in drawn
    kept = {group["name"]: group["kept"] / group["units"] for group in report["groups"]}
    assert min(kept.values()) < 1
    assert {"stem", "even.a", "behind"} <= set(kept)
    modules = json.loads((tmp_path / "run" / "architecture.json").read_text())["modules"]
    assert "out" not in modules.get("ahead", {})


class Choosy(nn.Module):
    """What it computes depends on its images, which no exported graph can say."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head((y if float(x.mean()) > -9 else -y).mean((2, 3)))


def test_what_cant_be_exported_is_refused_before_it_is_trained(one_thread: None, tmp_path: Path) -> None:
    config = make_config(merge(scripted.SETTINGS, {"model": "tests.test_untraceable:Choosy", "data": "stripes"}))
    with pytest.raises(BadInput, match="can't be exported to ONNX"):
        Run(config, tmp_path / "run", Ui(quiet=True), data=scripted.data()).run()
    assert not list((tmp_path / "run").rglob("*.ckpt")) and not list((tmp_path / "run").rglob("*.safetensors"))


def test_when_nothing_is_left_it_stops_and_says_which() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Reverse(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    config = make_config({"model": "x", "data": "stripes"})
    with pytest.raises(BadInput, match=r"nothing in it can be pruned \(") as caught:
        load_subject(config, model=network, data=scripted.data())
    assert "0: the network computes something else without it" in str(caught.value)
    assert "\n" not in str(caught.value)
