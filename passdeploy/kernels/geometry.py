"""What a launch of a kernel looks like: name, grid, block, shared memory, parameters. No torch and no GPU needed.

The real launcher, the CPU emulation of the tests and any other caller (pycuda, a plugin) use the same numbers, so what
the tests ran is what a GPU runs. Nothing here depends on the device: the same input is reduced in the same order on
every GPU of one kind.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, ClassVar

ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu", "hardswish")
"""In the order of ``enum Activation`` in kernels/activation.cuh."""

TYPE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
"""Suffix of a kernel's name -> bytes of an element."""

THREADS = 256
_UNROLL = 2  # kUnroll in masked_channels.cuh
_TARGET_BLOCKS = 1024  # enough to fill the largest GPU; a constant, so that the order of sums does not depend on it
_WIDEST_SUMMED = 32  # packets: 512 bytes side by side
_MAX_ELEMENTS = 2**31 - 1
_MAX_GRID_Y = 65535
_PIXELS = 8  # kPixels in prompted_input.cu
_MAX_STAGED_BYTES = 48 * 1024  # shared memory that any block gets without asking
_MAX_STAGED_SHRINK = 4.0  # beyond it most staged rows would not be used


class MaskedAffineActParams(ctypes.Structure):
    """``struct MaskedAffineActParams``: device addresses and sizes; 0 is a null pointer."""

    _fields_: ClassVar[Any] = (
        [
            (name, ctypes.c_uint64)
            for name in (
                "x", "residual", "mask", "scale", "shift", "y", "grad_y", "grad_x", "grad_residual", "partial",
                "grad_mask", "grad_scale", "grad_shift",
            )
        ]
        + [
            (name, ctypes.c_uint32)
            for name in (
                "elements", "channels", "plane", "items", "item_packets", "period", "tile_columns", "tile_rows",
                "slices", "positions",
            )
        ]
        + [("activation", ctypes.c_int32), ("reserved", ctypes.c_int32)]
    )  # fmt: skip


