"""`build_optimizer`: one optimizer for a whole model, each parameter under the rule that fits it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from optim import OPTIMIZER_NAMES, build_optimizer, optimizer_class
from optim.groups import parts_of
from optim.specs import SPECS

from . import reference
from .cases import BASELINES, DESCRIPTIONS, ELEMENTWISE, MATRIX, PUBLISHED, noise, relative_error, set_gradient

SETTINGS = {
    "asro": {"decrement": 0.1, "min_scale": 0.5},
    "accasro": {"increment": 0.1, "decrement": 0.1, "max_scale": 2.0, "min_scale": 0.5},
}
every_name = pytest.mark.parametrize("name", OPTIMIZER_NAMES)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.up = nn.Linear(8, 8), nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)


class Decoder(nn.Module):
    """A small GPT's parameters, with a head that is tied or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


class Vision(nn.Module):
    """Convolutions, a raw positional table, norms of one and two dimensions, attention, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.batch_norm = nn.BatchNorm2d(8)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embedding = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.plane_norm = nn.LayerNorm((5, 8))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 4))


DECODER_HIDDEN = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("query", "up", "down")}
VISION_HIDDEN = {
    "stem.weight", "depthwise.weight", "attention.in_proj_weight", "attention.out_proj.weight",
}  # fmt: skip


def build(model: nn.Module, name: str, **settings: object) -> torch.optim.Optimizer:
    return build_optimizer(model, name, 10, **{"lr": 0.1, **SETTINGS.get(name, {}), **settings})


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module, wanted: dict[str, object]) -> set[str]:
    """Names of the parameters in the groups that hold all of `wanted`."""
    names = {param: name for name, param in model.named_parameters()}
    groups = [g for g in optimizer.param_groups if all(g.get(key) == value for key, value in wanted.items())]
    return {names[param] for group in groups for param in group["params"]}


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 3) -> None:
    for step in range(steps):
        for index, param in enumerate(model.parameters()):
            if param.requires_grad:
                set_gradient(param, noise(tuple(param.shape), 1, 100 * step + index)[0])
        optimizer.step()


def test_the_promised_names_are_there_in_their_order():
    assert [name for name in OPTIMIZER_NAMES if name in PUBLISHED] == PUBLISHED
    assert sorted({optimizer_class(name)[0].__name__ for name in MATRIX + ELEMENTWISE}) == sorted(
        case.name for case in DESCRIPTIONS
    )


@pytest.mark.parametrize(
    ("name", "cls", "defaults"),
    [
        ("adam", torch.optim.Adam, {"amsgrad": False}),
        ("adamw", torch.optim.AdamW, {"amsgrad": False}),
        ("amsgrad", torch.optim.Adam, {"amsgrad": True}),
        ("radam", torch.optim.RAdam, {}),
        ("rmsprop", torch.optim.RMSprop, {}),
        ("adagrad", torch.optim.Adagrad, {}),
        ("sgd-momentum", torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ("sgd-nesterov", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_baselines_are_torchs(name, cls, defaults):
    optimizer = build(Decoder(), name)
    assert type(optimizer) is cls
    assert defaults.items() <= optimizer.defaults.items()


@every_name
def test_every_trainable_parameter_is_in_exactly_one_group(name):
    for model in (Decoder(), Decoder(tied=True), Vision()):
        optimizer = build(model, name)
        params = [id(param) for group in optimizer.param_groups for param in group["params"]]
        assert sorted(params) == sorted({id(param) for param in model.parameters()})


@every_name
def test_frozen_parameters_are_left_out(name):
    model = Decoder()
    model.blocks[0].requires_grad_(False)
    before = {key: param.clone() for key, param in model.blocks[0].named_parameters()}
    optimizer = build(model, name)
    train(optimizer, model)
    assert not any(p is q for g in optimizer.param_groups for p in g["params"] for q in model.blocks[0].parameters())
    assert all(torch.equal(param, before[key]) for key, param in model.blocks[0].named_parameters())


@every_name
def test_one_optimizer_and_one_state_dict_resume_a_model(name):
    torch.manual_seed(0)
    whole = Decoder(tied=True)
    first = Decoder(tied=True)
    first.load_state_dict(whole.state_dict())
    optimizers = build(whole, name), build(first, name)
    for optimizer, model in zip(optimizers, (whole, first), strict=True):
        assert isinstance(optimizer, torch.optim.Optimizer)
        train(optimizer, model)
    second = Decoder(tied=True)
    second.load_state_dict(first.state_dict())
    resumed = build(second, name)
    resumed.load_state_dict(optimizers[1].state_dict())
    train(optimizers[0], whole)
    train(resumed, second)
    for mine, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", MATRIX)
def test_hidden_matrices_of_a_decoder_take_the_matrix_rule(name, tied):
    model = Decoder(tied)
    optimizer = build(model, name)
    hidden = names_of(optimizer, model, {"rule": "matrix"})
    assert hidden == DECODER_HIDDEN
    assert names_of(optimizer, model, {"rule": "adam"}) == set(dict(model.named_parameters())) - hidden


@pytest.mark.parametrize("name", MATRIX)
def test_hidden_kernels_and_projections_of_a_vision_model_take_the_matrix_rule(name):
    model = Vision()
    assert names_of(build(model, name), model, {"rule": "matrix"}) == VISION_HIDDEN


@pytest.mark.parametrize("name", MATRIX)
def test_a_positional_table_without_a_batch_dimension_takes_adam(name):
    model = nn.Module()
    model.body, model.head = nn.Linear(8, 8), nn.Linear(8, 4)
    model.pos_embedding = nn.Parameter(torch.randn(5, 8))
    assert names_of(build(model, name), model, {"rule": "matrix"}) == {"body.weight"}


@pytest.mark.parametrize("name", MATRIX)
def test_each_parameter_moves_by_its_rule_at_the_same_learning_rate(name):
    """Behaviour, not group keys: hidden matrices follow the reference with weight decay, the others Adam without."""
    case = next(case for case in DESCRIPTIONS if case.name.lower() == name)
    model = Decoder(tied=True).double()
    optimizer = build(model, name, lr=0.07, weight_decay=0.3)
    refers: dict[str, reference.Reference] = {}
    for key, param in model.named_parameters():
        w = param.detach().numpy()
        hidden = key in DECODER_HIDDEN
        refers[key] = (
            case.reference(w, lr=0.07, weight_decay=0.3)
            if hidden
            else reference.Adam(w, lr=0.07, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        )
    for step in range(4):
        for index, (key, param) in enumerate(model.named_parameters()):
            gradient = noise(tuple(param.shape), 1, 100 * step + index)[0]
            set_gradient(param, gradient)
            refers[key].step(gradient)
        optimizer.step()
    for key, param in model.named_parameters():
        assert relative_error(param, refers[key].parameter) < 1e-9, key


@pytest.mark.parametrize("name", MATRIX)
def test_a_scheduler_drives_both_rules(name):
    optimizer = build(Decoder(), name)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


@pytest.mark.parametrize("name", [*ELEMENTWISE, *BASELINES])
def test_weight_decay_is_for_two_dimensions_and_more(name):
    model = Vision()
    optimizer = build(model, name, weight_decay=0.3)
    decayed = names_of(optimizer, model, {"weight_decay": 0.3})
    assert decayed == {key for key, param in model.named_parameters() if param.ndim >= 2}
    assert names_of(optimizer, model, {"weight_decay": 0.0}) == set(dict(model.named_parameters())) - decayed


@every_name
def test_settings_reach_the_groups(name):
    group = build(Decoder(), name, lr=0.03, weight_decay=0.25).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.03, 0.25)


def test_total_steps_reach_accasro():
    assert build(Decoder(), "accasro").param_groups[0]["total_steps"] == 10


@every_name
def test_a_model_of_one_rule_only_has_no_empty_group(name):
    optimizer = build(nn.LayerNorm(5), name)
    assert all(group["params"] for group in optimizer.param_groups)


@pytest.mark.parametrize(("typed", "nearest"), [("asgoo", "asgo"), ("AccAsro", "accasro"), ("adamW", "adamw")])
def test_an_unknown_name_is_refused_with_the_nearest_one(typed, nearest):
    for refuse in (lambda: build_optimizer(Decoder(), typed, 10, lr=0.1), lambda: optimizer_class(typed)):
        with pytest.raises(ValueError, match=rf"{typed}.*\b{nearest}\b"):
            refuse()


@every_name
def test_an_unknown_setting_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"wieght_decay.*weight_decay"):
        build(Decoder(), name, wieght_decay=0.1)


@pytest.mark.parametrize("name", MATRIX + ELEMENTWISE)
def test_a_bad_setting_is_refused_by_name_and_value(name):
    with pytest.raises(ValueError, match=r"lr.*-0\.5"):
        build(Decoder(), name, lr=-0.5)


@pytest.mark.parametrize("name", MATRIX + ELEMENTWISE)
def test_an_error_at_a_step_names_the_parameter_as_the_model_does(name):
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = build(model, name)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"'?0\.weight"):
        optimizer.step()


@pytest.mark.parametrize(
    ("architecture", "head"), [("resnet18", "fc"), ("efficientnet_b0", "classifier.1"), ("vit_b_32", "heads.head")]
)
def test_the_head_of_a_torchvision_model_takes_adam(architecture, head):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    with torch.device("meta"):  # the parameters' shapes are enough
        model = models.get_model(architecture, weights=None)
    optimizer = build(model, "asgo")
    hidden = names_of(optimizer, model, {"rule": "matrix"})
    layers = {
        f"{key}.weight"
        for key, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and key != head
    } | {key for key, _ in model.named_parameters() if key.endswith("in_proj_weight")}
    assert hidden == layers


def test_a_torchvision_model_trains():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = models.resnet18(weights=None, num_classes=10)
    optimizer = build(model, "dasgo", lr=1e-2)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


# --- Blocks of rows

SPLIT = {"blocks.0.query.weight": 2, "blocks.1.query.weight": 2, "blocks.1.up.weight": [4, 4, 8]}


def groups_of(optimizer: torch.optim.Optimizer) -> list[tuple[object, list[str]]]:
    """Each group's blocks (None: not split; "adam": no matrices), with the names of its parameters."""
    return [
        ("adam" if group["rule"] == "adam" else group.get("row_blocks"), group["param_names"])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", MATRIX)
def test_without_blocks_there_is_a_group_of_matrices_and_one_of_the_rest(name):
    model = Decoder()
    others = [key for key, _ in model.named_parameters() if key not in DECODER_HIDDEN]
    expected = [(None, [key for key, _ in model.named_parameters() if key in DECODER_HIDDEN]), ("adam", others)]
    assert groups_of(build(model, name)) == expected
    assert groups_of(build(model, name, row_blocks={})) == expected
    assert groups_of(build(model, name, row_blocks=None, by_heads=False)) == expected


@pytest.mark.parametrize("name", MATRIX)
def test_matrices_of_equal_blocks_share_a_group_in_the_order_of_the_model(name):
    model = Decoder()
    expected = [
        (None, ["blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.down.weight"]),
        (2, ["blocks.0.query.weight", "blocks.1.query.weight"]),
        ((4, 4, 8), ["blocks.1.up.weight"]),
        ("adam", [key for key, _ in model.named_parameters() if key not in DECODER_HIDDEN]),
    ]
    assert groups_of(build(model, name, row_blocks=SPLIT)) == expected
    assert groups_of(build(model, name, row_blocks=dict(reversed(SPLIT.items())))) == expected


@pytest.mark.parametrize("name", MATRIX)
def test_split_weights_move_as_separate_matrices_and_all_others_as_before(name):
    case = next(case for case in DESCRIPTIONS if case.name.lower() == name)
    models = Decoder().double(), Decoder().double()
    models[1].load_state_dict(models[0].state_dict())
    split = build(models[0], name, row_blocks={"blocks.0.query.weight": (3, 5)}, weight_decay=0.3)
    whole = build(models[1], name, weight_decay=0.3)
    query = models[0].blocks[0].query.weight
    refers = [case.reference(part.numpy(), lr=0.1, weight_decay=0.3) for part in query.detach().split([3, 5])]
    for step in range(4):
        for index, params in enumerate(zip(*(model.parameters() for model in models), strict=True)):
            gradient = noise(tuple(params[0].shape), 1, 100 * step + index)[0]
            for param in params:
                set_gradient(param, gradient)
            if params[0] is query:
                for refer, part in zip(refers, np.split(gradient, [3]), strict=True):
                    refer.step(part)
        split.step()
        whole.step()
    assert relative_error(query, np.concatenate([refer.parameter for refer in refers])) < 1e-6
    for (key, mine), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other) == (key != "blocks.0.query.weight"), key


