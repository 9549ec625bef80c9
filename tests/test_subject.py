from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from passdeploy import models
from passdeploy._torchvision import torchvision
from passdeploy.config import make_config
from passdeploy.console import Ui
from passdeploy.errors import BadInput
from passdeploy.remarks import untrained
from passdeploy.restoring import restore
from passdeploy.subject import load_subject
from passdeploy.weights import save_weights
from tests import scripted

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("prompt", [{"kind": "expansive"}, {"kind": "expansive", "width": 6}])
def test_an_expansive_prompt_has_to_leave_an_image(prompt: dict[str, object]) -> None:
    config = make_config({"model": "tiny-resnet", "data": "stripes", "prompt": prompt})
    with pytest.raises(BadInput, match="takes 1 to 5 pixels; set prompt"):
        load_subject(config, data=scripted.data())
    load_subject(
        config.model_copy(update={"prompt": config.prompt.model_copy(update={"width": 5})}), data=scripted.data()
    )


@pytest.mark.parametrize(("default", "given"), [(None, True), ((8, 8), True), ("tiny", False), (224, False)])
def test_a_size_of_the_users_own_is_left_alone(default: object, given: bool) -> None:
    def build(num_classes: int, size: Any = default) -> nn.Module:
        assert size == (scripted.SIZE if given else default)
        return scripted.tiny_resnet(num_classes)

    models.build(build, 3, scripted.SIZE)


def test_weights_that_guess_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the stage that finds it, and in the report's messages, which come from the same function."""
    save_weights(scripted.tiny_resnet(), tmp_path / "w.safetensors")
    running = scripted.start(tmp_path / "run", weights=str(tmp_path / "w.safetensors"))
    running.ui = Ui()
    running.subject.data.classes = tuple("abcd")
    monkeypatch.setattr("passdeploy.stages.dense.accuracies", lambda *_: {"validation": 0.3, "test": None})
    running.stage("dense")
    assert "is right on 30.0% of the validation images, and guessing on 25.0%" in capsys.readouterr().err
    assert not untrained(running.subject, 0.5)
    assert not untrained(running.subject, None)
    running.subject.weights = None
    assert not untrained(running.subject, 0.3)


class Bent(nn.Module):
    """conv - activation - linear; all variants have parameters of the same names and shapes."""

    steps: torch.Tensor

    def __init__(self, stride: int = 1, activation: nn.Module | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
        self.bend, self.scale = activation or nn.ReLU(), scale
        self.two, self.pool, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)
        self.register_buffer("steps", torch.tensor(1.0))

    def extra_repr(self) -> str:
        return repr(torch.nn.functional.relu)  # with its address

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, 3, H, W) to logits (N, 3)."""
        x = self.two(self.bend(self.one(x))) * self.scale
        return self.head(self.pool(x).flatten(1))


class Squared(Bent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * x)


def digest(model: Callable[[], nn.Module] | nn.Module) -> str:
    config = make_config({"model": "<Bent>", "data": "stripes"})
    return load_subject(config, model=model, data=scripted.data()).digest


def test_the_digest_tells_networks_apart_whose_parameters_have_the_same_shapes() -> None:
    variants: list[Callable[[], nn.Module]] = [
        Bent,
        lambda: Bent(stride=2),
        lambda: Bent(activation=nn.GELU()),
        lambda: Bent(scale=0.5),
        Squared,
    ]
    assert len({digest(make) for make in variants}) == len(variants)
    assert digest(Bent) == digest(lambda: Bent()), "made again, it is the same"


def test_images_of_a_function_or_given_as_they_are_are_resized_to_the_input_size() -> None:
    config = make_config({"model": "<Bent>", "data": "stripes", "input_size": [20, 24]})
    data = load_subject(config, model=Bent, data=scripted.data()).data
    assert data.preprocess.size == (20, 24) and data.train.images(torch.arange(2)).shape == (2, 3, 20, 24)


def test_the_digest_covers_the_weights_that_were_given() -> None:
    network = Bent()
    before = digest(network)
    assert digest(network) == before
    network.steps.fill_(2)  # a scalar
    assert digest(network) != before


def test_the_digest_is_the_same_in_another_process() -> None:
    script = "from tests.test_subject import Bent, digest; print(digest(Bent))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(Bent)


def test_the_digest_follows_the_source(tmp_path: Path) -> None:
    """The same class of the same file, whose forward was edited between two sessions."""
    seen = []
    for body in ("x.relu()", "x.sigmoid()"):
        (tmp_path / "edited.py").write_text(
            "from tests.test_subject import Bent\n"
            "class Net(Bent):\n"
            "    def forward(self, x):\n"
            f"        return super().forward({body})\n"
        )
        script = "import edited; from tests.test_subject import digest; print(digest(edited.Net))"
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Module.half, torch.compile])
def test_what_a_factory_wraps_is_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    config = make_config({"model": "<Bent>", "data": "stripes"})
    subject = load_subject(config, model=lambda num_classes: wrap(Bent()), data=scripted.data())
    again = subject.with_state(Bent().state_dict())
    for network in (subject.network, again):
        assert type(network) is Bent
        assert all(p.dtype == torch.float32 for p in network.parameters())


def test_what_latency_depends_on_is_told_apart_and_nothing_else() -> None:
    config = make_config({"model": "<Bent>", "data": "stripes"})

    def architecture(model: nn.Module) -> str:
        return load_subject(config, model=model, data=scripted.data()).architecture

    assert architecture(Bent()) == architecture(Bent()), "other weights"
    assert architecture(Bent()) != architecture(Bent(activation=nn.SiLU()))


@pytest.mark.parametrize("factory", [True, False])
def test_frozen_weights_are_trained_and_the_callers_stay_frozen(factory: bool) -> None:
    network = Bent()
    network.one.requires_grad_(False)
    config = make_config({"model": "<Bent>", "data": "stripes"})
    subject = load_subject(config, model=(lambda: network) if factory else network, data=scripted.data())
    for own in (subject.network, subject.build()):
        assert all(parameter.requires_grad for parameter in own.parameters())
    assert factory or not any(parameter.requires_grad for parameter in network.one.parameters())


class Helped(Bent):
    """With an auxiliary classifier, as GoogLeNet has; `fails`: nothing comes of a training on black images."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.drop = fails, nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        logits = super().forward(self.drop(x))
        if self.training and self.fails:
            raise ValueError("expected more values per channel")
        return (logits, logits) if self.training else logits


