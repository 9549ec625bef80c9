"""One network of `benchmarks/coverage.py`, in a process of its own: prints a row of results as JSON after every step.

python benchmarks/coverage_model.py passdeploy NAME FOLDER       our own proofs; leaves the files of a thin network
python benchmarks/coverage_model.py reload NAME FOLDER           builds the network again, cuts it, loads its weights
python benchmarks/coverage_model.py torch-pruning NAME FOLDER    Torch-Pruning's MagnitudePruner at 50 %
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage_models import CLASSES, NEEDED, Case, cases
from torch import Tensor, nn

from passdeploy.groups import Groups, find_groups, macs, operators, params
from passdeploy.groups.check import calibrate, difference, first_line, masked_against_thin, random_structure, randomise
from passdeploy.groups.depgraph import tensors
from passdeploy.structure import Structure
from passdeploy.surgery import apply_architecture, architecture, thin
from passdeploy.weights import load_weights, save_weights

TOLERANCE = 1e-4
CALIBRATION = {"images": 8, "rounds": 2}


@torch.no_grad()
def prepare(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Random norms and biases, and batch-norm statistics that keep activations in range, whatever the depth."""
    randomise(network)
    calibrate(network, shape, **CALIBRATION)
    return network


@torch.no_grad()
def calm(network: nn.Module, groups: Groups, shape: tuple[int, ...]) -> None:
    """Residual branches add a quarter of what they did: at full strength a deep random network amplifies rounding,
    layer by layer, to more than any proof allows; trained ones do not.
    """
    modules = dict(network.named_modules())
    for group in groups.groups:
        if group.kind == "depth":
            for name in ("weight", "bias"):
                if isinstance(tensor := getattr(modules[group.branch[-1]], name, None), Tensor):
                    tensor.mul_(0.25)
    calibrate(network, shape, **CALIBRATION)


def structures(groups: Groups) -> dict[str, Structure]:
    """One unit of every group and no block removed; random; one unit less in every group."""
    full = groups.dense().masks
    width = {g.name for g in groups.groups if g.kind == "channel"}
    return {
        "smallest": Structure({n: (True,) + (False,) * (len(m) - 1) if n in width else m for n, m in full.items()}),
        "random": random_structure(groups, seed=11),
        "largest": Structure({n: (*m[:-1], False) if n in width else m for n, m in full.items()}),
    }


class Row(dict[str, Any]):
    """What is known of a network so far; printed whenever a step is done."""

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Takes a step's CPU seconds (child processes too), and says in the row which one is running."""
        self["running"] = name
        print(json.dumps(self), flush=True)
        begun = sum(os.times()[:4])
        yield
        self.setdefault("seconds", {})[name] = round(sum(os.times()[:4]) - begun, 1)
        del self["running"]
        print(json.dumps(self), flush=True)


def _in_onnx_runtime(network: nn.Module, images: Tensor, path: Path) -> list[Tensor]:
    from passdeploy.export import export_onnx, onnx_function

    export_onnx(network, path, tuple(images.shape[1:]), len(images))
    return [torch.from_numpy(np.asarray(onnx_function(path.read_bytes())(images.numpy())))]


def _engine_mib(path: Path) -> float:
    """Size of the TensorRT-RTX engine for compute capability 8.0."""
    from passdeploy.engines.base import CompileInput
    from passdeploy.engines.tensorrt_rtx import TensorRtRtx
    from passdeploy.targets import Target

    target = Target("a100", "NVIDIA A100", "8.0", "tensorrt_rtx", "fp32", 1, 1, False)
    return len(TensorRtRtx().compile(CompileInput(path), target).data) / 2**20


@torch.no_grad()
def save(network: nn.Module, arch: dict[str, Any], images: Tensor, folder: Path) -> None:
    """Writes what `reload` reads."""
    (folder / "architecture.json").write_text(json.dumps(arch))
    save_weights(network, folder / "model.safetensors")
    np.savez(folder / "proof.npz", images=images.numpy(), outputs=tensors(network(images))[0].numpy())


@torch.no_grad()
def reload(case: Case, folder: Path) -> Row:
    """Whether this process, which has not seen the network, gets identical outputs from the files."""
    row = Row(problem="")
    with row.step("reload"):
        network = apply_architecture(case.build(), json.loads((folder / "architecture.json").read_text()))
        load_weights(network, folder / "model.safetensors")
        proof = np.load(folder / "proof.npz")
        got = tensors(network.eval()(torch.from_numpy(proof["images"])))[0].numpy()
        if not np.array_equal(got, proof["outputs"]):
            row["problem"] = f"outputs differ by {np.abs(got - proof['outputs']).max():.1e}"
    return row


