"""ONNX files: exported from a model, cut for many structures out of one dense export, and executed as a reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from passdeploy.engines.base import INPUT, OUTPUT
from passdeploy.errors import BadInput
from passdeploy.groups.check import first_line
from passdeploy.onnx_export import export_model
from passdeploy.onnx_slicer import OnnxSlicer

__all__ = ["INPUT", "OUTPUT", "OnnxSlicer", "export_model", "export_onnx", "export_program", "onnx_function"]


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


def export_program(model: nn.Module, images: np.ndarray) -> torch.export.ExportedProgram:
    """A model as a `torch.export` program, in eval mode, for backends that start from it.

    Args:
        model: On the CPU.
        images: (batch, 3, H, W); the batch is fixed.

    Raises:
        BadInput: The model can't be exported.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model.eval(), (torch.from_numpy(np.ascontiguousarray(images)),))
    except Exception as error:
        raise BadInput(f"the model cannot be exported by torch.export ({first_line(error)}); see --debug") from error


def onnx_function(data: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """Images -> outputs of an ONNX file's bytes in ONNX Runtime on one CPU thread, operator by operator.

    Without graph optimisations, so that an engine is compared with the file and not with itself.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        outputs: np.ndarray = session.run(None, {INPUT: images})[0]
        return outputs

    return run
