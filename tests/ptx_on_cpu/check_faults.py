"""Faults planted in the PTX of real kernels are found. Run by test_ptx.py in a process of its own."""

from __future__ import annotations

import dataclasses
import re

import pytest
from gpu_check import compiled_layers, compiled_ops
from gpu_check.ptx import Fault, launches

from ddpm_fast.backends import reference, triton

OPS = {case.name: case for case in compiled_ops.cases()}
LAYERS = {case.name: case for case in compiled_layers.FEW}


def edited(pattern, replacement, count=0):
    """Changes PTX, and notes that there was something to change."""
    hits = []

    def edit(ptx):
        changed, n = re.subn(pattern, replacement, ptx, count=count, flags=re.M)
        hits.append(n)
        return changed

    return edit, hits


def run_op(name, edit, capability=90):
    """What is wrong with an op whose PTX was edited, and what was launched."""
    case = OPS[name]
    with launches(capability, edit) as done:
        got = case.call(triton)
    return case.difference(got, case.call(reference)), done


def run_layer(name, edit, capability=90, which=0):
    case = LAYERS[name]
    with launches(capability, edit) as done:
        _, wrong = case.error(case.candidates(capability)[which])
    return wrong, done


def drop(pattern):
    return edited(rf"^\s*{pattern}.*$", "")


def test_nothing_is_wrong_before():
    assert run_op("normal float32", lambda ptx: ptx)[0] is None
    assert run_layer("down2.conv2, pooled", lambda ptx: ptx)[0] is None


def test_a_fused_multiply_add():
    """The first product and the sum that uses it become one fma; of most kernels about one bit in a hundred changes."""
    fused = []

    def edit(ptx):
        for product in re.finditer(r"mul\.rn\.f32 \t?(%r\d+), (%r\d+), (%r\d+|0f\w+);", ptx):
            use = re.compile(rf"add\.rn\.f32 \t?(%r\d+), {product[1]}, (%r\d+|0f\w+);")
            ptx, n = use.subn(rf"fma.rn.f32 \1, {product[2]}, {product[3]}, \2;", ptx)
            fused.append(n)
        return ptx

    wrong, _ = run_op("normal of many images", edit)
    assert sum(fused) > 0
    assert wrong is not None


def test_an_approximate_root():
    edit, hits = edited(r"sqrt\.rn\.f32", "sqrt.approx.f32")
    _, done = run_op("normal float32", edit)
    assert sum(hits) > 0
    assert set(done[0].approximate) == {"sqrt.approx.f32"}


@pytest.mark.parametrize("name", ["group_norm_silu float32", "noise_mse float32"])
def test_a_missing_barrier(name):
    edit, hits = drop(r"bar\.sync")
    with pytest.raises(Fault, match=r"race: (reads|writes) shared memory|nobody wrote"):
        run_op(name, edit)
    assert sum(hits) > 0


def test_an_offset_beyond_an_array():
    edit, hits = edited(r"(st\.global\.\S+ \[ %rd\d+) \+ 0 \]", r"\1 + 65536 ]", 1)
    with pytest.raises(
        Fault, match=r"_normal_kernel: thread \d+ of block .* of out_ptr .*, which has 4320.*: @%p\d+ st\.global"
    ):
        run_op("normal float32", edit)
    assert sum(hits) > 0


def test_a_lost_mask():
    edit, hits = edited(r"@%p\d+ (st\.global)", r"\1")
    with pytest.raises(Fault, match="of out_ptr"):
        run_op("normal float32", edit)
    assert sum(hits) > 0


def test_a_store_beside_a_slice_of_a_buffer():
    edit, hits = edited(r"(st\.global\.v4\.b32 \[ %rd\d+) \+ 0 \]", r"\1 + 256 ]")
    with pytest.raises(Fault, match=r"between the elements of target_ptr|, which has"):
        run_layer("down2.conv1", edit)
    assert sum(hits) > 0