@pytest.mark.parametrize("name", MATRIX)
def test_blocks_and_one_state_dict_resume_a_model(name):
    torch.manual_seed(0)
    whole, first, second = Decoder(), Decoder(), Decoder()
    first.load_state_dict(whole.state_dict())
    optimizers = [build(model, name, row_blocks=SPLIT) for model in (whole, first)]
    for optimizer, model in zip(optimizers, (whole, first), strict=True):
        train(optimizer, model)
    second.load_state_dict(first.state_dict())
    resumed = build(second, name, row_blocks=SPLIT)
    resumed.load_state_dict(optimizers[1].state_dict())
    train(optimizers[0], whole)
    train(resumed, second)
    assert all(torch.equal(mine, other) for mine, other in zip(whole.parameters(), second.parameters(), strict=True))


def test_blocks_of_frozen_parameters_are_left_out():
    model = Decoder()
    model.blocks[0].requires_grad_(False)
    blocks = [blocks for blocks, _ in groups_of(build(model, "dasgo", row_blocks=SPLIT))]
    assert blocks == [None, 2, (4, 4, 8), "adam"]
    model.blocks.requires_grad_(False)
    assert [blocks for blocks, _ in groups_of(build(model, "dasgo", row_blocks=SPLIT))] == ["adam"]


