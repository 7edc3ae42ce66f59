"""Compiled kernels executed and compared with the reference: one of each sort. Run by test_ptx.py in a process of its
own; `python -m gpu_check.compiled_code` has the rest."""

from __future__ import annotations

import re

import pytest
from gpu_check import compiled_code, compiled_layers, compiled_ops

OPS = [
    case
    for case in compiled_ops.cases((compiled_ops.BF16,))
    if re.search("bfloat16 channels_last|every option|one|bytes|many images|outside", case.name)
]
CONVOLUTIONS = ("temb", "pooled", "residual", "up")


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_op_equals_the_reference(case):
    for capability in (90, 80) if "every option" in case.name else (90,):
        (row,) = compiled_code.op_row(case, capability)
        assert row["wrong"] is None
        assert row["approximate"] == []


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        pytest.param(case, capability, id=f"{case.name}-{capability}")
        for capability in (90, 80)
        for case in compiled_layers.FEW
        if capability == 90 or case.kind in CONVOLUTIONS
    ],
)
def test_layer_equals_float64(case, capability):
    (row,) = compiled_code.layer_rows(case, capability, 1, overlap=False)
    assert row["wrong"] is None
