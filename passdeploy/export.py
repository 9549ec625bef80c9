"""ONNX files: exported from a model, or cut for many structures out of one dense export.

Every file has one float32 input ``images`` (N, 3, H, W) in [0, 1], one output ``logits``, a fixed batch, and the
normalisation, the prompt and all weights inside.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from passdeploy.errors import BadInput
from passdeploy.groups.check import first_line, random_structure
from passdeploy.groups.types import Groups
from passdeploy.onnx_graph import consumers_of, fold_rectifiers, fold_zeros, remove_unused, tidy
from passdeploy.structure import Structure
from passdeploy.surgery import apply_architecture, architecture

INPUT, OUTPUT = "images", "logits"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter prints and logs on its way."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_model(model: nn.Module, input_shape: Sequence[int], batch: int = 1) -> Any:
    """Exports a model to an `onnx.ModelProto`: constants folded, batch norms fused, removed branches gone.

    Args:
        model: Images -> logits; exported in eval mode, in float32, from a copy on the CPU.
        input_shape: (3, H, W).
        batch: Images per inference; fixed in the file.

    Raises:
        BadInput: The model can't be exported.
    """
    clone = copy.deepcopy(model).cpu().float().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    clone.requires_grad_(False)
    example = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with _quiet(), torch.no_grad():
            _resolve_adaptive_pools(clone, example)
            program = torch.onnx.export(
                clone, (example,), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise BadInput(f"the model can't be exported to ONNX: {first_line(cause)}") from error
    assert program is not None
    return tidy(program.model_proto)


def export_onnx(model: nn.Module, path: Path, input_shape: Sequence[int], batch: int = 1) -> Path:
    """Writes a model as an ONNX file (arguments as for `export_model`); returns `path`.

    Raises:
        BadInput: The model can't be exported, or the file can't be written.
    """
    import onnx

    from passdeploy.workspace import write_atomic

    proto = export_model(model, input_shape, batch)
    onnx.checker.check_model(proto, full_check=True)
    path = Path(path)
    write_atomic(path, proto.SerializeToString())
    return path


def run_onnx(data: bytes, images: np.ndarray) -> np.ndarray:
    """Outputs of an ONNX file's bytes in ONNX Runtime on one CPU thread, operator by operator as the file has them.

    Without graph optimisations, so that an engine is compared with the file and not with itself.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs: np.ndarray = session.run(None, {INPUT: images})[0]
    return outputs


