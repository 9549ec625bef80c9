"""The input stage of a network: normalisation and the learnable visual prompt, both inside the shipped graph.

`additive`: pixels are added, on a frame or on the whole image. `expansive`: the image is shrunk inside the graph and
the freed border is learnt; the network's input size stays (PASS, arXiv 2407.17412, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passdeploy.data.base import Preprocess


def _frame(size: tuple[int, int], width: int) -> Tensor:
    """1 on a border of `width` pixels of a (1, H, W) image, 0 inside; the whole image when the border covers it."""
    frame = torch.ones(1, *size)
    if 2 * width < min(size):
        frame[:, width : size[0] - width, width : size[1] - width] = 0
    return frame


class InputStage(nn.Module):
    """Maps float32 images in [0, 1] to the network's input.

    Args:
        preprocess: Size and normalisation.
        kind: ``none``, ``additive`` or ``expansive``.
        width: Border in pixels. ``additive`` with 0 means the whole image; for ``expansive`` it must leave an image.
    """

    scale: Tensor
    shift: Tensor
    frame: Tensor

    def __init__(self, preprocess: Preprocess, kind: str = "none", width: int = 0) -> None:
        super().__init__()
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self.kind, self.width, self.size = kind, width, preprocess.size
        self.register_buffer("scale", (1 / std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)
        self.prompt: nn.Parameter | None = None
        if kind == "none":
            return
        if kind not in ("additive", "expansive"):
            raise ValueError(f"unknown prompt kind {kind!r}; known: none, additive, expansive")
        if kind == "expansive" and not 0 < 2 * width < min(preprocess.size):
            raise ValueError(f"an expansive prompt of width {width} leaves nothing of a {preprocess.size} image")
        whole = kind == "additive" and width == 0
        frame = _frame(preprocess.size, max(preprocess.size) if whole else width)
        self.register_buffer("frame", frame, persistent=False)
        self.prompt = nn.Parameter(torch.zeros(3, *preprocess.size))

    def pixels(self) -> Tensor | None:
        """The prompt (3, H, W) as it is added, in units of the normalised input; None without one."""
        return None if self.prompt is None else self.prompt * self.frame

    def forward(self, images: Tensor) -> Tensor:
        """Maps (N, 3, H, W) in [0, 1] to normalised, prompted (N, 3, H, W)."""
        pixels = self.pixels()
        if pixels is None:
            return images * self.scale + self.shift
        if self.kind == "additive":
            return images * self.scale + (self.shift + pixels)
        border = self.width
        inner = (self.size[0] - 2 * border, self.size[1] - 2 * border)
        shrunk = F.interpolate(images, inner, mode="bilinear", align_corners=False, antialias=False)
        return F.pad(shrunk * self.scale + self.shift, (border,) * 4) + pixels


class Prompted(nn.Module):
    """A network behind its input stage: what is trained, exported and shipped."""

    def __init__(self, stage: InputStage, network: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Maps float32 RGB images (N, 3, H, W) in [0, 1] to the network's outputs."""
        return self.network(self.stage(images))