@pytest.mark.parametrize(
    ("row_blocks", "message"),
    [
        ({"blocks.0.qurey.weight": 2}, r"row_blocks: 'blocks\.0\.qurey\.weight'.*'blocks\.0\.query\.weight'"),
        ({"tokens.weight": 2}, r"row_blocks.*'tokens\.weight' uses Adam"),
        ({"head.weight": 2}, r"row_blocks.*'head\.weight' uses Adam"),
        ({"blocks.0.query.bias": 2}, r"row_blocks.*'blocks\.0\.query\.bias' uses Adam"),
        ({"blocks.0.query.weight": 3}, r"(?=.*row_blocks)(?=.*blocks\.0\.query\.weight)"),
        ({"blocks.0.query.weight": "2"}, "row_blocks.*'2'"),
        ({"blocks.0.query.weight": [4, 5]}, r"(?=.*row_blocks)(?=.*blocks\.0\.query\.weight)"),
        ({"blocks.0.query.weight": 1, "blocks.1.query.weight": True}, "row_blocks.*True"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", MATRIX)
def test_blocks_that_do_not_fit_are_refused_in_one_line(name, row_blocks, message):
    with pytest.raises(ValueError, match=message) as error:
        build(Decoder(), name, row_blocks=row_blocks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *BASELINES])
def test_blocks_are_refused_by_an_optimizer_without_matrices(name):
    takers = ", ".join(spec.name for spec in SPECS.values() if spec.takes_matrices)
    for keyword, value in {"row_blocks": {"blocks.0.query.weight": 2}, "by_heads": True}.items():
        with pytest.raises(ValueError, match=rf"{keyword}: {name} .*: {takers}$"):
            build(Decoder(), name, **{keyword: value})


class DecoderWithHeads(Decoder):
    def attention_row_blocks(self) -> dict[str, int]:
        return {"blocks.0.query.weight": 4, "blocks.1.query.weight": 4}


def test_by_heads_splits_what_the_model_names_under_what_is_given():
    model = DecoderWithHeads()
    queries = ["blocks.0.query.weight", "blocks.1.query.weight"]
    assert groups_of(build(model, "asgo", by_heads=True))[1:-1] == [(4, queries)]
    assert groups_of(build(model, "asgo", by_heads=True, row_blocks={queries[1]: 2, "blocks.0.up.weight": 4}))[
        1:-1
    ] == [
        (4, [queries[0], "blocks.0.up.weight"]),
        (2, queries[1:]),
    ]
    assert groups_of(build(model, "asgo", by_heads=False)) == groups_of(build(Decoder(), "asgo"))


def test_by_heads_of_a_model_that_does_not_tell_is_refused():
    with pytest.raises(ValueError, match=r"by_heads: Vision has no attention_row_blocks\(\)"):
        build(Vision(), "asgo", by_heads=True)


def decayed_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    names = {param: name for name, param in model.named_parameters()}
    groups = [group for group in optimizer.param_groups if group["weight_decay"] != 0]
    return {names[param] for group in groups for param in group["params"]}


@every_name
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_without_decay_of_embeddings_and_head_all_optimizers_decay_the_same(name: str, tied: bool) -> None:
    model = Decoder(tied)
    optimizer = build(model, name, no_decay=("embeddings", "head"), weight_decay=0.1)
    assert decayed_names(optimizer, model) == DECODER_HIDDEN
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_what_is_left_out_of_decay_is_what_was_named() -> None:
    model = Decoder()
    tables = {"tokens.weight", "positions.weight"}
    for no_decay, decayed in {
        (): DECODER_HIDDEN | tables | {"head.weight"},
        ("embeddings",): DECODER_HIDDEN | {"head.weight"},
        ("head",): DECODER_HIDDEN | tables,
    }.items():
        assert decayed_names(build(model, "adamw", no_decay=no_decay), model) == decayed
    for name in ("adamw", "asgo"):
        with pytest.raises(ValueError, match=r"in no_decay: 'embedding'; did you mean 'embeddings'\?"):
            build(model, name, no_decay=["embedding"])


def settings_of(optimizer: torch.optim.Optimizer, model: nn.Module, key: str) -> dict[str, object]:
    names = {param: name for name, param in model.named_parameters()}
    return {names[param]: group[key] for group in optimizer.param_groups for param in group["params"]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_belongs_to_one_part(tied: bool) -> None:
    model = Decoder(tied)
    parts = parts_of(model)
    assert {name for name, part in parts.items() if part == "matrices"} == DECODER_HIDDEN
    assert {name for name, part in parts.items() if part == "embedding"} == {"tokens.weight", "positions.weight"}
    assert {name for name, part in parts.items() if part == "head"} == (set() if tied else {"head.weight"})
    assert list(parts) == [name for name, _ in model.named_parameters()]
    vision = parts_of(Vision())
    assert {name for name, part in vision.items() if part == "matrices"} == VISION_HIDDEN
    assert vision["class_token"] == vision["plane_norm.weight"] == "vectors"
    assert vision["classifier.1.weight"] == vision["classifier.1.bias"] == "head"


@every_name
def test_a_part_has_its_own_keywords_and_the_others_do_not_change(name: str) -> None:
    model = Decoder()
    optimizer = build(model, name, parts={"embedding": {"lr": 0.3}, "matrices": {"weight_decay": 0.5}})
    expected = {name: 0.3 if name in ("tokens.weight", "positions.weight") else 0.1 for name in parts_of(model)}
    assert settings_of(optimizer, model, "lr") == expected
    before = settings_of(build(model, name), model, "weight_decay")
    after = settings_of(optimizer, model, "weight_decay")
    assert after == {**before, **dict.fromkeys(DECODER_HIDDEN, 0.5)}


@pytest.mark.parametrize("name", ["asgo", "dasgo", "muon", "shampoo"])
def test_what_is_left_to_adam_has_settings_of_its_own(name: str) -> None:
    model = Decoder()
    adam = {"adam_lr": 0.7, "adam_betas": (0.8, 0.9), "adam_eps": 1e-6, "adam_weight_decay": 0.2}
    optimizer = build(model, name, **adam, no_decay=["positions.*"], weight_decay=0.1)
    uses_adam = {name for name, part in parts_of(model).items() if part != "matrices"}
    rates = settings_of(optimizer, model, "lr")
    assert {key for key, lr in rates.items() if lr == 0.7} == uses_adam
    groups = [group for group in optimizer.param_groups if group["rule"] == "adam"]
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.9), 1e-6)}
    decay = settings_of(optimizer, model, "weight_decay")
    assert {key for key, value in decay.items() if value == 0.2} == {"tokens.weight", "head.weight"}
    assert {key for key, value in decay.items() if value == 0.1} == DECODER_HIDDEN


