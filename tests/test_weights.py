from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from passdeploy import models
from passdeploy._torchvision import torchvision
from passdeploy.data import load, resized
from passdeploy.errors import BadInput
from passdeploy.weights import PACKAGED, load_weights, packaged_weights, save_weights


def net(width: int = 4, classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, classes)
    )
    model[1].running_mean = torch.rand(width)
    return model


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def refusal(model: nn.Module, path: Path) -> str:
    """The message with which a file is refused: one line that names the file, and the model is left as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BadInput) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return message


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_weights(net(seed=1), tmp_path / "new" / "w.safetensors")
    model = net(seed=2)
    load_weights(model, tmp_path / "new" / "w.safetensors")
    assert same(model, net(seed=1))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_resnet_from_a_torch_file(tmp_path: Path) -> None:
    trained, model = models.build("resnet20", 10), models.build("resnet20", 10)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    images = torch.rand(2, 3, 28, 28)
    assert torch.equal(model.eval()(images), trained.eval()(images))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best": 0.9},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"checkpoint": 1, "model_state_dict": state},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"net.{k}": v for k, v in state.items()}},
        lambda state: {f"module.{k}": v for k, v in {**state, "aux1.fc.weight": torch.ones(2, 2)}.items()},
        lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
        lambda state: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in state.items()}},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
    ],
)
def test_forms_of_torch_files(tmp_path: Path, wrap, legacy: bool) -> None:  # type: ignore[no-untyped-def]
    torch.save(wrap(dict(net(seed=1).state_dict())), tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    model = net(seed=2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model, net(seed=1))


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    save_file(dict(net(seed=1).state_dict()), tmp_path / "w.pth")
    model = net(seed=2)
    load_weights(model, tmp_path / "w.pth")
    assert same(model, net(seed=1))


def test_halves_become_the_models_type(tmp_path: Path) -> None:
    save_weights(net(seed=1).half(), tmp_path / "w.safetensors")
    model = net(seed=2)
    load_weights(model, tmp_path / "w.safetensors")
    assert model[0].weight.dtype == torch.float32
    assert torch.allclose(model[0].weight, net(seed=1)[0].weight, atol=1e-3)


def test_wrapped_models(tmp_path: Path) -> None:
    save_weights(nn.DataParallel(net(seed=1)), tmp_path / "w.safetensors")
    plain = net(seed=2)
    load_weights(plain, tmp_path / "w.safetensors")
    assert same(plain, net(seed=1))
    compiled = net(seed=3)
    load_weights(torch.compile(compiled), tmp_path / "w.safetensors")  # type: ignore[arg-type]
    assert same(compiled, net(seed=1))


def test_shared_tensors(tmp_path: Path) -> None:
    save_weights(Tied(1), tmp_path / "ours.safetensors")
    save_model(Tied(1), str(tmp_path / "theirs.safetensors"))  # leaves the second name out
    for name in ("ours.safetensors", "theirs.safetensors"):
        model = Tied(2)
        load_weights(model, tmp_path / name)
        assert same(model, Tied(1))
        assert model.first.weight is model.second.weight


def test_views_and_layouts_are_saved_by_value(tmp_path: Path) -> None:
    trained = net(seed=1).to(memory_format=torch.channels_last)
    pool = torch.rand(8)
    trained[1].weight.data, trained[1].bias.data = pool[:4], pool[2:6]  # overlap
    save_weights(trained, tmp_path / "w.safetensors")
    model = net(seed=2)
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model, trained)


def test_a_name_of_the_models_own_is_no_prefix(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    trained, model = Own(), Own()
    torch.save({f"module.{k}": v for k, v in trained.state_dict().items()}, tmp_path / "ddp.pth")
    save_weights(trained, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model, trained)


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    save_weights(net(), tmp_path / "resnet.safetensors")
    assert "no such weights file; in that folder: resnet.safetensors" in refusal(net(), tmp_path / "resnet.pth")


def test_folder_and_empty_file(tmp_path: Path) -> None:
    assert "can't be read" in refusal(net(), tmp_path)
    (tmp_path / "w.pth").touch()
    assert "is empty" in refusal(net(), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.pth"])
@pytest.mark.parametrize("share", [0.014, 0.02, 0.5, 0.98])  # the first: inside of a number of an old torch file
def test_truncated(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if name == "w.safetensors":
        save_weights(net(), path)
    else:
        torch.save(net().state_dict(), path, _use_new_zipfile_serialization=name == "w.pth")
    content = path.read_bytes()
    path.write_bytes(content[: round(len(content) * share)])
    message = refusal(net(seed=2), path)
    assert "damaged" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "neither safetensors nor a torch file"),
        (b"PK\x03\x04" + bytes(64), "damaged"),
        (b"\x80\x02" + bytes(64), "damaged"),
        ((10**15).to_bytes(8, "little") + b'{"a":1}', "damaged"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert said in refusal(net(), tmp_path / "w.pth")


def test_another_architecture(tmp_path: Path) -> None:
    save_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path / "w.safetensors")
    message = refusal(net(), tmp_path / "w.safetensors")
    assert "another architecture" in message
    assert "4 of 9 names missing (first: 1.running_mean), 4 of another shape" in message
    assert "(first: 0.weight is 2x2, the model wants 4x3x3x3)" in message


def test_another_width(tmp_path: Path) -> None:
    save_weights(net(width=8), tmp_path / "w.safetensors")
    message = refusal(net(), tmp_path / "w.safetensors")
    assert "7 of another shape (first: 0.weight is 8x3x3x3, the model wants 4x3x3x3)" in message


def test_another_number_of_classes(tmp_path: Path) -> None:
    save_weights(net(classes=10), tmp_path / "w.safetensors")
    assert "tell 10 classes apart, the data has 3" in refusal(net(), tmp_path / "w.safetensors")


class Scaled(nn.Module):
    def __init__(self, biases: int, scale: tuple[int, ...]) -> None:
        super().__init__()
        self.table, self.scale = nn.Parameter(torch.zeros(biases, 4)), nn.Parameter(torch.zeros(scale))


@pytest.mark.parametrize(("theirs", "ours"), [(Scaled(9, ()), Scaled(9, (1,))), (Scaled(9, ()), Scaled(4, (1,)))])
def test_a_scale_or_a_table_is_no_number_of_classes(tmp_path: Path, theirs: nn.Module, ours: nn.Module) -> None:
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    said = refusal(ours, tmp_path / "w.pth")
    assert "of another shape" in said and "classes" not in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(tmp_path: Path, value: float) -> None:
    broken = net()
    broken[4].weight.data[1, 2] = value
    save_weights(broken, tmp_path / "w.safetensors")
    message = refusal(net(seed=2), tmp_path / "w.safetensors")
    assert "NaN or Inf in 1 of 9 tensors (first: 4.weight, 1 of 432 values)" in message


def test_infinite_only_in_the_models_type(tmp_path: Path) -> None:
    state = {k: v.double() if v.is_floating_point() else v for k, v in net().state_dict().items()}
    state["0.bias"][0] = 1e300
    torch.save(state, tmp_path / "w.pth")
    assert "first: 0.bias" in refusal(net(seed=2), tmp_path / "w.pth")


def test_quantised(tmp_path: Path) -> None:
    state = dict(net().state_dict())
    state["4.weight"] = state["4.weight"].mul(10).char()
    torch.save(state, tmp_path / "w.pth")
    assert "not floating point" in refusal(net(seed=2), tmp_path / "w.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_whole_module(tmp_path: Path, legacy: bool) -> None:
    torch.save(Tied(1), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    message = refusal(Tied(2), tmp_path / "w.pth")
    assert "torch.save(model.state_dict()" in message
    if not legacy:
        assert "pickled whole module" in message
        assert "Tied" in message


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": net().state_dict(), "x": Evil()}, tmp_path / "w.pth")
    assert "system" in refusal(net(), tmp_path / "w.pth")
    assert not (tmp_path / "pwned").exists()


def test_checkpoint_with_objects(tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    message = refusal(net(), tmp_path / "w.pth")
    assert "Python objects (argparse.Namespace)" in message
    assert "whole module" not in message


def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "w.pt"))
    assert "TorchScript" in refusal(nn.Linear(2, 2), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "said"), [({"epoch": 3}, "keys: epoch"), ([1, 2], "list"), (torch.ones(2), "Tensor")]
)
def test_no_weights_in_it(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert said in refusal(net(), tmp_path / "w.pth")


def test_lazy_layers(tmp_path: Path) -> None:
    save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match="lazy layers"):
        load_weights(nn.LazyLinear(2), tmp_path / "w.safetensors")


def test_a_place_that_cant_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="can't be written"):
        save_weights(net(), tmp_path / "file" / "w.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no file size limits on this system")
    save_weights(net(seed=1), tmp_path / "w.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(BadInput, match="can't be written"):
            save_weights(net(seed=2), tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    model = net(seed=3)
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model, net(seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_packaged_weights() -> None:
    for path in PACKAGED.glob("*.safetensors"):
        model, _, name = path.stem.partition("-")
        data = load(name)
        assert packaged_weights(model, data) == path
        assert packaged_weights(f"../{model}", data) is None
        assert packaged_weights("nets:build", data) is None
        assert packaged_weights(model, replace(data, name="no-such-data")) is None
        # A folder may have any name, and a named set can be given another size or normalisation.
        assert packaged_weights(model, replace(data, classes=data.classes[::-1])) is None
        assert packaged_weights(model, resized(data, (64, 64))) is None
        other = replace(data.preprocess, mean=(0.5, 0.5, 0.5))
        assert packaged_weights(model, replace(data, preprocess=other)) is None


def test_names_that_modules_change_as_they_load(tmp_path: Path) -> None:
    """torchvision's vision transformers are published so."""

    def transformer(classes: int) -> nn.Module:
        return torchvision().models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=classes)

    theirs = transformer(10)
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for name, value in theirs.state_dict().items()
    }
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old
    torch.save(old, tmp_path / "vit.pth")
    ours = transformer(10)
    load_weights(ours, tmp_path / "vit.pth")
    assert same(ours, theirs)
    assert "tell 10 classes apart, the data has 7" in refusal(transformer(7), tmp_path / "vit.pth")
    torch.save(
        {name: value for name, value in old.items() if "layer_1.mlp.linear_2" not in name}, tmp_path / "less.pth"
    )
    assert "2 of " in (said := refusal(transformer(10), tmp_path / "less.pth")) and "names missing" in said


def test_names_of_published_densenets(tmp_path: Path) -> None:
    theirs = torchvision().models.DenseNet(4, (2, 2), 8, num_classes=5)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in theirs.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer2.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    ours = torchvision().models.DenseNet(4, (2, 2), 8, num_classes=5)
    load_weights(ours, tmp_path / "densenet.pth")
    assert same(ours, theirs)


def test_norms_that_were_frozen_since(tmp_path: Path) -> None:
    def network(norm: type[nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))

    theirs, ours = network(nn.BatchNorm2d), network(torchvision().ops.FrozenBatchNorm2d)
    theirs[1].running_mean = torch.rand(4)  # type: ignore[index]
    save_weights(theirs, tmp_path / "w.safetensors")
    load_weights(ours, tmp_path / "w.safetensors")
    assert torch.equal(ours[1].running_mean, theirs[1].running_mean)  # type: ignore[index]


def test_loading_code_that_fails_is_no_reason_to(tmp_path: Path) -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args) -> None:  # type: ignore[no-untyped-def]
            raise KeyError(state_dict[prefix + "none"])

    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    assert "1 of 2 names missing (first: bias)" in refusal(Own(2, 2), tmp_path / "w.pth")
