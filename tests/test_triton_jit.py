"""Kernels through Triton's own launching machinery, short of the driver: compiled once, ahead where asked, and launched
on the current stream with the grid that was meant.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")


@pytest.fixture(scope="module")
def happened(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("jit_child.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_compiling_ahead_launches_nothing_and_leaves_nothing_to_compile(happened):
    ahead, after = happened["ahead"], happened["after"]
    assert ahead["compiled"] == ["_conv_kernel", "_conv_kernel"]
    assert ahead["launched"] == []
    assert ahead["launchers"] == ["_conv_kernel"]  # one for both, whose arguments are alike
    assert after["compiled"] == []
    assert [one["grid"] for one in after["launched"]] == [[8, 1, 1], [4, 1, 1]]


def test_launches_are_on_the_stream_that_is_current(happened):
    first, second = happened["stream 7 from 0"], happened["stream 8 from 0"]
    assert [one["stream"] for one in first["launched"]] == [7]
    assert [one["stream"] for one in second["launched"]] == [8]
    assert first["compiled"] == ["_normal_kernel"]
    assert second["compiled"] == []


def test_addresses_of_another_alignment_are_another_kernel(happened):
    unaligned = happened["stream 8 from 1"]
    assert unaligned["compiled"] == ["_normal_kernel"]
    assert len(unaligned["launched"]) == 1


def test_a_kernel_that_needs_more_than_the_device_has(happened):
    assert "Triton cannot run _conv_kernel: out of resource: shared memory" in happened["error"]


@pytest.mark.parametrize("name", ["epilogue", "pooled epilogue"])
def test_what_follows_a_convolution_is_a_pass_of_wide_accesses(happened, name):
    found = happened[name]
    assert found["spills"] == 0
    assert found["registers"] <= 64  # half of a processor's threads fit at least
    assert found["memory"]["LDG.E.128"] >= 2
    assert found["memory"]["STG.E.128"] == 2
    assert not {word for word in found["memory"] if word.endswith((".U16", ".U8", "LDG.E", "STG.E"))}
