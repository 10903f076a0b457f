"""The heads of a model, its experts and its hidden weights of unusual names: what takes Adam, and what is a matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations

from optim import build_optimizer
from optim.heads import output_heads


def rules(model: nn.Module, **settings: Any) -> dict[str, str]:
    """The rule of each parameter, by its name without those of wrappers."""
    optimizer = build_optimizer(model, "muon", 10, **settings)
    return {name: group["rule"] for group in optimizer.param_groups for name in group["param_names"]}


def matrices(model: nn.Module, **settings: Any) -> set[str]:
    return {name for name, rule in rules(model, **settings).items() if rule == "matrix"}


def head_names(model: nn.Module) -> set[str]:
    heads = output_heads(model)
    return {name for name, module in model.named_modules() if any(module is head for head in heads)}


class Parts(nn.Module):
    """A module with the given children, in their order."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Residual(Parts):
    """A hidden layer whose last weight gives the width of the model."""

    def __init__(self, width: int) -> None:
        super().__init__(norm=nn.LayerNorm(width), up=nn.Linear(width, 4 * width), down=nn.Linear(4 * width, width))


def pooler(width: int) -> nn.Module:
    return Parts(dense=nn.Linear(width, width), activation=nn.Tanh())


def encoder(width: int = 32) -> nn.Module:
    return Parts(tokens=nn.Embedding(100, width), layers=nn.ModuleList([Residual(width)]), pooler=pooler(width))


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, outputs))


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))


def fully_convolutional(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 21, 1))


class Task(Parts):
    """As a task model of Hugging Face, whose base class has the method for language models."""

    def get_output_embeddings(self) -> None:
        return None


