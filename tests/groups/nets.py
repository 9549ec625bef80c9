"""Made-up networks that hold what usually goes wrong, small enough to be cut a hundred times."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passdeploy.groups import Groups
from passdeploy.groups.check import masked_against_thin, randomise
from passdeploy.structure import Structure
from passdeploy.surgery import apply_architecture, architecture, thin


class Squeeze(nn.Module):
    """Squeeze-and-excite as people write it: views, a sigmoid, a broadcast product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(inplace=True), nn.Linear(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        gate = torch.sigmoid(self.fc(self.pool(x).view(n, c)))
        return x * gate.view(n, c, 1, 1).expand_as(x)


class Residual(nn.Module):
    """In-place addition onto the branch; the first activation would change the shortcut if it were applied in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width + 4, 3, padding=1), nn.BatchNorm2d(width + 4)
        self.conv2, self.bn2 = nn.Conv2d(width + 4, width, 3, padding=1), nn.BatchNorm2d(width)
        self.act = nn.ELU(inplace=True)
        self.se = Squeeze(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out += x
        return out


class MadeUp(nn.Module):
    """3 classes, 48x40: batch norm after a concatenation, residual, grouped, depthwise, transposed, flattened."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.mix = nn.Conv2d(24, 12, 1, bias=False)
        self.prelu = nn.PReLU(12)
        self.block = Residual(12)
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12)
        self.grouped = nn.Sequential(
            nn.Conv2d(12, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16)
        )
        self.up = nn.ConvTranspose2d(16, 7, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d((3, 2))
        self.fc1, self.fc2 = nn.Linear(7 * 6, 20), nn.Linear(20, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.norm(torch.cat([self.left(x), x, self.right(x)], 1)).sigmoid()
        x = self.block(self.prelu(self.mix(x)))
        x = self.pool(self.up(self.grouped(self.depthwise(x))))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class PreActivation(nn.Module):
    """Residual branches that begin with a norm, nested, one of them with dropout behind it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.conv1(F.relu(self.bn1(x)))
        inner = inner + self.drop(self.conv2(F.relu(self.bn2(inner))))
        x = x + inner
        return self.fc(x.mean((2, 3)))


class ChannelMixer(nn.Module):
    """Mixes channels outside any layer (a softmax over them): they can't be removed, the rest can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.softmax(self.b(F.relu(self.a(x))), 1)).mean((2, 3)))


class DataDependent(nn.Module):
    """Control flow on values: symbolic tracing fails, the channels can still go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if x.sum() > 1e9:
            x = x * 2
        return self.fc((x + self.b(x)).mean((2, 3)))


class _Reversal(torch.autograd.Function):
    """The channels in reverse order: no graph says so."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.flip(1)


class Reverse(nn.Module):
    """A custom autograd function."""

    def forward(self, x: Tensor) -> Tensor:
        return _Reversal.apply(x)


class EvenSides(nn.Module):
    """A residual block that looks at the size of its input: symbolic tracing fails, export does not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width + 8, 3, padding=1), nn.Conv2d(width + 8, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return x + self.b(F.relu(self.a(x)))


class Untraceable(nn.Module):
    """Parts that can't be traced among parts that can; any size."""

    def __init__(self, num_classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.block1, self.block2 = _Plain(width), _Plain(width)
        self.even = EvenSides(width)
        self.ahead, self.reverse = nn.Conv2d(width, width, 1), Reverse()
        self.behind = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.even(self.block2(self.block1(F.relu(self.stem(x)))))
        x = F.relu(self.behind(self.reverse(self.ahead(x))))
        return self.fc(x.mean((2, 3)))


class _Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(x)))


class RandomNet(nn.Module):
    """A random graph of convolutions, norms, additions, concatenations, splits and gates; a function of the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, tuple[int, ...], str]] = []
        widths = [rng.choice((4, 6, 8))]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        for i in range(rng.randint(4, 9)):
            kind = rng.choice(("conv", "conv", "norm", "depthwise", "grouped", "add", "cat", "split", "gate", "block"))
            a, name = rng.randrange(len(widths)), f"layer{i}"
            width, inputs = widths[a], (a,)
            if width % 2 and kind in ("norm", "grouped", "split", "gate"):
                continue
            if kind == "conv":
                width = rng.choice((4, 6, 8))
                self.layers[name] = nn.Conv2d(
                    widths[a], width, rng.choice((1, 3)), padding="same", bias=rng.random() < 0.5
                )
            elif kind == "norm":
                self.layers[name] = rng.choice((nn.BatchNorm2d(width), nn.GroupNorm(2, width), nn.PReLU(width)))
            elif kind == "depthwise":
                self.layers[name] = nn.Conv2d(width, width, 3, padding=1, groups=width)
            elif kind == "grouped":
                self.layers[name] = nn.Conv2d(width, width * 2, 3, padding=1, groups=2)
                width *= 2
            elif kind == "gate":
                self.layers[name] = Squeeze(width)
            elif kind == "block":
                self.layers[name] = Residual(width)
            elif kind == "split":
                width //= 2
            elif kind in ("add", "cat"):
                same = [b for b in range(len(widths)) if kind == "cat" or widths[b] == width]
                b = rng.choice(same)
                inputs, width = (a, b), width if kind == "add" else width + widths[b]
            self.steps.append((kind, inputs, name))
            widths.append(width)
        self.fc = nn.Linear(sum(widths), 4)

    def forward(self, x: Tensor) -> Tensor:
        values = [F.relu(self.stem(x))]
        for kind, inputs, name in self.steps:
            a = values[inputs[0]]
            if kind == "add":
                values.append(a + values[inputs[1]])
            elif kind == "cat":
                values.append(torch.cat([a, values[inputs[1]]], 1))
            elif kind == "split":
                values.append(torch.split(a, a.shape[1] // 2, 1)[1])
            else:
                values.append(F.relu(self.layers[name](a)) if kind == "conv" else self.layers[name](a))
        return self.fc(torch.cat([value.mean((2, 3)) for value in values], 1))


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with norms and biases that hide nothing."""
    randomise(model, seed)
    return model.eval()


def cut_and_built_anew(
    model: nn.Module, fresh: nn.Module, groups: Groups, structure: Structure, images: Tensor
) -> nn.Module:
    """The thin network: what the masked one computes, and what `fresh` becomes by its architecture and its weights."""
    assert masked_against_thin(model, groups, structure, images) <= 1e-4
    cut = thin(model, groups, structure).eval()
    again = apply_architecture(fresh, architecture(groups, structure))
    again.load_state_dict(cut.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images), cut(images))
    return cut


class Drowned(nn.Module):
    """Every second token of a map asks a question, which its neighbour answers ten thousand million times as loud.

    DepGraph takes the slices over rows and columns for one over channels: `conv`'s group is wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.loud = nn.Sequential(
            nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        )
        self.query, self.fc = nn.Linear(8, 4), nn.Linear(6, 4)
        with torch.no_grad():
            for conv in (self.loud[0], self.loud[3]):
                conv.weight.mul_(1e5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        tokens = x.flatten(2).transpose(1, 2)
        batch, _, channels = tokens.shape
        few = tokens.view(batch, *x.shape[2:], channels)[:, ::2, ::2].reshape(batch, -1, channels)
        return self.query(few).mean(1) + self.fc(F.relu(self.loud(x)).mean((2, 3)))


class Mixed(nn.ModuleDict):
    """A mixed convolution: parts of the input in stored, unequal sizes, each to a convolution of its own."""

    def __init__(self) -> None:
        super().__init__({"a": nn.Conv2d(5, 6, 3, padding=1), "b": nn.Conv2d(3, 4, 1)})
        self.splits = [5, 3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(part) for layer, part in zip(self.values(), x.split(self.splits, 1), strict=True)], 1)