class PromptedInputParams(ctypes.Structure):
    """``struct PromptedInputParams``."""

    _fields_: ClassVar[Any] = (
        [(name, ctypes.c_uint64) for name in ("images", "scale", "shift", "prompt", "out")]
        + [
            (name, ctypes.c_uint32)
            for name in (
                "count", "source_height", "source_width", "height", "width", "border", "groups", "tile_rows",
                "tile_groups", "resampled", "staged",
            )
        ]
        + [("step_y", ctypes.c_float), ("step_x", ctypes.c_float), ("channels_last", ctypes.c_uint32)]
    )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: Name of the ``extern "C"`` function.
        grid: Blocks (x, y, z).
        threads: Threads per block.
        shared_bytes: Dynamic shared memory.
        params: The one argument, passed by value. Its addresses are filled in by the caller.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    params: ctypes.Structure


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class ActivationShape:
    """A tensor as `masked_affine_act` sees it.

    Attributes:
        images: Size of the first dimension (of all but the last, when `channels_last`).
        channels: Size of the channel dimension.
        plane: Elements of one channel of one image; 1 when `channels_last`, whose pixels count as images.
        channels_last: Whether the channels of a pixel lie side by side.
        kind: f32, f16 or bf16.
    """

    images: int
    channels: int
    plane: int
    channels_last: bool
    kind: str

    @property
    def elements(self) -> int:
        return self.images * self.channels * self.plane

    @property
    def packet(self) -> int:
        """Elements of 16 bytes."""
        return 16 // TYPE_BYTES[self.kind]

    @property
    def period(self) -> int:
        """Packets after which the channels of a row-major matrix repeat."""
        return self.channels // math.gcd(self.channels, self.packet)

    @property
    def fits(self) -> bool:
        """Whether the kernels' 32-bit indices reach; a larger tensor takes the reference implementation."""
        return 0 < self.elements <= _MAX_ELEMENTS and self.period * self.packet <= _MAX_ELEMENTS // 8

    def _name(self, stage: str) -> str:
        return f"masked_affine_act_{stage}_{'nhwc' if self.channels_last else 'nchw'}_{self.kind}"

    def _params(self, activation: str) -> MaskedAffineActParams:
        return MaskedAffineActParams(
            elements=self.elements,
            channels=self.channels,
            plane=self.plane,
            activation=ACTIVATIONS.index(activation),
        )

    def _columns(self, params: MaskedAffineActParams, rows_per_thread: int, widest: int) -> tuple[int, int]:
        """Fills in the tile of an nhwc kernel, at most `widest` packets wide; returns the grid's x and y."""
        column_tiles = _ceil(self.period, widest)
        params.period = self.period
        params.tile_columns = _ceil(self.period, column_tiles)
        params.tile_rows = THREADS // params.tile_columns
        rows = _ceil(_ceil(self.elements, self.packet), self.period)
        wanted = _ceil(rows, params.tile_rows * rows_per_thread)
        return column_tiles, max(1, min(wanted, _MAX_GRID_Y))

    def forward(self, activation: str) -> Launch:
        """y from x."""
        params = self._params(activation)
        if self.channels_last:
            # A thread loads its channels' parameters once, so it should have a few rows, unless that idles the GPU.
            packets = _ceil(self.elements, self.packet)
            rows_per_thread = max(_UNROLL, min(16, packets // (_TARGET_BLOCKS * THREADS)))
            x, y = self._columns(params, rows_per_thread, THREADS)
            return Launch(self._name("forward"), (x, y, 1), THREADS, 0, params)
        blocks = _ceil(_ceil(self.elements, self.packet), THREADS * _UNROLL)
        return Launch(self._name("forward"), (blocks, 1, 1), THREADS, 0, params)

    def backward(self, activation: str) -> tuple[Launch, Launch, int]:
        """Gradients: the first pass, the second, and the number of float32 values of `partial` between them."""
        params = self._params(activation)
        if self.channels_last:
            # Narrow: rows are summed in a block, and what its sums take in `partial` is its width.
            x, wanted = self._columns(params, _UNROLL, _WIDEST_SUMMED)
            y = max(1, min(wanted, _TARGET_BLOCKS // x))
            params.positions = self.period * self.packet
            shared = 2 * self.packet * THREADS * 4
        else:
            # A plane that starts out of step with the packets touches one more of them.
            params.item_packets = _ceil(self.plane, self.packet) + (1 if self.plane % self.packet else 0)
            params.items = self.images * params.item_packets
            x, wanted = self.channels, _ceil(params.items, THREADS * _UNROLL)
            y = max(1, min(wanted, _ceil(_TARGET_BLOCKS, x)))
            params.positions = self.channels
            shared = 2 * THREADS // 32 * 4
        params.slices = y
        first = Launch(self._name("backward"), (x, y, 1), THREADS, shared, params)
        second = Launch("masked_affine_act_finish", (self.channels, 1, 1), THREADS, 2 * THREADS // 32 * 4, params)
        return first, second, 2 * y * params.positions


def prompted_input(
    count: int,
    source: tuple[int, int],
    size: tuple[int, int],
    *,
    border: int,
    channels_last: bool,
    kind: str,
) -> Launch:
    """The launch of `prompted_input`.

    Args:
        count: Images.
        source: (height, width) of the uint8 images.
        size: (height, width) of the network's input.
        border: Pixels of an expansive prompt's border; 0: the image fills the input.
        channels_last: Layout of the output.
        kind: f32, f16 or bf16.
    """
    inner = (size[0] - 2 * border, size[1] - 2 * border)
    groups = _ceil(size[1], _PIXELS)
    tile_groups = _ceil(groups, _ceil(groups, THREADS))
    tile_rows = max(1, min(THREADS // tile_groups, size[0]))
    column_tiles = _ceil(groups, tile_groups)
    # Fewer rows per block while there are too few blocks to fill a GPU.
    while tile_rows > 1 and _ceil(size[0], tile_rows) * column_tiles * count < _TARGET_BLOCKS // 4:
        tile_rows = _ceil(tile_rows, 2)
    row_tiles = _ceil(size[0], tile_rows)
    slices = max(1, min(count, _ceil(_TARGET_BLOCKS, row_tiles * column_tiles), _MAX_GRID_Y))
    resampled = inner != tuple(source)
    step = (source[0] / inner[0], source[1] / inner[1])
    # First to last source row of a tile, both neighbours of each included, and the rows that rounding may add.
    staged_rows = min(source[0], math.ceil((tile_rows - 1) * step[0]) + 3)
    staged_bytes = staged_rows * source[1] * 3 + 16
    staged = resampled and staged_bytes <= _MAX_STAGED_BYTES and step[0] <= _MAX_STAGED_SHRINK
    params = PromptedInputParams(
        count=count,
        source_height=source[0],
        source_width=source[1],
        height=size[0],
        width=size[1],
        border=border,
        groups=groups,
        tile_rows=tile_rows,
        tile_groups=tile_groups,
        resampled=resampled,
        staged=staged,
        step_y=step[0],
        step_x=step[1],
        channels_last=channels_last,
    )
    threads = 32 * _ceil(tile_rows * tile_groups, 32)
    return Launch(
        f"prompted_input_{kind}", (row_tiles, slices, column_tiles), threads, staged_bytes if staged else 0, params
    )