@every_name
def test_split_groups_make_the_same_steps(name: str) -> None:
    """Naming a part splits groups, and nothing else: weights are equal, bit for bit."""
    results = []
    for parts in ({}, {part: {} for part in ("embedding", "head", "vectors", "matrices")}):
        torch.manual_seed(0)
        model = Decoder()
        optimizer = build(model, name, parts=parts)
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            optimizer.step()
        results.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *results))


def test_wildcards_name_blocks_of_rows_and_parameters_without_decay() -> None:
    model = Decoder()
    groups = groups_of(build(model, "asgo", row_blocks={"*.query.weight": 4}))
    assert groups[1:-1] == [(4, ["blocks.0.query.weight", "blocks.1.query.weight"])]
    decayed = decayed_names(build(model, "asgo", no_decay=["blocks.1.*"], weight_decay=0.1), model)
    assert decayed == {name for name in DECODER_HIDDEN if name.startswith("blocks.0.")}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("asgo", {"parts": {"heads": {}}}, "unknown part: 'heads'; did you mean 'head'"),
        ("asgo", {"parts": {"embedding": {"momentum": 0.5}}}, r"in parts.embedding of asgo: 'momentum'; known: lr"),
        ("adamw", {"parts": {"head": {"lr": 0.1}}}, "parts.head: the model has no such parameters; it has embedding"),
        ("adamw", {"adam_lr": 0.1}, "unknown keyword of adamw: 'adam_lr'"),
        ("adamw", {"no_decay": ["nonesuch.*"]}, r"in no_decay: 'nonesuch.\*'"),
        ("muon", {"adam_betas": (0.9, 1.0)}, "invalid betas"),
    ],
)
def test_wrong_parts_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Decoder(tied=True), name, **settings)
