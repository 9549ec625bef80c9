"""How networks lie in memory while they train."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from passdeploy.placing import ease_norms, layout, place
from passdeploy.surgery import relative_difference
from passdeploy.training import TrainSettings, evaluate, reestimate_batch_norm, train
from tests import scripted

CPU = torch.device("cpu")
SHAPE = scripted.data().input_shape


def downsampling(narrow: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, narrow, 3, padding=1), nn.Conv2d(narrow, 8, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, len(scripted.data().classes)),
    )  # fmt: skip


@pytest.mark.parametrize(("narrow", "how"), [(4, torch.contiguous_format), (16, torch.channels_last)])
def test_channels_are_last_where_that_is_safe(narrow: int, how: torch.memory_format) -> None:
    model = downsampling(narrow)
    assert layout(model, CPU) == place(model, CPU, SHAPE) == how
    assert all(p.is_contiguous(memory_format=how) for p in model.parameters() if p.ndim == 4)
    assert layout(model, torch.device("cuda")) == torch.channels_last


def test_what_lay_channels_last_is_put_back() -> None:
    model = downsampling(4).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    place(model, CPU, SHAPE)
    assert all(p.is_contiguous() for p in model.parameters())


def test_narrow_downsampling_layers_can_be_trained() -> None:
    """Channels last this corrupts the heap on CPUs with AVX2, and the process aborts."""
    settings = TrainSettings(batch=32, min_steps=40, epochs=0.01)
    curve = train(downsampling(4), scripted.data(), settings)
    assert curve.step[-1] == 40


class Viewed(nn.Module):
    """As LeNet and its like are written: `view` of a feature map, which must lie as it always did."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(16 * (SHAPE[1] // 2) * (SHAPE[2] // 2), len(scripted.data().classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x.view(x.size(0), -1))


def test_what_views_feature_maps_trains_and_is_judged() -> None:
    model, data = Viewed(), scripted.data()
    assert place(model, CPU, SHAPE) == torch.contiguous_format
    assert model.training and all(p.is_contiguous() for p in model.parameters())
    before = model.features[1].running_mean.clone()  # type: ignore[union-attr, operator]
    place(model, CPU, SHAPE)
    assert torch.equal(model.features[1].running_mean, before), "looking at it leaves no trace"  # type: ignore[arg-type]
    assert train(model, data, TrainSettings(batch=32, min_steps=3, epochs=0.01), teacher=Viewed()).step[-1] == 3
    reestimate_batch_norm(model, data)
    assert evaluate(model, data.val) is not None
    other = Viewed().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert place(other, CPU, SHAPE) == torch.contiguous_format and evaluate(other, data.val) is not None


def test_a_channels_last_kernel_of_one_pixel_is_laid_anew() -> None:
    """Its strides alone make the convolution run channels last, which `contiguous` leaves as they are."""
    model = downsampling(4).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kernel = model[1].weight
    assert kernel.stride() == (4, 1, 4, 4)
    place(model, CPU, SHAPE)
    assert kernel.stride() == (4, 1, 1, 1)


class Cached(nn.Module):
    """Works something out from its weights in evaluation, and forgets it when training begins, as timm's LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bias, self.cache = nn.Conv2d(3, 4, 3), nn.Parameter(torch.zeros(4)), None

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self.cache = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.conv(x).mean((2, 3)) + self.bias
        if self.cache is None:
            self.cache = self.bias.detach().clone()
        return self.conv(x).mean((2, 3)) + self.cache


def test_what_a_network_worked_out_before_it_was_trained_is_forgotten() -> None:
    model, image = Cached().train(), torch.rand(1, *SHAPE)
    place(model, CPU, SHAPE)
    with torch.no_grad():
        model.bias += 1
    model.eval()
    assert torch.allclose(model(image), model.conv(image).mean((2, 3)) + 1, atol=1e-6)


def test_modes_are_put_back_one_by_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.Dropout()).train()
    model[1].eval()
    place(model, CPU, SHAPE)
    assert [module.training for module in model] == [True, False, True]


def odd(how: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    return model.to(memory_format=how)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("how", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("lower", [False, True])
def test_norms_of_odd_widths_compute_the_same(
    how: torch.memory_format, lower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    plain, eased = odd(how), odd(how)
    handles = ease_norms(eased)
    seen: list[bool] = []
    assert len(handles) == 2 * 2, "not of 16 channels"
    eased[4].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    eased[5].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous(memory_format=how)))
    images = torch.rand(4, *SHAPE).contiguous(memory_format=how)
    for model in (plain, eased):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            model(images).float().square().sum().backward()
    assert seen == [True, True]
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (plain, eased)]
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).abs().max()) <= (0.05 if lower else 1e-4) * largest, name
    for mean, other in zip(plain.buffers(), eased.buffers(), strict=True):
        assert torch.allclose(mean, other, rtol=1e-2 if lower else 1e-5, atol=1e-3 if lower else 1e-6)
    eased.eval()
    assert relative_difference(plain.eval()(images), eased(images)) <= (1e-2 if lower else 1e-4)
    for handle in handles:
        handle.remove()
    assert not eased[1]._forward_hooks and not eased[1]._forward_pre_hooks


def with_odd_norms() -> nn.Module:
    model = downsampling(16)
    model.insert(1, nn.BatchNorm2d(16))  # type: ignore[operator]
    model[2] = nn.Conv2d(16, 24, 1)
    model.insert(3, nn.BatchNorm2d(24))  # type: ignore[operator]
    model.insert(4, nn.Conv2d(24, 8, 1))  # type: ignore[operator]
    return model


def test_training_leaves_no_hooks() -> None:
    model = with_odd_norms()
    train(model, scripted.data(), TrainSettings(batch=32, min_steps=2, epochs=0.01))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_training_that_fails_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model, eased = with_odd_norms(), []

    def stopped(*_: object) -> NoReturn:
        eased.extend(module for module in model.modules() if module._forward_hooks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, scripted.data(), TrainSettings(batch=32, min_steps=2, epochs=0.01), progress=stopped)
    assert len(eased) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