class Timm(Parts):
    """As a model of timm, whose head is not its last layer."""

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "a task model without output embeddings": (
        lambda: Task(encoder=encoder(), dropout=nn.Dropout(0.1), classifier=nn.Linear(32, 2)),
        {"classifier"},
    ),
    "a base model that ends in hidden features": (lambda: Task(encoder=encoder(), final=pooler(32)), set()),
    "a transformer without a head": (lambda: nn.Transformer(16, 2, 1, 1, 32), set()),
    "several heads of a decoder": (
        lambda: Task(
            encoder=encoder(), cls=Parts(predictions=Parts(transform=Residual(32), decoder=nn.Linear(32, 100)),
                                         relation=nn.Linear(32, 2))
        ),
        {"cls.predictions.decoder", "cls.relation"},
    ),
    "actor and critic": (
        lambda: Parts(body=nn.Sequential(nn.Linear(8, 64), nn.Tanh()), actor=nn.Linear(64, 4), critic=nn.Linear(64, 1)),
        {"actor", "critic"},
    ),
    "two towers": (
        lambda: Parts(text=Residual(32), text_norm=nn.LayerNorm(32), image=Residual(64), image_norm=nn.LayerNorm(64),
                      image_projection=nn.Linear(64, 24), text_projection=nn.Linear(32, 24)),
        {"image_projection", "text_projection"},
    ),
    "a list of heads": (
        lambda: Parts(body=encoder(), heads=nn.ModuleList([nn.Linear(32, 10), nn.Linear(32, 7)])),
        {"heads.0", "heads.1"},
    ),
    "a head made first": (
        lambda: Parts(head=nn.Linear(16, 5), body=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))),
        {"head"},
    ),
    "layers in a row": (
        lambda: Parts(fc1=nn.Linear(784, 256), fc2=nn.Linear(256, 128), fc3=nn.Linear(128, 10)),
        {"fc3"},
    ),
    "a convolution before a flattening": (
        lambda: Parts(conv1=nn.Conv2d(1, 6, 5), conv2=nn.Conv2d(6, 16, 5), fc1=nn.Linear(400, 84),
                      fc=nn.Linear(84, 10)),
        {"fc"},
    ),
    "a sequence whose head is as wide as its inputs": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)),
        {"2"},
    ),
    "a classifier that is a convolution": (
        lambda: Parts(features=backbone(), classifier=nn.Sequential(nn.Conv2d(32, 10, 1), nn.ReLU())),
        {"classifier.0"},
    ),
    "segmentation with an auxiliary head": (
        lambda: Parts(backbone=backbone(), classifier=fully_convolutional(32), aux=fully_convolutional(16)),
        {"classifier.4", "aux.4"},
    ),
    "images to images of as many channels": (
        lambda: Parts(stem=nn.Conv2d(3, 16, 3), body=backbone()[3:], out=Parts(conv=nn.Conv2d(32, 3, 1))),
        {"out.conv"},
    ),
    "detection": (
        lambda: Parts(
            backbone=backbone(),
            rpn=Parts(head=Parts(conv=nn.Conv2d(32, 32, 3), logits=nn.Conv2d(32, 3, 1), boxes=nn.Conv2d(32, 12, 1))),
            roi=Parts(box=Parts(fc6=nn.Linear(32 * 49, 128), fc7=nn.Linear(128, 128)),
                      predictor=Parts(score=nn.Linear(128, 91), box=nn.Linear(128, 364))),
        ),
        {"rpn.head.logits", "rpn.head.boxes", "roi.predictor.score", "roi.predictor.box"},
    ),
    "an actor and a critic that see as many numbers as two or four of their outputs": (
        lambda: Parts(actor=perceptron(4, 2), critic=perceptron(4, 1)),
        {"actor.2", "critic.2"},
    ),
    "an ensemble": (lambda: nn.ModuleList([perceptron(2, 1) for _ in range(3)]), {"0.2", "1.2", "2.2"}),
    "an ensemble on images of one channel": (
        lambda: nn.ModuleList([Parts(conv=nn.Conv2d(1, 8, 3), fc=nn.Linear(72, 10)) for _ in range(2)]),
        {"0.fc", "1.fc"},
    ),
    "a head made first, of half as many outputs as there are inputs": (
        lambda: Parts(head=nn.Linear(16, 10), body=nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16))),
        {"head"},
    ),
    "two kinds of data, joined": (
        lambda: Parts(image=perceptron(100, 50), text=perceptron(30, 20), joined=perceptron(70, 5)),
        {"joined.2"},
    ),
    "an embedding joined to features": (
        lambda: Parts(user=nn.Embedding(10, 8), features=perceptron(20, 16), head=nn.Linear(24, 1)),
        {"head"},
    ),
    "data joined to features again": (
        lambda: Parts(fc1=nn.Linear(10, 50), fc2=nn.Linear(60, 50), fc3=nn.Linear(60, 1)),
        {"fc3"},
    ),
    "an autoencoder whose code is cut into mean and variance": (
        lambda: Parts(encoder=perceptron(78, 8), decoder=perceptron(4, 78)),
        {"decoder.2"},
    ),
    "scales and shifts of a diffusion transformer": (
        lambda: Parts(
            blocks=nn.ModuleList([Parts(mlp=Residual(32), modulation=nn.Sequential(nn.SiLU(), nn.Linear(32, 192)))
                                  for _ in range(2)]),
            head=nn.Linear(32, 16),
        ),
        {"head"},
    ),
    "fused queries, keys and values beside the head": (
        lambda: Parts(c_attn=nn.Linear(8, 24), head=nn.Linear(8, 4)),
        {"head"},
    ),
    "a layer for each attention head beside the output": (
        lambda: Parts(parts=nn.ModuleList(nn.Linear(8, rows) for rows in (4, 4, 8)), head=nn.Linear(8, 4)),
        {"head"},
    ),
    "what a method names": (
        lambda: Timm(head=nn.Linear(32, 32), head_dist=nn.Linear(32, 32), body=Residual(32), norm=nn.LayerNorm(32)),
        {"head", "head_dist"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_layers_that_make_the_outputs_are_the_heads(kind: str) -> None:
    make, expected = MODELS[kind]
    model = make()
    assert head_names(model) == expected
    layers = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in expected
    }
    in_projections = {name for name, _ in model.named_parameters() if name.endswith("in_proj_weight")}
    assert matrices(model) == layers | in_projections


# --- Wrappers


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class AdaptedLinear(nn.Module):
    """As PEFT's layer with a low-rank adapter."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(self.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, self.out_features, bias=False)})


def task_model() -> nn.Module:
    return Task(encoder=encoder(), dropout=nn.Dropout(0.1), classifier=nn.Linear(32, 2))


UP = "encoder.layers.0.up.weight"
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item, return-value]
    "data parallel": nn.DataParallel,
    "average": torch.optim.swa_utils.AveragedModel,
    "lightning": lambda model: Parts(model=model, loss=nn.CrossEntropyLoss()),
    "several": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_treated_as_the_bare_one(wrapper: str) -> None:
    model = task_model()
    wrapped = WRAPPERS[wrapper](model)
    prefix = next(name for name, _ in wrapped.named_parameters()).removesuffix("encoder.tokens.weight")
    for settings in ({}, {"head": "encoder.pooler.dense"}, {"adam": "*.up"}, {"row_blocks": {UP: 2}}):
        bare, outer = (build_optimizer(each, "muon", 10, **settings) for each in (model, wrapped))
        for group, expected in zip(outer.param_groups, bare.param_groups, strict=True):
            assert [name.removeprefix(prefix) for name in group["param_names"]] == expected["param_names"]
            assert (group["rule"], group["row_blocks"]) == (expected["rule"], expected["row_blocks"])
        bare.load_state_dict(outer.state_dict())


def test_heads_are_found_beneath_an_adapter() -> None:
    model = task_model().requires_grad_(False)
    layer = model.encoder.layers[0]
    layer.up, layer.down = AdaptedLinear(layer.up), AdaptedLinear(layer.down)
    # A trainable copy beside the frozen head, as PEFT's `modules_to_save` makes it.
    model.classifier = Parts(original_module=model.classifier, saved=nn.ModuleDict({"default": nn.Linear(32, 2)}))
    model = Parts(base_model=Parts(model=model))
    found = rules(model)
    assert {name.split(".")[-2:][0] + "." + name.split(".")[-1] for name in found} == {"default.weight", "default.bias"}
    assert {name for name, rule in found.items() if rule == "adam"} == {
        f"base_model.model.classifier.saved.default.{part}" for part in ("weight", "bias")
    }


def test_blocks_of_attention_heads_are_found_in_a_wrapped_model() -> None:
    class WithBlocks(Task):
        def attention_row_blocks(self) -> dict[str, int]:
            return {UP: 4}

    model = Parts(module=WithBlocks(encoder=encoder(), classifier=nn.Linear(32, 2)))
    optimizer = build_optimizer(model, "asgo", 10, by_heads=True)
    assert [group["param_names"] for group in optimizer.param_groups if group["row_blocks"] == 4] == [[f"module.{UP}"]]


# --- What is named


SELECTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model.encoder.pooler,
    "parameters": lambda model: list(model.encoder.pooler.parameters()),
    "name of a module": lambda model: "encoder.pooler",
    "name of a parameter": lambda model: ["encoder.pooler.dense.weight"],
    "pattern": lambda model: "*pooler*",
}


@pytest.mark.parametrize("kind", SELECTIONS)
def test_what_takes_adam_may_be_named(kind: str) -> None:
    model = task_model()
    found = matrices(model)
    pool = {"encoder.pooler.dense.weight"}
    assert pool < found
    assert matrices(model, adam=SELECTIONS[kind](model)) == found - pool
    assert matrices(model, head=SELECTIONS[kind](model)) == found - pool | {"classifier.weight"}
    assert matrices(model, head=()) == found | {"classifier.weight"}


@pytest.mark.parametrize("keyword", ["head", "adam"])
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("clasifier", r"in {}: 'clasifier'; did you mean 'classifier"),
        (nn.Linear(3, 3), r"{}: a Linear that is not part of the model"),
        ([nn.Parameter(torch.ones(2, 2))], r"{}: a Parameter that is not part of the model"),
        ([3], r"{}: 3 is not a module, parameter or name"),
    ],
    ids=str,
)
def test_what_is_not_the_models_is_refused(keyword: str, wanted: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.format(keyword)):
        rules(task_model(), **{keyword: wanted})


@pytest.mark.parametrize("keyword", ["head", "adam"])
def test_an_optimizer_without_matrices_refuses_a_head(keyword: str) -> None:
    with pytest.raises(ValueError, match=f"{keyword}: adamw .*: asgo, dasgo, muon, shampoo$"):
        build_optimizer(task_model(), "adamw", 10, **{keyword: "classifier"})


# --- Hidden weights of unusual names and shapes


def with_head(body: nn.Module, width: int) -> nn.Module:
    return Parts(body=body, head=nn.Linear(width, 5))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        (lambda: with_head(nn.LSTM(8, 16, 2, bidirectional=True, proj_size=4), 8),
         {f"body.weight_{kind}_l{layer}{end}" for kind in ("ih", "hh", "hr") for layer in (0, 1)
          for end in ("", "_reverse")}),
        (lambda: with_head(nn.GRU(8, 16), 16), {"body.weight_ih_l0", "body.weight_hh_l0"}),
        (lambda: with_head(nn.LSTMCell(8, 16), 16), {"body.weight_ih", "body.weight_hh"}),
        (lambda: with_head(parametrizations.weight_norm(nn.Linear(8, 16)), 16),
         {"body.parametrizations.weight.original1"}),
        (lambda: with_head(parametrizations.spectral_norm(nn.Conv2d(8, 16, 3)), 16),
         {"body.parametrizations.weight.original"}),
        (lambda: with_head(parametrizations.orthogonal(nn.Linear(8, 16)), 16),
         {"body.parametrizations.weight.original"}),
        (lambda: with_head(nn.utils.weight_norm(nn.Linear(8, 16)), 16), {"body.weight_v"}),
        (lambda: Parts(body=nn.Linear(4, 8), head=parametrizations.weight_norm(nn.Linear(8, 16))), {"body.weight"}),
    ],
)  # fmt: skip
def test_hidden_weights_are_matrices_whatever_their_names(model: Callable[[], nn.Module], hidden: set[str]) -> None:
    assert matrices(model()) == hidden


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 8))


@pytest.mark.parametrize(
    ("body", "hidden"),
    [
        (lambda: Parts(router=nn.Linear(8, 4), experts=Experts()),
         {"body.experts.gate_up_proj", "body.experts.down_proj"}),
        (lambda: nn.ModuleDict({"moe": Experts()}), {"body.moe.gate_up_proj", "body.moe.down_proj"}),
        (Grouped, {"body.weight"}),
    ],
)  # fmt: skip
def test_experts_are_matrices_each(body: Callable[[], nn.Module], hidden: set[str]) -> None:
    optimizer = build_optimizer(with_head(body(), 8), "muon", 10)
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert {name for name, group in groups.items() if group["batch_dims"] == 1} == hidden
    assert all(groups[name]["rule"] == "matrix" for name in hidden)


def test_experts_may_be_split_into_blocks_of_rows() -> None:
    model = with_head(Parts(experts=Experts()), 8)
    optimizer = build_optimizer(model, "asgo", 10, row_blocks={"body.experts.gate_up_proj": 2})
    ways = [(group["batch_dims"], group["row_blocks"], group["param_names"]) for group in optimizer.param_groups[:2]]
    assert ways == [(1, 2, ["body.experts.gate_up_proj"]), (1, None, ["body.experts.down_proj"])]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[model.body.experts.gate_up_proj]
    assert {key: value.shape for key, value in state.items() if key.startswith("preconditioner.")} == {
        f"preconditioner.{expert}.{block}": (8, 8) for expert in range(4) for block in range(2)
    }


# --- The warning


class Raw(nn.Module):
    """Two matrices whose names and shapes tell nothing."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))


def test_a_model_whose_matrices_are_left_to_adam_is_warned_of_with_the_elements() -> None:
    model = Parts(raw=Raw(16, 16), body=nn.Linear(8, 16), head=nn.Linear(16, 4))
    with pytest.warns(
        UserWarning, match=r"matrix rule has 128 of the model's 724 elements; Adam has 512 .*'raw\.first'"
    ):
        build_optimizer(model, "muon", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_optimizer(model, "muon", 10, adam="raw")
        build_optimizer(Parts(table=Raw(1, 99, 99), body=nn.Linear(8, 16), head=nn.Linear(16, 4)), "muon", 10)


def test_flat_shards_of_fsdp1_are_warned_of() -> None:
    """They have the names of weights, and one dimension."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach().flatten()[:7])
    with pytest.warns(UserWarning, match=r"matrix rule has 0 of .*FSDP1.*ShardedOptimizer"):
        build_optimizer(model, "asgo", 10)
