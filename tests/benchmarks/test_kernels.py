"""benchmarks/kernels.py: what is timed is what its rows say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels
from passdeploy.errors import PassdeployError


def test_what_stands_in_for_the_kernels_is_not_timed_in_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and a driver, but nothing to compile with: the operators run the reference there, and only warn."""

    class NoCompiler:
        def __init__(self, device: int) -> None:
            assert device == 1

        def prepare(self) -> None:
            raise PassdeployError("NVRTC can't be loaded")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(kernels.driver, "unavailable", lambda: None)
    monkeypatch.setattr(kernels.driver, "CudaBindings", NoCompiler)
    assert kernels.missing() == "NVRTC can't be loaded"
    monkeypatch.setattr(NoCompiler, "prepare", lambda self: None)
    assert kernels.missing() is None
