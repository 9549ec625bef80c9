"""Weights as files: read without ever running code from them, checked against the model before it is touched."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passdeploy.errors import BadInput

if TYPE_CHECKING:
    from passdeploy.data.base import ImageData

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights", "params")
"""Keys under which training scripts put the weights in a checkpoint, in the order they are looked for."""

_HELPERS = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
"""Prefixes of torchvision's auxiliary classifiers, which help a training only and are not built here."""

_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""Names in the DenseNets that torchvision publishes, of a time when a module's name could have a dot in it."""

PACKAGED = Path(__file__).parent / "models" / "weights"


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads weights into `model`, which is left as it was when they are refused.

    Reads safetensors and tensor-only ``.pth``/``.pt`` files, also inside ``{"state_dict": ...}`` and the like, and
    with the name prefixes that `DataParallel`, `DistributedDataParallel`, `AveragedModel`, `torch.compile` and the
    usual Lightning modules (``model.``, ``net.``) add.
    Halves are converted to the model's own type. Names of older versions are those that the modules' own loading, or
    torchvision's, gives them.

    Args:
        model: Takes the weights, on whatever device it is.
        path: The file.

    Raises:
        BadInput: The file is missing, damaged, of another architecture or number of classes, a pickle of Python
            objects, or holds NaN or Inf.
    """
    path, model = Path(path), unwrap(model)
    own = model.state_dict()
    if any(isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer) for value in own.values()):
        raise BadInput(f"{path}: the model has lazy layers without a shape; run one forward pass in its factory first")
    state = _match_names(own, read_state(path))
    if state.keys() != own.keys():
        state = _fill_aliases(own, _renamed(model, state))
    _check_names_and_shapes(path, own, state)
    _check_values(path, own, state)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)  # state_dict's tensors share the model's memory


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def packaged_weights(model: str, data: ImageData) -> Path | None:
    """The weights that ship with the package for a named model, trained on these data; None when there are none.

    A name alone says little: a folder may have any, and a named set can be given other sizes or another normalisation.
    """
    name = f"{model}-{data.name}.safetensors"
    path = PACKAGED / name
    if Path(name).name != name or not path.is_file():
        return None
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return path if card["trained_for"] == trained_for(data) else None


def trained_for(data: ImageData) -> dict[str, Any]:
    """What weights that were trained on these data expect, as their model card has it."""
    facts = {"classes": data.classes, "preprocess": dataclasses.asdict(data.preprocess)}
    made: dict[str, Any] = json.loads(json.dumps(facts))
    return made


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes the model's weights as safetensors, atomically.

    Every name is written, also names that share one tensor, so that any reader finds what `state_dict` lists.

    Raises:
        BadInput: The file can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    state = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in unwrap(model).state_dict().items()
        if isinstance(value, Tensor)
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # others may be writing the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BadInput(f"{path}: can't be written ({_one_line(error)}); choose another folder or free space") from None


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads the named tensors of a weights file, on the CPU; the kind of file is told by its content.

    Raises:
        BadInput: See `load_weights`.
    """
    head = _head(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _tensors_of(path, _read_torch(path))
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: a Git LFS pointer, not the weights; run git lfs pull")
    raise BadInput(
        f"{path}: neither safetensors nor a torch file (starts with {head[:12]!r}); give the weights file itself"
    )


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".safetensors", ".pth", ".pt"))[:5]
        hint = f"; in that folder: {', '.join(near)}" if near else "; check the path"
        raise BadInput(f"{path}: no such weights file{hint}") from None
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror}); give a weights file that you may read") from None
    if not head:
        raise BadInput(f"{path}: the weights file is empty; copy or download it again")
    return head


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"{path}: truncated or damaged safetensors ({_one_line(error)}); copy or download it again"
        ) from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file that looks like a TorchScript")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(_pickle_refusal(path, error)) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle fails in any way whatever
        if "TorchScript" in str(error):
            raise BadInput(_script_refusal(path)) from None
        raise BadInput(
            f"{path}: truncated or damaged torch file ({_one_line(error)}); copy or download it again"
        ) from None


def _script_refusal(path: Path) -> str:
    return f"{path}: a TorchScript archive, which is code; where it was made, use torch.save(model.state_dict(), ...)"


def _pickle_refusal(path: Path, error: Exception) -> str:
    """Says what kind of pickle it is: a whole module, or a checkpoint with other Python objects."""
    convert = 'where it was made, save only tensors: torch.save(model.state_dict(), "weights.pth")'
    try:
        objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        objects = []
    if "TorchScript" in str(error):
        return _script_refusal(path)
    if not objects:
        return f"{path}: damaged, or not made by torch.save ({_one_line(error)}); {convert}"
    first = next((name for name in objects if not name.startswith("torch.")), objects[0])
    if any(name.startswith(("torch.nn.modules.", "torch.fx.")) for name in objects):
        return f"{path}: a pickled whole module ({first}), refused because loading it would run code; {convert}"
    return f"{path}: holds Python objects ({first}), refused because loading them would run code; {convert}"