class _Resample(nn.Module):
    """Adaptive average pooling between fixed sizes that don't divide: two small matrix products.

    The exporter writes such a pooling as a tangle of gathers whose constants contain the channel count.
    """

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", _pooling_matrix(source[0], target[0]))
        self.register_buffer("columns", _pooling_matrix(source[1], target[1]).T.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, *source) to (N, C, *target)."""
        return torch.matmul(torch.matmul(self.rows, x), self.columns)


def _pooling_matrix(source: int, target: int) -> torch.Tensor:
    """(target, source): row i averages the inputs floor(i * source / target) .. ceil((i + 1) * source / target) - 1."""
    matrix = torch.zeros(target, source)
    for i in range(target):
        start, end = i * source // target, -(-(i + 1) * source // target)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _resolve_adaptive_pools(model: nn.Module, example: torch.Tensor) -> None:
    """Replaces adaptive average pools by what they are at this input size, in place."""
    sizes: dict[nn.Module, set[tuple[tuple[int, int], tuple[int, int]]]] = {}

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        source, target = inputs[0].shape[-2:], output.shape[-2:]
        sizes.setdefault(module, set()).add(((source[0], source[1]), (target[0], target[1])))

    pools = [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    hooks = [pool.register_forward_hook(record) for pool in pools]
    model(example)
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child not in sizes or len(sizes[child]) != 1:
                continue
            ((source, target),) = sizes[child]
            if source == target:
                setattr(parent, name, nn.Identity())
            elif source[0] % target[0] or source[1] % target[1]:
                setattr(parent, name, _Resample(source, target))


class _Uncut(Exception):
    """A part of the graph whose relation to the modules is not known."""


class OnnxSlicer:
    """Thin ONNX files of many structures from one dense export, in milliseconds each.

    Initialisers are sliced by the index maps of the groups, removed branches are cut out of the graph. On one random
    structure the result is compared with a real export of the thin model; if it differs, every structure is exported
    for real.

    Attributes:
        exact: Whether slicing is used.
        reason: Why not; empty when it is.

    Args:
        model: The dense model; the network lies in it under `prefix`.
        groups: Of the network.
        input_shape: (3, H, W).
        batch: Images per inference.
        prefix: Where the network lies in the model.
        verify: Whether the comparison is made; without it slicing is trusted.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        input_shape: Sequence[int],
        batch: int = 1,
        *,
        prefix: str = "network.",
        verify: bool = True,
    ) -> None:
        self.model = copy.deepcopy(model).cpu().float().eval()
        self.groups, self.input_shape, self.batch, self.prefix = groups, tuple(input_shape), batch, prefix
        self.proto = export_model(self.model, input_shape, batch)
        self._modules = dict(self._network().named_modules())
        self.exact, self.reason = True, ""
        try:
            self._prepare()
        except _Uncut as error:
            self.exact, self.reason = False, str(error)
        if verify and self.exact:
            self._verify()

    def slice(self, structure: Structure) -> bytes:
        """The ONNX file of the thin model of a structure.

        Raises:
            BadInput: The structure is not one of the groups', or empties one.
        """
        arch = architecture(self.groups, structure)
        return self._sliced(arch) if self.exact else self._exported(arch)

    def _network(self) -> nn.Module:
        return self.model.get_submodule(self.prefix.rstrip(".")) if self.prefix else self.model

    def _exported(self, arch: Mapping[str, Any]) -> bytes:
        thin = copy.deepcopy(self.model)
        network = apply_architecture(self._network(), arch)
        if self.prefix:
            parent, _, leaf = self.prefix.rstrip(".").rpartition(".")
            setattr(thin.get_submodule(parent), leaf, network)
        else:
            thin = network
        data: bytes = export_model(thin, self.input_shape, self.batch).SerializeToString()
        return data

    def _prepare(self) -> None:
        """Finds the initialisers of every member and the value that every gate computes."""
        from onnx import numpy_helper

        self._arrays = {i.name: numpy_helper.to_array(i) for i in self.proto.graph.initializer}
        self._owner: dict[str, tuple[str, str]] = {}
        for group in self.groups.groups:
            for member in group.members:
                found = False
                for kind in ("weight", "bias", "running_mean", "running_var", "weight_bias"):
                    name = f"{self.prefix}{member.module}.{kind}"
                    if name in self._arrays:
                        self._owner[name] = (member.module, kind)
                        found = True
                if not found and not isinstance(self._modules[member.module], nn.modules.batchnorm._BatchNorm):
                    raise _Uncut(f"the exported graph has no weights of {member.module}")
        readers = consumers_of(self.proto)
        self._gate_values = {}
        for group in self.groups.groups:
            if group.kind == "depth":
                self._gate_values[group.gate] = self._gate_value(group.gate, group.branch, readers)
        self._skeleton = copy.deepcopy(self.proto)
        del self._skeleton.graph.initializer[:]
        del self._skeleton.graph.value_info[:]
        self._free_flattening()

    def _gate_value(self, gate: str, branch: Sequence[str], readers: Mapping[str, list[Any]]) -> str:
        """The graph's value that is the output of a gate module: a fused batch norm's is its convolution's."""
        for module in reversed(branch[: branch.index(gate) + 1]):
            nodes = readers.get(f"{self.prefix}{module}.weight", [])
            if len(nodes) == 1 and nodes[0].op_type in ("Conv", "ConvTranspose", "BatchNormalization", "Gemm"):
                value: str = nodes[0].output[0]
                return value
            if not isinstance(self._modules[module], nn.modules.batchnorm._BatchNorm):
                break
        raise _Uncut(f"the exported graph has no single node for {gate}")

    def _free_flattening(self) -> None:
        """Lets reshapes to (N, features) infer the features, which slicing changes."""
        for node in self._skeleton.graph.node:
            if node.op_type == "Reshape" and node.input[1] in self._arrays:
                shape = self._arrays[node.input[1]]
                if len(shape) == 2 and shape[0] == self.batch:
                    self._arrays[node.input[1]] = np.array([shape[0], -1], dtype=np.int64)

    def _sliced(self, arch: Mapping[str, Any]) -> bytes:
        from onnx import numpy_helper

        proto = type(self._skeleton)()
        proto.CopyFrom(self._skeleton)
        if fold_zeros(proto, {self._gate_values[branch["gate"]] for branch in arch["branches"]}):
            fold_rectifiers(proto)
        used = remove_unused(proto)
        self._set_conv_groups(proto, arch)
        for name, array in self._arrays.items():
            if name not in used:
                continue
            if name in self._owner and self._owner[name][0] in arch["modules"]:
                module, kind = self._owner[name]
                array = _cut_array(array, kind, self._modules[module], arch["modules"][module])
            proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        data: bytes = proto.SerializeToString()
        return data

    def _set_conv_groups(self, proto: Any, arch: Mapping[str, Any]) -> None:
        for node in proto.graph.node:
            if node.op_type not in ("Conv", "ConvTranspose") or node.input[1] not in self._owner:
                continue
            name = self._owner[node.input[1]][0]
            module, entry = self._modules[name], arch["modules"].get(name, {})
            if getattr(module, "groups", 1) == 1 or "out" not in entry:
                continue
            assert isinstance(module, nn.modules.conv._ConvNd)
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = len(entry["out"]["kept"]) * module.groups // module.out_channels

    def _verify(self) -> None:
        structure = random_structure(self.groups, seed=7)
        arch = architecture(self.groups, structure)
        images = torch.rand(
            self.batch, *self.input_shape, generator=torch.Generator().manual_seed(0)
        ).numpy()  # fmt: skip
        try:
            sliced = run_onnx(self._sliced(arch), images)
        except Exception as error:
            self.exact, self.reason = False, f"the sliced graph does not run: {first_line(error)}"
            return
        exported = run_onnx(self._exported(arch), images)
        scale = max(float(np.abs(exported).max()), 1e-30)
        if sliced.shape != exported.shape or not np.abs(sliced - exported).max() / scale <= 1e-4:
            self.exact, self.reason = False, "the sliced graph computes something else than the exported one"


def _cut_array(array: np.ndarray, kind: str, module: nn.Module, entry: Mapping[str, Any]) -> np.ndarray:
    """Slices one initialiser of a module as surgery would slice the parameter."""
    outside = entry["out"]["kept"] if "out" in entry else None
    inside = entry["in"]["kept"] if "in" in entry else None
    if kind != "weight" or not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return array if outside is None else array.take(outside, 0)
    in_dimension, out_dimension = (0, 1) if getattr(module, "transposed", False) else (1, 0)
    if getattr(module, "groups", 1) > 1:
        assert isinstance(module, nn.modules.conv._ConvNd)
        if outside is None:
            return array
        if module.transposed:
            each_out, each_in = module.out_channels // module.groups, module.in_channels // module.groups
            kept = np.unique(np.asarray(outside) // each_out)
            outside = (kept[:, None] * each_in + np.arange(each_in)).reshape(-1)
        return array.take(outside, 0)
    if inside is not None:
        array = array.take(inside, in_dimension)
    if outside is not None:
        array = array.take(outside, out_dimension)
    return array
