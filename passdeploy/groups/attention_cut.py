"""Attentions that compute a head's width from the number of features: the same, with the width of a head pinned.

`nn.MultiheadAttention` and torchvision's window and grid attentions take features / heads for the width of a head, so
that they can't lose a head as they are. A cut one gets the class below, with all its parameters in their places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SlimMultiheadAttention(nn.MultiheadAttention):
    """Self-attention with fewer heads than its features would make; masks over keys are not known."""

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False keeps PyTorch's encoder layers off their fused path, which takes a head's width from the features."""
        return False

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Maps (N, L, E), or (L, N, E) when `batch_first` is not set, to the same shape; no weights are returned."""
        if key_padding_mask is not None:
            raise NotImplementedError("an attention that lost heads knows no key_padding_mask")
        x = query if self.batch_first or query.ndim == 2 else query.transpose(0, 1)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.num_heads, self.head_dim)
        q, k, v = (part.transpose(-2, -3) for part in qkv.unbind(-3))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        y = self.out_proj(y.transpose(-2, -3).flatten(-2))
        return (y if self.batch_first or query.ndim == 2 else y.transpose(0, 1)), None


def _windows(x: Tensor, window: list[int]) -> Tensor:
    """(B, H, W, C) -> (B * windows, tokens of a window, C)."""
    b, h, w, c = x.shape
    x = x.view(b, h // window[0], window[0], w // window[1], window[1], c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window[0] * window[1], c)


def _shift_mask(height: int, width: int, window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """(windows, tokens, tokens): -100 between tokens that only the cyclic shift has brought together."""
    regions = like.new_zeros((height, width))
    count = 0
    for rows in (slice(0, -window[0]), slice(-window[0], -shift[0] or None), slice(-shift[0], None)):
        for columns in (slice(0, -window[1]), slice(-window[1], -shift[1] or None), slice(-shift[1], None)):
            regions[rows, columns] = count
            count += 1
    flat = _windows(regions[None, :, :, None], window).squeeze(-1)
    return (flat[:, None] != flat[:, :, None]).to(like.dtype) * -100.0


def _window_forward(self: Any, x: Tensor) -> Tensor:
    """Shifted-window attention (Swin, arXiv 2103.14030; v2, arXiv 2111.09883) with a head's width pinned.

    Maps (N, H, W, C) to the same shape.
    """
    window, shift = list(self.window_size), list(self.shift_size)
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    batch, padded_h, padded_w, channels = x.shape
    shift = [0 if window[0] >= padded_h else shift[0], 0 if window[1] >= padded_w else shift[1]]
    if sum(shift) > 0:
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    tokens = _windows(x, window)
    logit_scale, bias = getattr(self, "logit_scale", None), self.qkv.bias
    if logit_scale is not None and bias is not None:  # version 2 has no bias on its keys
        third = len(bias) // 3
        bias = torch.cat([bias[:third], torch.zeros_like(bias[:third]), bias[2 * third :]])
    qkv = F.linear(tokens, self.qkv.weight, bias).reshape(*tokens.shape[:2], 3, self.num_heads, self.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if logit_scale is not None:
        scale = torch.clamp(logit_scale, max=math.log(100.0)).exp()
        scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * scale
    else:
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
    scores = scores + self.get_relative_position_bias()
    if sum(shift) > 0:
        mask = _shift_mask(padded_h, padded_w, window, shift, x)
        per_image = scores.view(batch, len(mask), self.num_heads, *scores.shape[-2:]) + mask[:, None]
        scores = per_image.flatten(0, 1)
    weights = F.dropout(F.softmax(scores, dim=-1), self.attention_dropout, self.training)
    y = F.linear((weights @ v).transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
    y = F.dropout(y, self.dropout, self.training)
    y = y.view(batch, padded_h // window[0], padded_w // window[1], window[0], window[1], channels)
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, padded_h, padded_w, channels)
    if sum(shift) > 0:
        y = torch.roll(y, (shift[0], shift[1]), (1, 2))
    return y[:, :height, :width].contiguous()


def _grid_forward(self: Any, x: Tensor) -> Tensor:
    """MaxViT's relative attention (arXiv 2204.01697) with a head's width pinned.

    Maps (N, groups, tokens, C) to the same shape.
    """
    qkv = self.to_qkv(x).reshape(*x.shape[:3], 3, self.n_heads, self.head_dim)
    q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))
    scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
    y = F.softmax(scores, dim=-1) @ v
    return self.merge(y.transpose(2, 3).flatten(3))


def _subclass(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Gives a module a subclass of its class with another `forward`; once."""
    kind = type(module)
    if not getattr(kind, "slim", False):
        module.__class__ = type(f"Slim{kind.__name__}", (kind,), {"forward": forward, "slim": True})


def _slim_multihead(module: nn.Module) -> None:
    module.__class__ = SlimMultiheadAttention


def _slim_window(module: Any) -> None:
    if not hasattr(module, "head_dim"):
        module.head_dim = module.proj.out_features // module.num_heads
    _subclass(module, _window_forward)


def _slim_grid(module: nn.Module) -> None:
    _subclass(module, _grid_forward)


SLIM: dict[str, Callable[[Any], None]] = {
    "MultiheadAttention": _slim_multihead,
    "ShiftedWindowAttention": _slim_window,
    "ShiftedWindowAttentionV2": _slim_window,
    "RelativePositionalMultiHeadAttention": _slim_grid,
}
"""Per class name, what pins the width of its heads, in place; other classes are taken to be able to lose heads."""


def without_einsum(model: nn.Module) -> None:
    """Gives attentions that are written as sums over five axes, which TensorRT-RTX can't parse, matrix products."""
    for module in model.modules():
        if slim_kind(module) == "RelativePositionalMultiHeadAttention":
            _slim_grid(module)


def slim_kind(module: nn.Module) -> str | None:
    """The key of `SLIM` for a module of torch or torchvision; None for another, and where forward is its own."""
    for kind in type(module).__mro__:
        if kind.__name__ in SLIM and kind.__module__.split(".")[0] in ("torch", "torchvision"):
            ours = getattr(type(module), "slim", False) or isinstance(module, SlimMultiheadAttention)
            return kind.__name__ if ours or type(module).forward is vars(kind)["forward"] else None
    return None
