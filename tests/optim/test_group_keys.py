"""Keys of parameter groups: others' are kept, as in `torch.optim`, and misspelled keywords of ours refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import lr_scheduler

from optim import ShardedOptimizer

from .cases import Description, every_optimizer, matrix_optimizers, parameter, start
from .steps import assert_identical, make_params, run

# Of Lightning, timm, detectron2, mmengine, Megatron, DeepSpeed, fairseq, SAM, gsplat, and PyTorch's own schedulers.
OTHERS = [
    "name", "names", "group_name", "lr_scale", "lr_mult", "lrs", "lr_max", "rho", "adaptive", "max_lr", "min_lr",
    "base_lr", "swa_lr", "initial_lr", "layer_decay", "fsdp_group", "weight_decay_mult", "decay_mult", "wd_mult",
    "min_weight_decay", "initial_weight_decay", "is_expert", "is_expert_parallel", "moe", "use_muon", "algorithm",
    "max_momentum", "base_momentum", "momentum_mult", "beta1", "fused", "foreach", "amsgrad", "decoupled_weight_decay",
    "schedule_type", "warmup_steps", "module_name", "layer_id", "step", "scale", "eps2",
]  # fmt: skip
MISSPELLED = {
    "weigth_decay": "weight_decay", "weight_decey": "weight_decay", "weight-decay": "weight_decay",
    "weightdecay": "weight_decay", "Weight_Decay": "weight_decay", "LR": "lr", "maximise": "maximize",
    "capturabel": "capturable",
}  # fmt: skip
MISSPELLED_OF_MATRICES = {
    "momentun": "momentum", "Momentum": "momentum", "rules": "rule", "row_block": "row_blocks",
    "rowblocks": "row_blocks", "bettas": "betas",
}  # fmt: skip


def groups_with(extra: dict[str, Any]) -> list[dict[str, Any]]:
    params = make_params()
    return [{"params": params[:2], **extra}, {"params": params[2:], "lr": 0.01, **extra}]


def others(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key in OTHERS}


@every_optimizer
def test_a_key_of_others_is_taken_and_kept(case: Description) -> None:
    for key in OTHERS:
        optimizer = case.build(groups_with({key: "value"}))
        assert all(group[key] == "value" for group in optimizer.param_groups)


@every_optimizer
def test_keys_of_others_change_nothing_and_survive(case: Description) -> None:
    extra = {"name": "backbone", "lr_scale": 0.75, "is_expert": False}
    plain, optimizer = case.build(groups_with({})), case.build(groups_with(extra))
    for each in (plain, optimizer):
        run(each, range(2))
    assert_identical(plain, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    optimizer.add_param_group({"params": [parameter(start((3, 4)))], "name": "head"})
    expected = [extra, extra, {"name": "head"}]
    assert [others(group) for group in plain.param_groups] == expected[:2]
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert [others(group) for group in each.param_groups] == expected
        each.step()


@every_optimizer
def test_the_keys_that_one_cycle_writes_survive_a_new_group_and_a_state_dict(case: Description) -> None:
    optimizer, resumed = case.build(groups_with({})), case.build(groups_with({}))
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    written = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
    assert written <= set(optimizer.param_groups[0])
    resumed.load_state_dict(optimizer.state_dict())
    assert written <= set(resumed.param_groups[0])
    rebuilt = case.build(resumed.param_groups)  # as SAM and other wrappers make a base optimizer
    assert written <= set(rebuilt.param_groups[0])


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@every_optimizer
def test_keys_of_others_pass_through_a_sharded_optimizer(case: Description) -> None:
    params = [(f"layer.{index}", param) for index, param in enumerate(make_params())]
    extra = {"name": "backbone", "lr_scale": 0.75}
    sharded = ShardedOptimizer(case.build([{"params": params, **extra}]))
    lr_scheduler.OneCycleLR(sharded, max_lr=0.1, total_steps=10)
    run(sharded, range(2))
    assert extra.items() <= sharded.param_groups[0].items()
    assert "max_lr" in sharded.param_groups[0]


@pytest.mark.parametrize(("key", "meant"), MISSPELLED.items())
@every_optimizer
def test_a_misspelled_keyword_is_refused_with_the_right_one(case: Description, key: str, meant: str) -> None:
    optimizer = case.build(make_params())
    with pytest.raises(ValueError, match=rf"'{key}'.*'{meant}'"):
        optimizer.add_param_group({"params": [parameter(start((3, 4)))], key: 0.1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("key", "meant"), MISSPELLED_OF_MATRICES.items())
@matrix_optimizers
def test_a_misspelled_keyword_of_the_matrix_rule_is_refused(case: Description, key: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"'{key}'.*'{meant}'"):
        case.build([{"params": make_params(), key: 0.1}])
