"""Which GPU a target means on a machine with several, and with one that has no name in the catalogue."""

from __future__ import annotations

import pytest
import torch

from passdeploy import doctor, targets
from passdeploy.errors import Unavailable
from passdeploy.latency.roofline import Roofline
from passdeploy.targets import resolve
from tests.latency.nets import resnet20


def attach(monkeypatch: pytest.MonkeyPatch, *names: str, capability: tuple[int, int] = (8, 6)) -> None:
    """As if this machine had these GPUs."""
    for module in (targets, doctor):
        monkeypatch.setattr(module, "attached_gpus", lambda: names)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)


def test_only_the_first_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    attach(monkeypatch, "NVIDIA A100-SXM4-80GB", "NVIDIA L4")
    assert resolve("a100", backend="inductor").device == "NVIDIA A100-SXM4-80GB"
    with pytest.raises(Unavailable, match=r"target l4: the NVIDIA L4 here is GPU 1.*CUDA_VISIBLE_DEVICES=1$"):
        resolve("l4", backend="inductor")
    (row,) = [row for row in doctor.list_targets() if row.name == "l4"]
    assert not row.attached and not row.measures and "CUDA_VISIBLE_DEVICES=1" in (row.reason or "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7ab")
    with pytest.raises(Unavailable, match=r"CUDA_VISIBLE_DEVICES=GPU-7ab$"):
        resolve("l4", backend="inductor")


def test_a_gpu_outside_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    attach(monkeypatch, "NVIDIA A10G")
    target = resolve("gpu", backend="inductor")
    assert (target.name, target.device, target.compute_capability) == ("gpu", "NVIDIA A10G", "8.6")
    assert target.attached and target.precision == "fp16"
    row = doctor.list_targets()[-1]
    assert (row.name, row.title, row.attached) == ("gpu", "NVIDIA A10G", True)
    groups, operators = resnet20()
    with pytest.raises(Unavailable, match=r"no analytic model of NVIDIA A10G.*--profile"):
        Roofline(operators, list(groups.units.values()), target)


@pytest.mark.parametrize(
    ("gpu", "target"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB", "a100"),
    ],
)
def test_another_chip_of_nearly_that_name_is_another_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: str, target: str | None
) -> None:
    attach(monkeypatch, gpu)
    named = [row.name for row in doctor.list_targets() if row.attached and row.name not in ("cpu", "gpu")]
    assert named == ([target] if target else [])


def test_without_a_gpu_there_is_no_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    attach(monkeypatch)
    with pytest.raises(Unavailable, match="target gpu: no NVIDIA GPU is attached"):
        resolve("gpu")
    assert "gpu" not in [row.name for row in doctor.list_targets()]


@pytest.mark.parametrize(("name", "part"), [("h100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"), ("a10", "NVIDIA A10-4Q")])
def test_a_part_of_a_gpu_is_not_that_gpu(monkeypatch: pytest.MonkeyPatch, name: str, part: str) -> None:
    attach(monkeypatch, part, capability=(9, 0))
    with pytest.raises(Unavailable, match=rf"target {name}: what is here is a part of one, {part}.*--target gpu"):
        resolve(name, backend="inductor")
    assert resolve("gpu", backend="inductor").device == part
    (row,) = [row for row in doctor.list_targets() if row.name == name]
    assert not row.attached and "--target gpu" in (row.reason or "")
    (other,) = [row for row in doctor.list_targets() if row.name == "l4"]
    assert "part of one" not in (other.reason or "")
