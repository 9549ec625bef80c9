"""What a CUDA error means: no GPU to use, or something that was too much for it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from passdeploy.engines._cuda import check
from passdeploy.errors import BadInput, PassdeployError, Unavailable


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("cudaErrorNoDevice", Unavailable, "nvidia-smi"),
        ("cudaErrorInsufficientDriver", Unavailable, "nvidia-smi"),
        ("cudaErrorMemoryAllocation", BadInput, "smaller --batch"),
        ("cudaErrorLaunchFailure", BadInput, "cudaErrorLaunchFailure"),
    ],
)
def test_only_what_keeps_every_engine_from_running_is_unavailable(
    name: str, kind: type[PassdeployError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cuda.bindings

    runtime = ModuleType("runtime")
    runtime.cudaGetErrorName = lambda status: (0, name.encode())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setattr(cuda.bindings, "runtime", runtime, raising=False)
    with pytest.raises(kind, match=said):
        check((1,))
    assert check((0, 5)) == 5
