"""Imports what the networks of `benchmarks/coverage.py` need, once, in the process that forks theirs.

A network of one layer is exported, because torch's exporter imports most of itself when it is first used.
"""

from __future__ import annotations

import gc

import coverage_model  # noqa: F401
import torch
from coverage_models import cases

from passdeploy.export import export_model
from passdeploy.groups import find_groups

cases()
import timm  # noqa: E402, F401  (after torchvision has been made to import)
import torch_pruning  # noqa: E402, F401

torch.set_num_threads(1)  # the threads of a pool do not survive a fork
_layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
find_groups(_layer, torch.zeros(1, 3, 8, 8))
export_model(_layer, (3, 8, 8))
gc.collect()
gc.freeze()
