"""The models whose parameters optimizers are timed on."""

from __future__ import annotations

import sys

import pytest

from asgo_cli import bench
from optim.groups import matrix_groups
from pipelines.benchmarks import shapes
from pipelines.benchmarks.shapes import Matrices, build_model, shape_counts
from pipelines.errors import UsageError


def test_the_names_in_the_help_are_those_of_the_models() -> None:
    assert bench.MODEL_NAMES == shapes.MODEL_NAMES


def test_the_layer_of_gpt2_is_six_matrices_that_all_take_the_matrix_rule() -> None:
    model = build_model("gpt2-layer")
    assert shape_counts(model) == [((768, 768), 4), ((3072, 768), 1), ((768, 3072), 1)]
    assert sum(param.numel() for param in model.parameters()) == 7_077_888
    (group,) = matrix_groups(model)
    assert len(group["params"]) == 6
    assert group.get("rule") != "adam"


def test_a_preset_has_the_parameters_of_its_decoder() -> None:
    counts = dict(shape_counts(build_model("nanogpt")))
    assert counts == {
        (66, 384): 1, (256, 384): 1, (384,): 56, (1536,): 6, (384, 384): 24, (1536, 384): 6, (384, 1536): 6,
    }  # fmt: skip
    tiny = dict(shape_counts(build_model("tiny")))
    assert (tiny[257, 128], tiny[128, 128], tiny[128,]) == (1, 17, 4 * 9 + 2)  # the positions are 128 × 128, too


def test_a_classifier_goes_by_torchvisions_name() -> None:
    pytest.importorskip("torchvision")
    assert (64, 3, 7, 7) in dict(shape_counts(build_model("resnet18")))


def test_an_unknown_model_gets_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(UsageError, match="unknown model 'gpt2layer'; did you mean 'gpt2-layer'"):
        build_model("gpt2layer")
    with pytest.raises(UsageError, match=r"unknown model 'xyzzy'; use a classifier of torchvision.* one of gpt2-layer"):
        build_model("xyzzy")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UsageError, match=r"resnet18: .*need torchvision, which is not installed"):
        build_model("resnet18")


def test_bare_matrices_differ_from_one_another() -> None:
    first, second = Matrices({"a": (3, 4), "b": (3, 4)}).parameters()
    assert not first.equal(second)
