"""Triton's `config.pbtxt`: written as text, checked with Triton's own protobuf where tritonclient is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from passdeploy.errors import BadInput


@dataclass(frozen=True)
class TritonConfig:
    """What a config.pbtxt says.

    Attributes:
        name: The model's.
        engine: ``backend: "python"``, ``platform: "onnxruntime_onnx"`` or ``platform: "tensorrt_plan"``.
        max_batch: 0: the model's shapes hold the batch already.
        input_name: Float32.
        input_dims: Without the batch when `max_batch` > 0.
        output_name: Float32.
        output_dims: Likewise.
        gpu: Where instances run.
        instances: How many.
        preferred_batch: Batch that the engine was compiled for.
        queue_delay_us: How long a request may wait for others.
        warmup: Name of a file under ``warmup/`` with one raw input.
        labels: Name of the file with one class name a line.
        plans: Compute capability -> plan file.
        cuda_graphs: TensorRT's.
        parameters: Of the backend.
    """

    name: str
    engine: str
    max_batch: int
    input_name: str
    input_dims: Sequence[int]
    output_name: str
    output_dims: Sequence[int]
    gpu: bool
    instances: int = 1
    preferred_batch: int = 1
    queue_delay_us: int = 0
    warmup: str | None = "images"
    labels: str | None = "labels.txt"
    plans: Mapping[str, str] = field(default_factory=dict)
    cuda_graphs: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)


def quote(text: str) -> str:
    """A protobuf text string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _dims(dims: Sequence[int]) -> str:
    return "[ " + ", ".join(map(str, dims)) + " ]"


def render(config: TritonConfig) -> str:
    """The text of config.pbtxt."""
    label = f"\n    label_filename: {quote(config.labels)}" if config.labels else ""
    parts = [
        f"name: {quote(config.name)}",
        config.engine,
        f"max_batch_size: {config.max_batch}",
        f"""input [
  {{
    name: {quote(config.input_name)}
    data_type: TYPE_FP32
    dims: {_dims(config.input_dims)}
  }}
]""",
        f"""output [
  {{
    name: {quote(config.output_name)}
    data_type: TYPE_FP32
    dims: {_dims(config.output_dims)}{label}
  }}
]""",
        f"""instance_group [
  {{
    count: {config.instances}
    kind: {"KIND_GPU" if config.gpu else "KIND_CPU"}
  }}
]""",
        "version_policy { latest { num_versions: 1 } }",
    ]
    if config.max_batch > 1:
        preferred = f"  preferred_batch_size: [ {config.preferred_batch} ]\n" if config.preferred_batch > 1 else ""
        parts.append(f"dynamic_batching {{\n{preferred}  max_queue_delay_microseconds: {config.queue_delay_us}\n}}")
    if config.cuda_graphs:
        parts.append("optimization { cuda { graphs: true } }")
    parts += [
        f"cc_model_filenames [ {{ key: {quote(capability)} value: {quote(file)} }} ]"
        for capability, file in sorted(config.plans.items())
    ]
    if config.warmup:
        parts.append(f"""model_warmup [
  {{
    name: "sample"
    batch_size: 1
    inputs {{
      key: {quote(config.input_name)}
      value {{
        data_type: TYPE_FP32
        dims: {_dims(config.input_dims)}
        input_data_file: {quote(config.warmup)}
      }}
    }}
  }}
]""")
    parts += [
        f"parameters [ {{ key: {quote(key)} value {{ string_value: {quote(value)} }} }} ]"
        for key, value in sorted(config.parameters.items())
    ]
    return "\n".join(parts) + "\n"


def parse(text: str) -> Any:
    """The text as Triton's own message; None where tritonclient[grpc] is not installed.

    Raises:
        BadInput: Triton would refuse it.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        return None
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise BadInput(f"config.pbtxt: Triton would refuse it ({error})") from None
