"""BatchNorm over two processes is BatchNorm of the whole batch in one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import processes_batchnorm
import processes_child
import pytest
import torch
from torch import Tensor, nn

from ddpm_fast.training.parallel import parallel
from ddpm_fast.training.processes import World
from ddpm_fast.training.sync_batchnorm import SyncBatchNorm2d, convert, revert

KINDS = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes_child.together(tmp_path_factory)


@pytest.fixture(scope="module")
def both(pair: Path) -> dict[str, Any]:
    """The cases as two processes computed them, put together."""
    first, second = processes_child.results(pair, "batchnorm")
    whole = {}
    for case in first:
        whole[case] = {}
        for name, value in first[case].items():
            other = second[case][name]
            if name[:1] == "y" or name[:2] == "dx":
                whole[case][name] = torch.cat([value, other])
            elif name[:1] == "d":
                whole[case][name] = value + other
            else:
                assert torch.equal(value, other), f"{case}: {name} differs between the processes"
                whole[case][name] = value
    return whole


def distance(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference, relative to the largest value."""
    assert got.keys() == exact.keys()
    scale = {name: max(float(value.double().abs().max()), 1e-30) for name, value in exact.items()}
    return {name: float((got[name].double() - exact[name]).abs().max()) / scale[name] for name in exact}


@pytest.mark.parametrize("case", processes_batchnorm.BATCHNORMS)
def test_two_processes_are_one(both: dict[str, Any], case: str) -> None:
    one = processes_batchnorm.batchnorm_case(World(), case, torch.float64)
    assert all(far < 1e-12 for far in distance(both[f"{case}, {torch.float64}"], one).values())


@pytest.mark.parametrize("dtype", KINDS[1:], ids=str)
@pytest.mark.parametrize("case", processes_batchnorm.BATCHNORMS)
def test_no_further_from_float64_than_one_process(both: dict[str, Any], case: str, dtype: torch.dtype) -> None:
    """In float64 the inputs are what they are rounded to in the dtype, so that only the layer's own error is seen.

    Two processes round their own means before they are merged: half a unit of the mean (1/8: it is spread over
    deviations of 2 and more, and distances are relative to outputs of 2 and more) is luck, either way.
    """
    exact = processes_batchnorm.batchnorm_case(World(), case, dtype, exact=True)
    ours = distance(both[f"{case}, {dtype}"], exact)
    torchs = distance(processes_batchnorm.batchnorm_case(World(), case, dtype), exact)
    unit = torch.finfo(dtype).eps * max(1, processes_batchnorm.BATCHNORMS[case][2] / 8)
    for name, far in ours.items():
        assert far <= 1.5 * torchs[name] + unit, f"{name}: {far:.2e} from float64, in one process {torchs[name]:.2e}"


def test_one_all_reduce_forward_and_one_backward(pair: Path) -> None:
    """And its parameters keep their names, and in eval mode it needs nobody."""
    for found in processes_child.results(pair, "batchnorm_calls"):
        assert found == {
            "converted": 3, "keys": True, "forward": 3, "both": 3, "alone": True, "reverted": True,
        }  # fmt: skip


def test_not_under_torch_compile() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="compile=True does not go with sync_batchnorm=True"):
        parallel(network, World(0, 2), compile=True, sync_batchnorm=True)
    assert type(network[1]) is nn.BatchNorm1d


def test_converted_layers_are_the_same_objects() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.SyncBatchNorm(4))
    before, parameters = list(network), list(network.parameters())
    assert convert(network, World(0, 2)) == 1
    assert [type(part) for part in network] == [nn.Conv2d, SyncBatchNorm2d, nn.GroupNorm, nn.SyncBatchNorm]
    assert all(part is was for part, was in zip(network, before, strict=True))
    assert all(parameter is was for parameter, was in zip(network.parameters(), parameters, strict=True))
    assert isinstance(network[1], nn.BatchNorm2d)  # what folds or counts such layers goes on working
    assert convert(network, World(1, 2)) == 1  # again: another world
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert twin[1].world == World(1, 2)
    revert(network)
    assert type(network[1]) is nn.BatchNorm2d
    assert not hasattr(network[1], "world")


def test_bad_input() -> None:
    class Own(nn.BatchNorm2d):
        pass

    network = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(Own(4)))
    with pytest.raises(ValueError, match=r"only torch's BatchNorm1d, 2d and 3d can be synchronised; 1\.0 is a Own"):
        convert(network, World(0, 2))
    assert type(network[0]) is nn.BatchNorm2d  # nothing was changed
    layer = nn.BatchNorm2d(4)
    convert(layer, World(0, 2))
    with pytest.raises(ValueError, match="4D input"):
        layer(torch.zeros(2, 4))
