"""Thin ONNX files of many structures, cut out of one dense export in milliseconds.

Profiling measures dozens of structures; exporting each for real takes seconds. What depends on the structure in an
exported graph is little: the initialisers of the groups' members (sliced by the groups' index maps), the `group` of
grouped convolutions, the constant shapes of reshapes, and the nodes of removed branches. Which constant shapes change
is learnt by comparing the dense graph with one thin model's; the result is checked against PyTorch.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from passdeploy.engines.base import INPUT
from passdeploy.groups.attention import attentions, gate_name
from passdeploy.groups.channels import NORMS
from passdeploy.groups.check import first_line, random_structure, without_one
from passdeploy.groups.frozen import thaw
from passdeploy.groups.types import ChannelGroup, Groups
from passdeploy.groups.wrapped import first_names
from passdeploy.onnx_cut import cut_array
from passdeploy.onnx_export import export_model
from passdeploy.onnx_graph import consumers_of, fold_rectifiers, fold_zeros, remove_unused, rename_parameters
from passdeploy.structure import Structure
from passdeploy.surgery import apply_architecture, architecture

_KINDS = ("weight", "bias", "running_mean", "running_var", "weight_bias")
_TOLERANCE = 1e-4


class _Uncut(Exception):
    """A part of the graph whose relation to the modules is not known."""


def _run(data: bytes, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # a graph that does not run is an answer here, not news
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs: np.ndarray = session.run(None, {INPUT: images})[0]
    return outputs


class OnnxSlicer:
    """Cuts thin ONNX files out of one dense export.

    Where the graph of a network can't be cut, every structure is exported for real instead.

    Attributes:
        exact: Whether files are cut.
        reason: Why not; empty when they are.

    Args:
        model: The dense model; the network lies in it under `prefix`.
        groups: Of the network.
        input_shape: (3, H, W).
        batch: Images per inference.
        prefix: Where the network lies in the model.
    """

    def __init__(
        self, model: nn.Module, groups: Groups, input_shape: Sequence[int], batch: int = 1, *, prefix: str = "network."
    ) -> None:
        self.model = copy.deepcopy(model).cpu().float().eval()
        thaw(self.model)
        self.groups, self.input_shape, self.batch, self.prefix = groups, tuple(input_shape), batch, prefix
        _tell_apart(self.model)
        self._network = self.model.get_submodule(prefix.rstrip(".")) if prefix else self.model
        self._modules, self._first = dict(self._network.named_modules()), first_names(self._network)
        self._attentions = {name: spec for name, _, spec in attentions(self._network)}
        self.exact, self.reason = True, ""
        try:
            self._prepare()
            self._learn_shapes()
            self._verify()
        except _Uncut as error:
            self.exact, self.reason = False, str(error)

    def slice(self, structure: Structure) -> bytes:
        """The ONNX file of the thin model of a structure.

        Raises:
            BadInput: The structure is not one of the groups', or empties one.
        """
        arch = architecture(self.groups, structure)
        if self.exact:
            return self._sliced(arch)
        return bytes(export_model(self._thin(arch), self.input_shape, self.batch).SerializeToString())

    def thin(self, structure: Structure) -> nn.Module:
        """The thin model of a structure, whose ONNX file `slice` gives; its weights' values are not the network's."""
        return self._thin(architecture(self.groups, structure))

    def _thin(self, arch: Mapping[str, Any]) -> nn.Module:
        network = apply_architecture(self._network, arch)
        if not self.prefix:
            return network
        # the memo makes the copy take the thin network in the dense one's place
        return copy.deepcopy(self.model, {id(self._network): network})

    def _prepare(self) -> None:
        """Exports the dense model, and finds the initialisers of every member and the value of every gate."""
        from onnx import numpy_helper

        exported = export_model(self.model, self.input_shape, self.batch)
        proto = rename_parameters(exported, self._first, self.prefix)  # as members of groups are called
        self._arrays = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        self._owner: dict[str, tuple[str, str]] = {}
        for module in {member.module for group in self.groups.groups for member in group.members}:
            self._claim(module)
        readers = consumers_of(proto)
        self._gates = {g.gate: self._gate_value(g, readers) for g in self.groups.groups if g.kind == "depth"}
        self._shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
        del proto.graph.initializer[:]
        del proto.graph.value_info[:]
        self._skeleton = proto

    def _claim(self, module: str) -> None:
        """Notes which initialisers are a module's parameters (a linear layer's may have been transposed)."""
        if module in self._attentions:
            self._claim_packed(module)
            return
        names = [name for kind in _KINDS if (name := f"{self.prefix}{module}.{kind}") in self._arrays]
        for name in names:
            self._owner[name] = (module, name.rpartition(".")[2])
        weight = f"{self.prefix}{module}.weight"
        layer = self._modules[module]
        if weight not in self._arrays and isinstance(layer, nn.Linear):
            names += self._claim_equal(module, layer.weight.detach().numpy().T, "transposed")
        if not names and isinstance(layer, nn.PReLU | nn.GroupNorm):
            names = [name for kind in ("weight", "bias") for name in self._claim_per_channel(module, kind)]
        batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)  # may have become part of its convolution
        if not names and not batch_norm and getattr(layer, "affine", True):
            raise _Uncut(f"the exported graph has no weights of {module}")

    def _claim_per_channel(self, module: str, parameter: str) -> list[str]:
        """Notes the initialisers that hold a value per channel of a module, shaped to meet its images."""
        values = getattr(self._modules[module], parameter, None)
        flat, names = np.empty(0) if values is None else values.detach().numpy(), []
        for name, array in self._arrays.items():
            if name not in self._owner and array.size == len(flat) and np.array_equal(array.reshape(-1), flat):
                self._owner[name] = (module, f"axis {array.shape.index(len(flat))}")
                names.append(name)
        return names

    def _claim_norm(self, node: Any, position: int) -> bool:
        """Notes a one or a zero per channel, or group of them, which a norm's operators have."""
        array, path = self._arrays[node.input[position]], node.output[0].rpartition("/")[0].removeprefix(self.prefix)
        module = self._first.get(path, path)
        norm = node.op_type in ("InstanceNormalization", "Mul") and isinstance(self._modules.get(module), NORMS)
        if not norm or (array != array.flat[0]).any():
            return False
        name = f"{node.name}_{position}"  # equal constants of other norms lose others
        self._arrays[name], node.input[position] = array, name
        self._owner[name] = (module, "groups")
        return True

    def _claim_equal(self, module: str, values: np.ndarray, kind: str) -> list[str]:
        """Notes the initialisers that hold these values as a module's."""
        names = [
            name
            for name, array in self._arrays.items()
            if array.shape == values.shape and name not in self._owner and np.array_equal(array, values)
        ]
        self._owner |= dict.fromkeys(names, (module, kind))
        return names

    def _claim_packed(self, module: str) -> None:
        """Notes the queries', keys' and values' weights that an attention keeps itself, without a layer."""
        if self._attentions[module].qkv:
            return
        for parameter in ("in_proj_weight", "in_proj_bias"):
            values = getattr(self._modules[module], parameter)
            if values is None:
                continue
            name, values = f"{self.prefix}{module}.{parameter}", values.detach().numpy()
            if name in self._arrays:
                self._owner[name] = (module, "rows")
            elif values.ndim != 2 or not self._claim_equal(module, values.T, "columns"):
                raise _Uncut(f"the exported graph has no {parameter} of {module}")

    def _attention_before(self, node: Any) -> str | None:
        """The attention whose queries, keys and values are the nearest before a node."""
        projections = {f"{n}.{part}".rstrip("."): n for n, spec in self._attentions.items() for part in (*spec.qkv, "")}
        made_by = {output: node for node in self._skeleton.graph.node for output in node.output}
        queue, seen = deque([node]), set()
        while queue:
            node = queue.popleft()
            for name in node.input:
                owner = self._owner.get(name, ("", ""))[0]
                if owner in projections:
                    return projections[owner]
                if name in made_by and name not in seen:
                    seen.add(name)
                    queue.append(made_by[name])
        return None

    def _claim_table(self, node: Any, name: str, cut: np.ndarray, kept: Mapping[str, Any]) -> None:
        """Notes a computed constant as a value per head (position biases, scales).

        Raises:
            _Uncut: It is none.
        """
        dense = self._arrays[name]
        axes = [i for i, (a, b) in enumerate(zip(dense.shape, cut.shape, strict=False)) if a != b]
        reader: Any = node
        module = self._attention_before(reader)
        while module is None and reader is not None:  # a table is computed, then it meets what is computed from images
            reader = next((n for n in self._skeleton.graph.node if reader.output[0] in n.input), None)
            module = self._attention_before(reader) if reader is not None else None
        cut_heads = None if module is None else kept.get(module, {}).get("out")
        if module is not None and cut_heads is not None and len(axes) == 1 and dense.ndim == cut.ndim:
            spec, left = self._attentions[module], len(cut_heads["kept"])
            sizes, rows = (dense.shape[axes[0]], cut.shape[axes[0]]), 3 * spec.head_dim
            if sizes == (spec.heads, left):
                self._owner[name] = (module, f"axis {axes[0]}")
                return
            if sizes == (spec.heads * rows, left * rows) and axes == [0]:
                self._owner[name] = (module, "rows")
                return
        raise _Uncut(f"the constant {name!r} of {node.op_type} changes its shape with the structure")

    def _gate_value(self, group: ChannelGroup, readers: Mapping[str, list[Any]]) -> str:
        """The graph's value that is the output of a gate module: a fused batch norm's is its convolution's."""
        for module in reversed(group.branch[: group.branch.index(group.gate) + 1]):
            module = gate_name(self._network, module)
            nodes = readers.get(f"{self.prefix}{module}.weight", [])
            if isinstance(self._modules[module], nn.Linear) and not nodes:
                nodes = readers.get(f"{self.prefix}{module}.bias", [])
                nodes = [node for node in nodes if node.op_type == "Add"]
            if isinstance(self._modules[module], nn.GroupNorm):
                owned = [name for name, (owner, _) in self._owner.items() if owner == module]
                nodes = [node for name in owned for node in readers.get(name, [])]
                nodes = [node for node in nodes if node.op_type == "Add"] or nodes
            if len(nodes) == 1 and nodes[0].op_type != "Transpose":
                return str(nodes[0].output[0])
            if not isinstance(self._modules[module], nn.modules.batchnorm._BatchNorm):
                break
        raise _Uncut(f"the exported graph has no single node for {group.gate}")

    def _learn_shapes(self) -> None:
        """Frees what differs in the constant shapes of the dense and of a thin model's graph."""
        from onnx import numpy_helper

        # every channel group loses something, so that every constant that can change does
        arch = architecture(self.groups, without_one(random_structure(self.groups, seed=5, skip=0)))
        thin = export_model(self._thin(arch), self.input_shape, self.batch)
        arrays = {i.name: numpy_helper.to_array(i) for i in thin.graph.initializer}
        ours, theirs = self._skeleton.graph.node, thin.graph.node
        if [(n.op_type, len(n.input)) for n in ours] != [(n.op_type, len(n.input)) for n in theirs]:
            raise _Uncut("a thin model's graph has other operators than the dense one's")
        for node, other in zip(ours, theirs, strict=True):
            for position, (name, twin) in enumerate(zip(node.input, other.input, strict=True)):
                if name not in self._arrays or name in self._owner or twin not in arrays:
                    continue
                dense, cut = self._arrays[name], arrays[twin]
                if dense.shape != cut.shape:
                    if not self._claim_norm(node, position):
                        self._claim_table(node, name, cut, arch["modules"])
                elif dense.dtype == np.int64 and not np.array_equal(dense, cut):
                    self._free(node, position, dense, dense != cut)

    def _free(self, node: Any, position: int, dense: np.ndarray, changed: np.ndarray) -> None:
        """Writes a constant shape so that it holds for every structure."""
        shape = dense.copy()
        if node.op_type == "Reshape" and (shape == -1).sum() == 1 and all(self._shapes.get(node.output[0], ())):
            shape = np.where(shape == -1, self._shapes[node.output[0]], shape)  # there can be one -1 only
        if node.op_type == "Reshape" and changed.sum() == 1 and -1 not in shape:
            shape[changed] = -1
        elif node.op_type == "Expand":
            shape[changed] = 1  # broadcasting keeps what the input has there
        elif node.op_type == "Split" and len(set(dense.tolist())) == 1:
            from onnx import helper

            del node.input[1:]
            node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
            return
        else:
            raise _Uncut(f"a constant shape of {node.op_type} changes with the structure")
        name = f"{node.name}_shape"
        self._arrays[name] = shape
        node.input[position] = name

    def _sliced(self, arch: Mapping[str, Any]) -> bytes:
        from onnx import numpy_helper

        proto = type(self._skeleton)()
        proto.CopyFrom(self._skeleton)
        if fold_zeros(proto, {self._gates[branch["gate"]] for branch in arch["branches"]}):
            fold_rectifiers(proto)
        used = remove_unused(proto)
        self._set_conv_groups(proto, arch)
        for name, array in self._arrays.items():
            if name not in used:
                continue
            if name in self._owner and self._owner[name][0] in arch["modules"]:
                module, kind = self._owner[name]
                array = cut_array(array, kind, self._modules[module], arch["modules"][module])
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return bytes(proto.SerializeToString())

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

    @torch.no_grad()
    def _verify(self) -> None:
        """Compares cut files with thin models in PyTorch: all that can be cut, then with branches removed."""
        images = torch.rand(self.batch, *self.input_shape, generator=torch.Generator().manual_seed(0))
        for seed, skip in ((6, 0.0), (7, 0.4), (8, 1.0)):
            arch = architecture(self.groups, without_one(random_structure(self.groups, seed=seed, skip=skip)))
            try:
                got = _run(self._sliced(arch), images.numpy())
            except Exception as error:
                raise _Uncut(f"a cut graph does not run: {first_line(error)}") from error
            wanted = self._thin(arch)(images).numpy()
            scale = max(float(np.abs(wanted).max()), 1e-30)
            if got.shape != wanted.shape or not np.abs(got - wanted).max() / scale <= _TOLERANCE:
                raise _Uncut("a cut graph computes something else than the thin model")


@torch.no_grad()
def _tell_apart(model: nn.Module) -> None:
    """Moves tensors of one repeated value (a fresh network's zero biases) by next to nothing, in place.

    The exporter merges equal tensors, and a merged one can't be cut differently for two modules.
    """
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(torch.where(tensor == 0, noise * 1e-12, tensor * (1 + noise * 1e-6)))
