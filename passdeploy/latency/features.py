"""What a structure's latency is made of, operator by operator, as functions of the kept units.

The terms of one operator are products of its input and output channels: as they are, and rounded up to the width step
of the hardware (a kernel for 16 channels at a time takes as long for 24 channels as for 32). Which of them a backend
really pays, and how much, is for the fit to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from passdeploy.groups import Operator

TERMS = (
    "macs",  # multiply-adds as they are
    "macs_out",  # with the output channels rounded up
    "macs_both",  # with both rounded up; inputs below one step stay as they are (kernels have a case for few inputs)
    "macs_odd",  # of operators with channels that are no multiple of 4: vector kernels give up on those
    "input",  # elements read
    "output",  # elements written, channels rounded up
    "input_reorder",  # elements to be rearranged because the input channels are no multiple of the step
    "output_reorder",
    "weights",
    "count",  # launch
    "reorder_count",
    "residue",  # what is left where a block was removed: elements of its output
    "input_odd",  # elements to be rearranged because the input channels are no multiple of 4
    "output_odd",
    "odd_count",
    "macs_few",  # with the output channels rounded up, of operators whose inputs are fewer than one step
    "few_count",
)
CACHES = (1e6, 2e6, 4e6, 8e6, 16e6, 24e6)
"""Bytes of weights that a cache may hold; the fit chooses among them."""
ODD = 4


class Features:
    """The operators of one network as arrays.

    Args:
        operators: In execution order.
        units: Units per group, in the order of the widths vector.
        step: Channels that the hardware computes at a time.
        bytes_per_weight: 4 for fp32.
    """

    def __init__(
        self, operators: Sequence[Operator], units: Sequence[int], step: int = 16, bytes_per_weight: int = 4
    ) -> None:
        self.units = np.asarray(units, dtype=float)
        self.step, self.bytes_per_weight = step, bytes_per_weight
        self.names = tuple(op.name for op in operators)
        count, groups = len(operators), len(units)
        self.in_units = np.zeros((groups, count))
        self.out_units = np.zeros((groups, count))
        self.gates: list[tuple[int, ...]] = []
        self._removable = np.zeros(count)
        for j, op in enumerate(operators):
            for g, per_unit in op.in_units:
                self.in_units[g, j] += per_unit
            for g, per_unit in op.out_units:
                self.out_units[g, j] += per_unit
            self.gates.append(tuple(op.gates))
            last = op.gates and (j + 1 == count or operators[j + 1].gates != op.gates)
            self._removable[j] = float(bool(last))
        self.in_free = np.array([op.cin for op in operators]) - self.units @ self.in_units
        self.out_free = np.array([op.cout for op in operators]) - self.units @ self.out_units
        kernel = np.array([op.kernel[0] * op.kernel[1] for op in operators], dtype=float)
        in_area = np.array([op.in_hw[0] * op.in_hw[1] for op in operators], dtype=float)
        out_area = np.array([op.out_hw[0] * op.out_hw[1] for op in operators], dtype=float)
        # Convolution groups go whole, so that the channels of one group stay: macs = in/groups * out. With fixed
        # channels per group that is proportional to one side only (a depthwise convolution: one input channel per
        # output).
        self.grouped = np.array([op.groups > 1 for op in operators])
        per_group = np.array([op.cin / op.groups for op in operators])
        transposed = np.array([op.transposed for op in operators])
        # A transposed convolution reads each input pixel once, and writes `kernel` times.
        self.work = kernel * np.where(transposed, in_area, out_area) * np.where(self.grouped, per_group, 1.0)
        self.weight_bytes = kernel * bytes_per_weight * np.where(self.grouped, per_group, 1.0)
        self.in_area, self.out_area = in_area, out_area
        # The first layer's three channels are no misalignment: every backend has a kernel for it. Nor is what no
        # structure changes: of a price that all pay alike (ten classes are no multiple of 4) a fit can't tell whether
        # it is one, and would charge it wherever else widths are odd, thousands of times over.
        self.image = np.array([op.cin <= ODD for op in operators])
        self._may_in, self._may_out = self.in_units.any(axis=0) & ~self.image, self.out_units.any(axis=0)
        # Kernels for a whole step of inputs give up on fewer: ONNX Runtime's read the plain layout then, as of images.
        self._may_few = self._may_in & ~self.grouped
        keys = [(_kind(op), op.groups > 1, op.kernel, _pair(op.stride), op.in_hw, op.cin <= ODD) for op in operators]
        names = sorted(set(keys), key=keys.index)
        self.family = np.array([names.index(key) for key in keys])
        self.families = tuple(
            f"{'grouped ' if grouped and kind != 'depthwise' else ''}{kind} {k[0]}x{k[1]}/{s[0]} at {hw[0]}x{hw[1]}"
            + (" (image)" if image else "")
            for kind, grouped, k, s, hw, image in names
        )
        gate_names = sorted({g for gates in self.gates for g in gates})
        self._gate_columns = [
            np.array([gates[i] if len(gates) > i else groups for gates in self.gates])
            for i in range(max((len(g) for g in self.gates), default=0))
        ]
        self._gated = bool(gate_names)
        # Everything that is linear in the widths as one product: input and output channels, the inputs of each output,
        # and the (first) gate.
        first = self._gate_columns[0] if self._gated else np.full(count, groups)
        gate = np.eye(groups + 1)[:groups, first]
        self._kept_inputs = self.image | self.grouped
        self._linear = np.concatenate([self.in_units, self.out_units, self.in_units * ~self.grouped, gate], axis=1)
        self._free = np.concatenate(
            [self.in_free, self.out_free, np.where(self.grouped, 1.0, self.in_free), (first == groups).astype(float)]
        )

    def channels(self, w: Any, xp: Any = np) -> tuple[Any, Any, Any]:
        """Input channels, output channels and whether an operator runs, each [n, operators], for widths [n, groups]."""
        if xp is np:
            cin = w @ self.in_units + self.in_free
            cout = w @ self.out_units + self.out_free
            runs = np.ones_like(cin)
            if self._gated:
                padded = np.concatenate([w, np.ones((len(w), 1))], axis=1)
                for columns in self._gate_columns:
                    runs = runs * padded[:, columns]
            return cin, cout, runs

        def as_tensor(array: np.ndarray) -> Any:
            return xp.as_tensor(array, dtype=w.dtype, device=w.device)

        cin = w @ as_tensor(self.in_units) + as_tensor(self.in_free)
        cout = w @ as_tensor(self.out_units) + as_tensor(self.out_free)
        runs = xp.ones_like(cin)
        padded = xp.cat([w, xp.ones_like(w[:, :1])], dim=1)
        for columns in self._gate_columns:
            runs = runs * padded[:, xp.as_tensor(columns, device=w.device)]
        return cin, cout, runs

    def terms(self, w: np.ndarray) -> np.ndarray:
        """All terms of all operators: [n, operators, terms]."""
        w = np.atleast_2d(np.asarray(w, dtype=float))
        cin, cout, runs = self.channels(w)
        s = self.step
        up_in, up_out = np.ceil(cin / s) * s, np.ceil(cout / s) * s
        few = np.where(cin < s, cin, up_in)
        inputs = np.where(self.grouped, 1.0, cin)
        few = np.where(self.grouped, 1.0, np.where(self.image, cin, few))
        off_in, off_out = ((cin % s > 0) & self._may_in).astype(float), ((cout % s > 0) & self._may_out).astype(float)
        odd_in, odd_out = (cin % ODD > 0) & self._may_in, (cout % ODD > 0) & self._may_out
        out = np.empty((*cin.shape, len(TERMS)))
        work = runs * self.work
        out[..., 0] = work * inputs * cout
        out[..., 1] = work * inputs * up_out
        out[..., 2] = work * few * up_out
        out[..., 3] = out[..., 0] * (odd_in | odd_out)
        out[..., 4] = runs * self.in_area * cin
        out[..., 5] = runs * self.out_area * up_out
        out[..., 6] = out[..., 4] * off_in
        out[..., 7] = runs * self.out_area * cout * off_out
        out[..., 8] = runs * self.weight_bytes * inputs * cout
        out[..., 9] = runs
        out[..., 10] = runs * (off_in + off_out)
        out[..., 11] = (1 - runs) * self.out_area * cout * self._removable
        out[..., 12] = out[..., 4] * odd_in
        out[..., 13] = runs * self.out_area * cout * odd_out
        out[..., 14] = runs * (odd_in.astype(float) + odd_out)
        few_in = (cin < s) & self._may_few
        out[..., 15] = out[..., 1] * few_in
        out[..., 16] = runs * few_in
        return out

    def cost(self, w: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Sum of all terms times their coefficients [operators, terms], for widths [n, groups]; quick."""
        c = coefficients.T
        used = np.abs(c).sum(axis=1) > 0
        count, s = len(self.names), float(self.step)
        flat = w @ self._linear + self._free
        cin, cout, inputs = flat[:, :count], flat[:, count : 2 * count], flat[:, 2 * count : 3 * count]
        runs = flat[:, 3 * count :]
        for columns in self._gate_columns[1:]:  # nested blocks; rare
            runs = runs * np.concatenate([w, np.ones((len(w), 1))], axis=1)[:, columns]
        runs_in = runs * inputs
        total: np.ndarray = runs @ c[9]
        up_out = np.ceil(cout * (1 / s)) * s
        if used[[0, 3, 8]].any():
            both = runs_in * cout
            total += both @ (c[0] * self.work + c[8] * self.weight_bytes)
            if used[3]:
                odd = (np.fmod(cin, ODD) * self._may_in + np.fmod(cout, ODD) * self._may_out) > 0
                total += (both * odd) @ (c[3] * self.work)
        for unit, (in_area, out_area, number) in ((s, (6, 7, 10)), (ODD, (12, 13, 14))):
            if used[[in_area, out_area, number]].any():
                off_in = runs * ((np.fmod(cin, unit) > 0) & self._may_in)
                off_out = runs * ((np.fmod(cout, unit) > 0) & self._may_out)
                total += (off_in * cin) @ (c[in_area] * self.in_area) + (off_out * cout) @ (c[out_area] * self.out_area)
                total += (off_in + off_out) @ c[number]
        if used[1]:
            total += (runs_in * up_out) @ (c[1] * self.work)
        if used[15] or used[16]:
            few_runs = runs * ((cin < s) & self._may_few)
            total += (few_runs * inputs * up_out) @ (c[15] * self.work) + few_runs @ c[16]
        if used[2]:
            few = np.where(self._kept_inputs | (cin < s), inputs, np.ceil(cin * (1 / s)) * s)
            total += (runs * few * up_out) @ (c[2] * self.work)
        if used[4]:
            total += (runs * cin) @ (c[4] * self.in_area)
        if used[5]:
            total += (runs * up_out) @ (c[5] * self.out_area)
        if used[11]:
            total += (cout - runs * cout) @ (c[11] * self.out_area * self._removable)
        return total

    def weights(self, w: np.ndarray) -> np.ndarray:
        """Bytes of all weights [n]."""
        cin, cout, runs = self.channels(w)
        weights: np.ndarray = (runs * np.where(self.grouped, 1.0, cin) * cout) @ self.weight_bytes
        return weights

    @staticmethod
    def spilled(weights: Any, cache: float) -> Any:
        """Bytes of the weights that come from beyond a cache: all, once they are read in turn and are twice its size.

        Args:
            weights: Bytes of all weights, an array or a tensor.
            cache: Bytes that the cache holds.
        """
        return weights * (weights / cache - 1).clip(0, 1)

    def soft_terms(self, w: torch.Tensor) -> torch.Tensor:
        """The same, differentiable: linear between the steps, no misalignment (what it could be if rounded well).

        What operators of few inputs pay sets in between a step and half of one.
        """
        import torch

        cin, cout, runs = self.channels(w, torch)

        def as_tensor(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array, dtype=w.dtype, device=w.device)

        inputs = torch.where(as_tensor(self.grouped).bool(), torch.ones_like(cin), cin)
        macs = runs * as_tensor(self.work) * inputs * cout
        none = torch.zeros_like(macs)
        residue = (1 - runs) * as_tensor(self.out_area * self._removable) * cout
        few = runs * (2 - 2 * cin / self.step).clamp(0, 1) * as_tensor(self._may_few.astype(float))
        return torch.stack(
            [
                macs,
                macs,
                macs,
                none,
                runs * as_tensor(self.in_area) * cin,
                runs * as_tensor(self.out_area) * cout,
                none,
                none,
                runs * as_tensor(self.weight_bytes) * inputs * cout,
                runs,
                none,
                residue,
                none,
                none,
                none,
                few * as_tensor(self.work) * inputs * cout,
                few,
            ],
            dim=-1,
        )


def _kind(op: Operator) -> str:
    return f"transposed {op.kind}" if op.transposed else op.kind


def _pair(stride: int | tuple[int, int]) -> tuple[int, int]:
    return (stride, stride) if isinstance(stride, int) else (stride[0], stride[1])