def test_outputs_in_training_are_checked_as_well() -> None:
    config = make_config({"model": "<Helped>", "data": "stripes"})
    with pytest.raises(BadInput, match=r"Helped in training mode: .* returned tuple; .* without auxiliary classifiers"):
        load_subject(config, model=Helped(), data=scripted.data())
    with pytest.raises(BadInput, match="Helped in training mode"):
        load_subject(config, model=Helped, data=scripted.data())
    network = load_subject(config, model=lambda: Helped(fails=True), data=scripted.data()).network
    assert not network.training


def test_looking_at_the_outputs_draws_no_random_numbers() -> None:
    class Dropping(Bent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    config = make_config({"model": "<Dropping>", "data": "stripes"})
    drawn = []
    for make in (Bent, Dropping):
        load_subject(config, model=make, data=scripted.data())
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


class Causal(Bent):
    """With a mask of infinities, as attentions have, and a norm."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bend = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))


def test_infinities_in_a_mask_are_no_diverged_weights(tmp_path: Path) -> None:
    save_weights(Causal(), tmp_path / "w.safetensors")
    config = make_config({"model": "<Causal>", "data": "stripes"})
    from_file = config.model_copy(update={"weights": tmp_path / "w.safetensors"})
    for subject in (
        load_subject(config, model=Causal(), data=scripted.data()),
        load_subject(from_file, model=Causal, data=scripted.data()),
    ):
        assert subject.weights is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [("mask", torch.nan), ("one.weight", torch.inf), ("one.bias", torch.nan), ("bend.0.running_var", torch.inf)],
)
def test_weights_that_diverged_are_refused(tmp_path: Path, name: str, value: float) -> None:
    network = Causal()
    network.state_dict()[name].view(-1)[0] = value
    config = make_config({"model": "<Causal>", "data": "stripes"})
    with pytest.raises(BadInput, match="hold NaN or infinity; train it again"):
        load_subject(config, model=network, data=scripted.data())
    save_weights(network, tmp_path / "w.safetensors")
    from_file = config.model_copy(update={"weights": tmp_path / "w.safetensors"})
    with pytest.raises(BadInput, match=rf"NaN or Inf in 1 of \d+ tensors \(first: {name}, 1 of "):
        load_subject(from_file, model=Causal, data=scripted.data())


def test_a_wrong_size_is_no_wrong_number_of_channels() -> None:
    """Whatever the convolution that happens to be defined first takes."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.head = nn.Linear(8 * 32 * 32, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.second(self.first(x)).flatten(1))
            return logits

    config = make_config({"model": "<own>", "data": "<stripes>"})
    with pytest.raises(BadInput, match=r"check the input size \(input_size in the configuration\)$"):
        load_subject(config, model=Sized(), data=scripted.data())


class Always(nn.Module):
    """Drops in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, len(scripted.data().classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(self.conv(x).mean((2, 3)), 0.5))


def test_a_network_that_draws_lots_in_evaluation_is_refused() -> None:
    with pytest.raises(BadInput, match="other outputs for the same images, in evaluation too; a dropout"):
        load_subject(make_config({"model": "<Always>", "data": "stripes"}), Always(), scripted.data())


def test_a_network_is_no_function_that_builds_one() -> None:
    with pytest.raises(BadInput, match="is a network, not a function that builds one"):
        models.build(nn.Linear(2, 2), 2)  # type: ignore[arg-type]


def test_a_network_that_squeezes_a_single_image_away_is_refused() -> None:
    class Squeezed(Always):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = nn.functional.adaptive_avg_pool2d(self.conv(x), 1)
            return self.head(pooled.squeeze())

    config = make_config({"model": "<Squeezed>", "data": "stripes"})
    with pytest.raises(BadInput, match=r"Squeezed on a single image: must return logits .*; a squeeze\(\)"):
        load_subject(config, Squeezed(), scripted.data())
    assert load_subject(make_config({**config.to_json(), "batch": 2}), Squeezed(), scripted.data()).groups.groups


class Keeping(nn.Module):
    """A layer whose state is more than tensors, as those that scale for 8 bits have it."""

    def get_extra_state(self) -> dict[str, float]:
        return {"largest": 1.0}

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_state_that_no_weights_file_holds_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Keeping(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(BadInput, match="1 keeps a state that is no tensor"):
        load_subject(make_config({"model": "<Sequential>", "data": "stripes"}), network, scripted.data())


def test_modules_that_look_at_the_version_of_what_they_load_get_one() -> None:
    """torchvision's MNASNet raises without one, which no file keeps."""

    def network() -> nn.Module:
        return torchvision().models.MNASNet(0.5, num_classes=3)

    theirs, ours = network(), network()
    restore(ours, dict(theirs.state_dict()))
    assert torch.equal(ours.classifier[1].weight, theirs.classifier[1].weight)  # type: ignore[index, union-attr]
    subject = load_subject(make_config({"model": "<mnasnet>", "data": "stripes"}), network, scripted.data())
    assert not subject.with_state(dict(theirs.state_dict())).training


class Remembering(Bent):
    """Works out something of its weights when it first runs in evaluation, and forgets it in training."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.cache: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> Remembering:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(x) + self.bias
        return super().forward(x) + self.cache.setdefault("bias", self.bias.detach().clone())


def test_what_a_network_worked_out_from_other_weights_is_forgotten(tmp_path: Path) -> None:
    trained = Remembering()
    nn.init.constant_(trained.bias, 7.0)
    save_weights(trained, tmp_path / "w.safetensors")
    config = make_config({"model": "<r>", "data": "stripes", "weights": str(tmp_path / "w.safetensors")})
    network = load_subject(config, Remembering, scripted.data()).network
    images = torch.rand(2, *scripted.data().input_shape)
    with torch.no_grad():
        assert torch.equal(network(images), trained.eval()(images))


class Drawing(Bent):
    table: torch.Tensor

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(3), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table


def test_a_factory_that_builds_another_network_each_time_is_refused() -> None:
    config = make_config({"model": "<Drawing>", "data": "stripes"})
    with pytest.raises(BadInput, match="builds another network each time, also with the same weights; what it draws"):
        load_subject(config, lambda: Drawing(False), scripted.data())
    assert load_subject(config, lambda: Drawing(True), scripted.data()).groups.groups
    assert load_subject(config, Drawing(False), scripted.data()).groups.groups, "copied, not built"
    widths = iter((8, 16, 8, 16))
    with pytest.raises(BadInput, match="builds another network each time"):
        load_subject(config, lambda: nn.Sequential(nn.Conv2d(3, next(widths), 3), Mean()), scripted.data())


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))[:, :3]


def test_a_factory_with_lazy_layers_is_refused_in_a_line() -> None:
    config = make_config({"model": "<lazy>", "data": "stripes"})
    with pytest.raises(BadInput, match="lazy layers without a shape"):
        load_subject(config, lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), scripted.data())


@pytest.mark.parametrize(
    ("change", "said"),
    [({"classes": (0, 1, 2)}, "class 0 is no text; name classes by strings"), ({"licence": None}, "licence is None")],
)
def test_names_that_are_no_text_are_refused_before_anything_runs(change: dict[str, Any], said: str) -> None:
    data = dataclasses.replace(scripted.data(), **change)
    with pytest.raises(BadInput, match=said):
        load_subject(make_config({"model": "tiny-resnet", "data": "stripes"}), data=data)
