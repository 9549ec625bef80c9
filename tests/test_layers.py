"""What runtimes say of single layers, summed up by module."""

from __future__ import annotations

import pytest

from passdeploy.layers import FEWEST_BLOCKS, MOST_ROWS, OTHER, by_block, module_of


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        ("network.layer1.0.conv1/Conv", "layer1.0.conv1"),
        ("network.layer1.0.relu/Relu_1", "layer1.0.relu"),
        ("network.conv1/Conv + network.relu/Relu", "conv1"),  # TensorRT
        ("PWN(PWN(network.features.0.2/Sigmoid), network.features.0.2/Mul)", "features.0.2"),
        ("stage/Mul", "stage"),
        ("ReorderOutput", None),
        ("Reformatting CopyNode for Input Tensor 0 to network.fc/Gemm", "fc"),
        ("/opt/lib", None),
    ],
)
def test_layers_go_by_the_module_in_their_name(layer: str, module: str | None) -> None:
    assert module_of(layer) == module


def residual(blocks: int) -> dict[str, float]:
    times = {"network.conv1/Conv": 1.0}
    for block in range(blocks):
        times |= {f"network.layer.{block}.conv{i}/Conv": 1.0 for i in (1, 2)}
    return times | {"network.fc/Gemm": 0.5, "ReorderOutput": 0.25}


def test_layers_of_a_block_are_summed_up_side_by_side() -> None:
    thin = residual(3)
    del thin["network.layer.1.conv1/Conv"], thin["network.layer.1.conv2/Conv"], thin["network.layer.2.conv1/Conv"]
    rows = by_block([residual(3), thin])
    assert [(row.name, row.ms) for row in rows] == [
        ("conv1", (1.0, 1.0)),
        ("layer.0", (2.0, 2.0)),
        ("layer.1", (2.0, 0.0)),
        ("layer.2", (2.0, 1.0)),
        ("fc", (0.5, 0.5)),
        (OTHER, (0.25, 0.25)),
    ]


def test_a_network_that_is_one_sequence_is_shown_layer_by_layer() -> None:
    engine = {f"network.features.{i}/Conv": 1.0 for i in range(13)} | {"network.classifier.0/Gemm": 1.0}
    rows = by_block([engine])
    assert len({"features", "classifier"}) < FEWEST_BLOCKS
    assert [row.name for row in rows] == [f"features.{i}" for i in range(13)] + ["classifier.0"]


def test_very_many_blocks_are_summed_up_further() -> None:
    engine = {f"network.stage{s}.{b}.conv.{i}/Conv": 1.0 for s in range(4) for b in range(12) for i in range(2)}
    rows = by_block([engine])
    assert len(rows) <= MOST_ROWS
    assert [row.name for row in rows] == [f"stage{s}" for s in range(4)]
    assert sum(row.ms[0] for row in rows) == sum(engine.values())


def test_nothing_is_told_of_nothing() -> None:
    assert by_block([{}, {}]) == []
