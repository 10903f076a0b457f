"""Our own classifiers against their papers, and what all classifiers have in common."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.resnet20 import ResNet20
from models.vision import OWN_CLASSIFIERS, build_classifier, classifier_names, takes_channels, why_refused
from models.vit import ViT, default_patch_size
from optim.groups import parts_of
from pipelines.config import CLASSIFIER_SIZES, ClassifierSettings


def built(name: str, classes: int = 10, channels: int = 3, resolution: int = 32, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(name, classes, channels, resolution, sizes).double()


@pytest.mark.parametrize("name", OWN_CLASSIFIERS)
@pytest.mark.parametrize(("channels", "resolution"), [(1, 28), (3, 32)])
def test_images_become_logits(name: str, channels: int, resolution: int) -> None:
    model = built(name, 7, channels, resolution)
    images = torch.randn(2, channels, resolution, resolution, dtype=torch.float64)
    assert model(images).shape == (2, 7)
    assert why_refused(name, 7, 2, resolution, channels) is None
    assert takes_channels(name, channels) == channels


@pytest.mark.parametrize("name", OWN_CLASSIFIERS)
@pytest.mark.parametrize("classes", [2, 10, 512])
def test_the_head_is_found_and_the_hidden_layers_are_matrices(name: str, classes: int) -> None:
    model = built(name, classes)
    parts = parts_of(model)
    assert {key for key, part in parts.items() if part == "head"} == {
        key for key, _ in model.named_parameters() if key.startswith("head.")
    }
    matrices = {key for key, part in parts.items() if part == "matrices"}
    assert matrices == {
        f"{key}.weight"
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and key != "head"
    }


@pytest.mark.parametrize(
    ("name", "channels", "resolution", "parameters"),
    [
        ("mlp", 1, 28, 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
        ("resnet9", 3, 32, 6_573_120),
        ("resnet20", 3, 32, 269_722),  # 0.27 million in table 6 of He et al.
        # ViT-Ti/16 of DeiT has 5,717,416, of them 384 for the class token and 193,000 for 1,000 classes.
        ("vit_tiny", 3, 224, 5_717_416 - 384 - 193_000 + 1_930),
    ],
)
def test_sizes_are_those_of_the_papers(name: str, channels: int, resolution: int, parameters: int) -> None:
    with torch.device("meta"):
        model = build_classifier(name, 10, channels, resolution)
    assert sum(param.numel() for param in model.parameters()) == parameters


def reference_resnet20(model: ResNet20, x: Tensor) -> Tensor:
    """The forward pass by the formulas of section 4.2, with batch statistics."""
    w = {name: param.detach() for name, param in model.named_parameters()}

    def layer(x: Tensor, convolution: str, norm: str, stride: int = 1) -> Tensor:
        x = functional.conv2d(x, w[f"{convolution}.weight"], stride=stride, padding=1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        gain, bias = (w[f"{norm}.{key}"][:, None, None] for key in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x = layer(x, "stem", "norm").relu()
    for block in range(9):
        stride = 2 if block in (3, 6) else 1
        inner = layer(x, f"blocks.{block}.conv1", f"blocks.{block}.norm1", stride).relu()
        inner = layer(inner, f"blocks.{block}.conv2", f"blocks.{block}.norm2")
        shortcut = torch.zeros_like(inner)
        shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
        x = (inner + shortcut).relu()
    return x.mean((2, 3)) @ w["head.weight"].T + w["head.bias"]


def test_resnet20_is_the_paper_s() -> None:
    model = built("resnet20")
    assert isinstance(model, ResNet20)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(images), reference_resnet20(model, images))


def test_a_vision_transformer_sees_patches_and_not_their_order_without_positions() -> None:
    model = built("vit_tiny", resolution=8, patch_size=4, d_model=12, n_layers=2, n_heads=3).eval()
    assert isinstance(model, ViT)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    swapped = images.roll(4, dims=3)  # the left patches and the right ones
    assert not torch.allclose(model(images), model(swapped))
    with torch.no_grad():
        model.position_embedding.weight.zero_()
    torch.testing.assert_close(model(images), model(swapped))


@pytest.mark.parametrize(
    ("resolution", "patch"), [(16, 2), (28, 4), (32, 4), (64, 8), (96, 12), (224, 16), (384, 16), (29, 1), (4, 1)]
)
def test_the_default_patch_divides_the_resolution(resolution: int, patch: int) -> None:
    assert default_patch_size(resolution) == patch


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"patch_size": 5}, "patch_size=5 does not divide the resolution, 32"), ({"n_heads": 5}, "n_heads=5 does not")],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        built("vit_tiny", **sizes)


def test_images_that_a_model_cannot_take_are_told() -> None:
    assert "too small" in str(why_refused("resnet9", 10, 2, 4))
    assert why_refused("resnet18", 10, 1, 32) is not None
    with pytest.raises(ValueError, match="images of"):
        built("mlp")(torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'resnet20'"):
        build_classifier("resnet-20", 10)
    assert len({*classifier_names()}) == len(classifier_names())


def test_the_settings_of_sizes_are_the_keywords_of_the_constructors() -> None:
    for name, model in OWN_CLASSIFIERS.items():
        keywords = [
            key
            for key, each in inspect.signature(model).parameters.items()
            if each.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        assert keywords == [*CLASSIFIER_SIZES.get(name, ())]
        assert {*keywords} <= {*ClassifierSettings.model_fields}