@torch.no_grad()
def passdeploy(case: Case, folder: Path) -> Row:
    """Everything that is claimed of a network, but that its files load again."""
    row = Row(passed=False)
    shape = (3, case.size, case.size)
    with row.step("build"):
        torch.manual_seed(0)
        network = prepare(case.build(), shape)
        row["params"] = sum(p.numel() for p in network.parameters())
    with row.step("groups"), torch.enable_grad():
        groups = find_groups(network, torch.zeros(1, *shape))
        row["channel_groups"] = sum(g.kind == "channel" for g in groups.groups)
        row["depth_units"] = len(groups.groups) - row["channel_groups"]
        row["frozen"] = dict(list(groups.frozen.items())[:12])
        row["frozen_count"] = len(groups.frozen)
    calm(network, groups, shape)
    operations = operators(network, torch.zeros(1, *shape), groups)
    chosen = structures(groups)
    whole = macs(operations)

    def left(structure: Structure, cost: Any) -> float:
        return float(cost(operations, np.array([sum(structure.masks[n]) for n in groups.names], dtype=float)))

    row["macs"] = whole
    row["prunable"] = round(1 - left(chosen["smallest"], macs) / whole, 4)
    row["prunable_params"] = round(1 - left(chosen["smallest"], params) / params(operations), 4)
    images = torch.rand(1, *shape, generator=torch.Generator().manual_seed(2))
    problems = [] if row["prunable"] >= NEEDED else [f"{row['prunable']:.0%} of the MACs can be pruned"]
    row["proofs"] = {}
    for width, structure in chosen.items():
        proof: dict[str, Any] = {"macs": round(left(structure, macs) / whole, 4)}
        row["proofs"][width] = proof
        for step in ("masked_vs_thin", "thin_vs_onnx"):
            with row.step(f"{step} {width}"):
                try:
                    if step == "masked_vs_thin":
                        value = masked_against_thin(network, groups, structure, images)
                    else:
                        small = thin(network, groups, structure).eval()
                        outputs = _in_onnx_runtime(small, images, folder / f"{width}.onnx")
                        value = difference(tensors(small(images))[:1], outputs)
                    proof[step] = float(f"{value:.2g}") if np.isfinite(value) else None
                    if not value <= TOLERANCE:
                        problems.append(f"{step} at {width} widths: {value:.1e}")
                except Exception as error:
                    problems.append(f"{step} at {width} widths: {first_line(error)}")
    with row.step("engine"):
        try:
            row["engine_mib"] = round(_engine_mib(folder / "random.onnx"), 1)
        except Exception as error:
            problems.append(f"TensorRT-RTX: {first_line(error)}")
    with row.step("save"):
        small = thin(network, groups, chosen["random"]).eval()
        save(small, architecture(groups, chosen["random"]), images, folder)
    row["passed"], row["problems"] = not problems, problems
    return row


def torch_pruning(case: Case) -> Row:
    """Torch-Pruning as its examples use it: half of every layer's channels by magnitude, the classifier kept."""
    import torch_pruning as tp

    row = Row(prunes=False, runs=False, reloads=False)
    torch.manual_seed(0)
    network, images = case.build().eval(), torch.rand(1, 3, case.size, case.size)
    before = sum(p.numel() for p in network.parameters())
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    heads = [m for m in layers if (m.out_channels if isinstance(m, nn.Conv2d) else m.out_features) == CLASSES]
    attention = {m: m.num_heads for m in network.modules() if isinstance(m, nn.MultiheadAttention)}
    try:
        with row.step("prune"):
            pruner = tp.pruner.MagnitudePruner(
                network,
                images,
                importance=tp.importance.MagnitudeImportance(p=1),
                pruning_ratio=0.5,
                ignored_layers=heads,
                num_heads=attention,
            )
            pruner.step()
            row["prunes"] = sum(p.numel() for p in network.parameters()) < 0.95 * before
        with row.step("forward"), torch.no_grad():
            outputs = tensors(network(images))[0]
            row["runs"] = outputs.shape[1] == CLASSES
        with row.step("reload"), tempfile.TemporaryDirectory() as name:
            path = Path(name, "state.pth")
            tp.save(tp.state_dict(network), path)
            again = tp.load_state_dict(case.build().eval(), tp.load(path, weights_only=False))
            with torch.no_grad():
                row["reloads"] = bool(torch.equal(tensors(again(images))[0], outputs))
    except Exception as error:
        row["problem"] = first_line(error)
    row["params_left"] = round(sum(p.numel() for p in network.parameters()) / before, 3)
    return row


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)  # outputs are identical only with the same threads
    what, name, folder = arguments
    case = next(c for c in cases() if c.name == name)
    row = (
        torch_pruning(case)
        if what == "torch-pruning"
        else {"passdeploy": passdeploy, "reload": reload}[what](case, Path(folder))
    )
    row["done"] = True
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