def _tensors_of(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in what `torch.load` returned."""
    if isinstance(content, Mapping):
        tensors = {
            name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
        }
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is not None:
            return _tensors_of(path, inner)
        if tensors:
            return tensors
        keys = ", ".join(map(str, list(content)[:6]))
        raise BadInput(f"{path}: no weights in it (keys: {keys or 'none'}); save torch.save(model.state_dict(), ...)")
    raise BadInput(
        f"{path}: holds a {type(content).__name__}, not named tensors; save torch.save(model.state_dict(), ...)"
    )


def _match_names(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes off the prefixes of wrappers, and drops what wrappers add, unless the model has such names itself."""
    if not any("_orig_mod." in name for name in own):
        state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    if "n_averaged" not in own:
        state.pop("n_averaged", None)
    for prefix in ("module.", "model.", "net.", "network.", "module."):
        if state and all(n.startswith(prefix) for n in state) and not any(n.startswith(prefix) for n in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    for helper in _HELPERS:
        if not any(name.startswith(helper) for name in own):
            state = {name: value for name, value in state.items() if not name.startswith(helper)}
    return state


def _renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds, under the names that the model's modules give it as they load it.

    torchvision publishes its vision transformers with names of an older version, and frozen norms have no batch
    counter. Shapes do not matter here: the number of classes is told of later.
    """
    names: dict[str, Tensor] = {}

    def load(module: nn.Module, given: dict[str, Tensor], prefix: str) -> None:
        # Renames in place, in a step of `load_state_dict`; what does not fit goes into lists that nobody reads.
        module._load_from_state_dict(given, prefix, {}, False, [], [], [])
        children = {f"{prefix}{name}.": child for name, child in module.named_children()}
        for start, child in children.items():
            load(child, {name: value for name, value in given.items() if name.startswith(start)}, start)
        names.update((name, value) for name, value in given.items() if not name.startswith(tuple(children)))

    try:
        load(copy.deepcopy(model), {_DENSE_LAYER.sub(r"\1\2", name): value for name, value in state.items()}, "")
    except Exception:  # code of the network's, which expects other weights
        return state
    return names


def _fill_aliases(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds what a file may leave out: the second name of a shared tensor, and batch counters (absent in old files)."""
    by_memory: dict[tuple[int, torch.Size], Tensor] = {}
    for name, value in own.items():
        if name in state and value.numel():
            by_memory[value.data_ptr(), value.shape] = state[name]
    filled = dict(state)
    for name, value in own.items():
        if name in filled:
            continue
        if (value.data_ptr(), value.shape) in by_memory:
            filled[name] = by_memory[value.data_ptr(), value.shape]
        elif name.endswith("num_batches_tracked"):
            filled[name] = value
    return filled


def _check_names_and_shapes(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    if not (missing or unexpected or other):
        return
    owners = {n.rpartition(".")[0] for n in other}
    heads = {(state[n].shape[:1], own[n].shape[:1]) for n in other if state[n].shape[1:] == own[n].shape[1:]}
    if (
        not missing
        and not unexpected
        and len(heads) == 1
        and len(owners) == 1
        and all(len(size) == 1 for pair in heads for size in pair)
        and all(state[n].shape[1:] == own[n].shape[1:] for n in other)
    ):
        (theirs,), (ours,) = next(iter(heads))
        raise BadInput(
            f"{path}: these weights tell {theirs} classes apart, the data has {ours} ({other[0]} is "
            f"{_shape(state[other[0]])}, the model wants {_shape(own[other[0]])}); give weights or data that fit"
        )
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} names missing (first: {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unknown (first: {unexpected[0]})")
    if other:
        n = other[0]
        parts.append(
            f"{len(other)} of another shape (first: {n} is {_shape(state[n])}, the model wants {_shape(own[n])})"
        )
    raise BadInput(
        f"{path}: weights of another architecture: {', '.join(parts)}; give the --model they were trained with"
    )


def _check_values(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    quantised = [n for n in own if own[n].is_floating_point() and not state[n].is_floating_point()]
    if quantised:
        raise BadInput(
            f"{path}: {quantised[0]} is {state[quantised[0]].dtype}, not floating point; give unquantised weights"
        )
    bad = {}
    for name, value in state.items():
        if value.is_floating_point():
            given = value.to(own[name].dtype)
            # An infinity that the model is made with is no weight but a mask, such as an attention's.
            bad[name] = int((~given.isfinite() & (given != own[name].to(given.device))).sum())
    broken = [name for name, count in bad.items() if count]
    if broken:
        first = f"{broken[0]}, {bad[broken[0]]} of {own[broken[0]].numel()} values"
        raise BadInput(
            f"{path}: NaN or Inf in {len(broken)} of {len(own)} tensors (first: {first}); "
            "the training diverged, give an earlier checkpoint"
        )


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