@pytest.mark.parametrize("capability", [80, 90])
def test_a_missing_wait_for_copies(capability):
    edit, hits = drop(r"cp\.async\.wait_group")
    with pytest.raises(Fault, match=r"that a cp\.async is still writing|nobody wrote"):
        run_layer("down2.conv1", edit, capability)
    assert sum(hits) > 0


def test_a_wait_for_too_few_copies():
    edit, hits = edited(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;")
    with pytest.raises(Fault, match=r"that a cp\.async is still writing"):
        run_layer("down2.conv1", edit)
    assert sum(hits) > 0


def test_a_copy_into_a_buffer_that_is_still_read():
    """The barrier at the end of a pass of the pipeline, before the next copies."""
    edit, hits = edited(r"^\s*bar\.sync \t?0;(?=(?:(?!bar\.sync)[\s\S])*?cp\.async\.cg)", "")
    with pytest.raises(Fault, match="race"):
        run_layer("down2.conv1", edit, 80)
    assert sum(hits) > 0


def test_a_missing_wait_for_products():
    edit, hits = drop(r"wgmma\.wait_group")
    with pytest.raises(Fault, match="wgmma that nobody waits for"):
        run_layer("down2.conv1", edit)
    assert sum(hits) > 0


def test_a_missing_proxy_fence():
    edit, hits = drop(r"fence\.proxy\.async")
    with pytest.raises(Fault, match=r"no fence\.proxy\.async"):
        run_layer("down1.conv1, of the image", edit)
    assert sum(hits) > 0


@pytest.mark.parametrize(
    ("capability", "pattern", "replacement"),
    [
        (80, r"(ldmatrix\.sync\S+ \{[^}]*\}, \[%r\d+)\+2048\]", r"\1+4096]"),
        (90, r"or\.b64( \t?%rd\d+, %rd\d+), (46116862933052948)48;", r"add.s64\1, \g<2>56;"),
    ],
)
def test_a_wrong_operand_of_a_product(capability, pattern, replacement):
    """ldmatrix from another row; a descriptor of wgmma that begins 128 bytes on."""
    edit, hits = edited(pattern, replacement, 1)
    wrong, _ = run_layer("down2.conv1", edit, capability)
    assert sum(hits) > 0
    assert wrong is not None


@pytest.mark.parametrize("which", ["before", "after"])
def test_a_missing_barrier_about_the_count_of_a_joined_sum(which):
    """Before it, a thread may not have stored its part; after it, one may read before the count is taken."""

    def edit(ptx):
        at = ptx.index("atom.global")
        start = ptx.rindex("bar.sync", 0, at) if which == "before" else ptx.index("bar.sync", at)
        return ptx[:start] + ptx[ptx.index(";", start) + 1 :]

    case = LAYERS["down4.conv1 of one image, split"]
    chosen = next(c for c in case.candidates(90) if c.tile.splits > 1)
    chosen = dataclasses.replace(chosen, tile=dataclasses.replace(chosen.tile, joined=True))
    with launches(90) as done:
        assert case.error(chosen)[1] is None
    assert not done[0].hazards
    with launches(90, edit) as done:
        if which == "after":
            with pytest.raises(Fault, match=r"race: reads shared memory|nobody wrote"):
                case.error(chosen)
            return
        case.error(chosen)
    assert any("partial_ptr" in hazard for hazard in done[0].hazards)


def test_an_access_before_the_kernel_before_has_ended(monkeypatch):
    monkeypatch.setattr("ddpm_fast.backends.triton.launch.OVERLAP", True)
    assert run_layer("down2.conv1", lambda ptx: ptx)[0] is None
    edit, hits = edited(r"griddepcontrol\.wait;", "")
    with pytest.raises(Fault, match=r"before griddepcontrol\.wait"):
        run_layer("down2.conv1", edit)
    assert sum(hits) > 0


def test_one_wrong_element_is_seen():
    """A sign of one thread's third number."""
    edit, hits = edited(r"(@%p\d+ st\.global\.v4\.b32 [^{]*\{ %r\d+, %r\d+, )(%r\d+)", r"neg.f32 \2, \2;\n\1\2", 1)
    wrong, _ = run_op("normal float32", edit)
    assert sum(hits) > 0
    assert wrong is not None
