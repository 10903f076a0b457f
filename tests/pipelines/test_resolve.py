"""Settings from presets, files, flags and --set become one configuration, or a line for every problem."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from optim import OPTIMIZER_NAMES, build_optimizer, optimizer_class
from optim.specs import ADAM_KEYWORDS, SPECS
from pipelines.config import GPTRunConfig, RunConfig, differences
from pipelines.errors import UsageError
from pipelines.resolve import (
    Layer,
    assignment_layer,
    file_layer,
    preset_layer,
    preset_names,
    read_preset,
    resolve,
    saved_layer,
)
from pipelines.training.gpt_task import build_decoder
from tests.optim.cases import PUBLISHED

TINY = preset_layer("gpt", "tiny")
BUILD_KEYWORDS = ("by_heads", "row_blocks", "no_decay", "parts", *(f"adam_{key}" for key in ADAM_KEYWORDS))
"""Settings that `build_optimizer` takes for itself."""
MATRIX_OPTIMIZERS = [name for name, spec in SPECS.items() if spec.takes_matrices]
MATRIX_ONLY = f"unknown key of this optimizer; these have it: {', '.join(MATRIX_OPTIMIZERS)}"
HIDDEN = [
    *(f"attention.{part}" for part in ("query", "key", "value", "output")),
    "feed_forward.up",
    "feed_forward.down",
]
MATRIX = ["asgo", "dasgo", "muon", "shampoo"]


def problems_of(*layers: Layer) -> list[str]:
    with pytest.raises(UsageError) as error:
        resolve([TINY, *layers])
    return str(error.value).splitlines()


def given(source: str, values: Mapping[str, Any]) -> Layer:
    return Layer(source, values)


@pytest.mark.parametrize("preset", preset_names("gpt"))
@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_preset_has_settings_that_its_optimizers_take(preset: str, name: str) -> None:
    config = resolve([preset_layer("gpt", preset), given("--optimizer", {"optimizer.name": name})])
    accepted = [*inspect.signature(optimizer_class(name)[0]).parameters, *BUILD_KEYWORDS]
    assert config.optimizer.name == name
    assert set(config.optimizer_keywords()) <= set(accepted)
    if name in PUBLISHED:
        assert f"optimizers.{name}.lr" in preset_layer("gpt", preset).values, "a rate of its own"


@pytest.mark.parametrize("name", ["asgo", "dasgo", "muon", "shampoo", "asro", "accasro"])
def test_settings_have_the_keywords_and_defaults_of_the_constructor(name: str) -> None:
    from pipelines.config import OPTIMIZER_SETTINGS

    own = ("name", *BUILD_KEYWORDS)
    fields = {key: field for key, field in OPTIMIZER_SETTINGS[name].model_fields.items() if key not in own}
    accepted = dict(inspect.signature(optimizer_class(name)[0]).parameters)
    for key in ("params", "total_steps", "maximize", "capturable"):  # the last two are for other people's loops
        accepted.pop(key, None)
    assert list(fields) == list(accepted)
    for key, field in fields.items():
        required = accepted[key].default is inspect.Parameter.empty
        assert field.is_required() == required
        assert required or field.default == accepted[key].default


def test_the_papers_settings() -> None:
    accasro = resolve([preset_layer("gpt", "asro-gpt")])
    lr = accasro.optimizer.lr
    keywords = accasro.optimizer_keywords()
    assert (lr, lr * keywords["max_scale"], lr * keywords["min_scale"]) == pytest.approx((7.5e-5, 1e-3, 1e-5))
    assert (keywords["increment"], keywords["decrement"], keywords["betas"]) == (5e-2, 2e-4, (0.9, 0.95))
    assert (accasro.training.steps, accasro.training.batch_size, accasro.training.max_grad_norm) == (48005, 40, None)
    assert (accasro.schedule.kind, accasro.schedule.warmup_steps) == ("constant", 2)
    asgo = resolve([preset_layer("gpt", "asgo-gpt2")])
    assert asgo.optimizer_keywords() == {
        "lr": 1e-2, "momentum": 0.9, "beta2": 0.8, "eps": 1e-10, "weight_decay": 0.1, "root_method": "auto",
        "root_steps": 10, "precond_frequency": 1, "root_precision": "bf16", "by_heads": False,
        "no_decay": ("embeddings", "head"),
    }  # fmt: skip
    assert (asgo.training.batch_size, asgo.training.micro_batch_size, asgo.training.max_grad_norm) == (1024, 32, 1.0)
    assert (asgo.schedule.kind, asgo.schedule.warmup_fraction, asgo.schedule.final_lr_fraction) == ("cosine", 0.1, 0.02)


@pytest.mark.parametrize("preset", ["asgo-gpt2", "asgo-nanogpt"])
def test_in_the_asgo_papers_experiments_every_optimizer_decays_the_same_weights(preset: str) -> None:
    """The paper compares with an AdamW that decays neither embeddings nor the tied head."""
    small = {"model.n_layers": 1, "model.d_model": 12, "model.d_ff": 12, "optimizer.weight_decay": 0.1}
    decayed = []
    for name in OPTIMIZER_NAMES:
        layers = [preset_layer("gpt", preset), given("test", {**small, "optimizer.name": name})]
        config = resolve(layers)
        assert isinstance(config, GPTRunConfig)
        model = build_decoder(config.model, 99)
        optimizer = build_optimizer(model, name, 10, **config.optimizer_keywords())
        decays = {param: group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
        decayed.append([key for key, param in model.named_parameters() if decays[param]])
    assert all(names == decayed[0] for names in decayed)
    assert decayed[0] == [f"blocks.0.{layer}.weight" for layer in HIDDEN]


def test_later_layers_win_and_an_optimizers_table_wins_over_the_general_one() -> None:
    file = given("my.toml", {"optimizer.lr": 0.5, "optimizers.asgo.lr": 0.25, "optimizers.muon.lr": 0.125})
    asgo = given("--optimizer", {"optimizer.name": "asgo"})
    assert resolve([TINY, file, asgo]).optimizer.lr == 0.25
    assert resolve([TINY, file, given("--optimizer", {"optimizer.name": "adamw"})]).optimizer.lr == 0.5
    assert resolve([TINY, file, asgo, given("--lr", {"optimizer.lr": 1.0})]).optimizer.lr == 1.0
    assert resolve([TINY, file, asgo, assignment_layer(["optimizer.lr=2"])]).optimizer.lr == 2.0


def test_an_optimizers_table_may_hold_its_schedule() -> None:
    assert resolve([TINY]).schedule.kind == "constant"
    assert resolve([TINY, given("--optimizer", {"optimizer.name": "asgo"})]).schedule.kind == "cosine"


@pytest.mark.parametrize("preset", preset_names("gpt"))
@pytest.mark.parametrize("name", MATRIX)
def test_every_preset_takes_weights_whole_until_it_is_told_to_take_heads(preset: str, name: str) -> None:
    layers = [preset_layer("gpt", preset), given("--optimizer", {"optimizer.name": name})]
    assert resolve(layers).optimizer_keywords()["by_heads"] is False
    for asked in (
        assignment_layer(["optimizer.by_heads=true"]),
        given("my.toml", {f"optimizers.{name}.by_heads": True}),
    ):
        assert resolve([*layers, asked]).optimizer_keywords()["by_heads"] is True


def test_by_heads_in_the_table_of_one_optimizer_leaves_the_others_alone() -> None:
    file = given("my.toml", {"optimizers.asgo.by_heads": True})
    assert resolve([TINY, file]).optimizer.name == "accasro"
    assert (
        resolve([TINY, file, given("--optimizer", {"optimizer.name": "muon"})]).optimizer_keywords()["by_heads"]
        is False
    )


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    config = resolve([TINY, assignment_layer(["training.max_grad_norm=0.5", "optimizer.betas=[0.8, 0.9]"])])
    path = tmp_path / "printed.toml"
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    assert resolve([preset_layer("gpt", str(file_layer(path).values["preset"])), file_layer(path)]) == config


def test_all_problems_are_told_at_once_with_their_places_and_the_nearest_names() -> None:
    file = given("my.toml", {"modle.n_layers": 2, "training.stepz": 9, "schedule.kind": "cosin", "seed": -1})
    assert sorted(problems_of(file, assignment_layer(["training.batch_size=many", "model.n_heads=3"]))) == [
        "--set: model: n_heads=3 does not divide d_model=128; 2 or 4 would do",
        "--set: training.batch_size = 'many': should be a valid integer, unable to parse string as an integer",
        "my.toml: modle: unknown key; did you mean 'model'?",
        "my.toml: schedule.kind = 'cosin': should be 'constant', 'linear', 'cosine', 'wsd' or 'inverse-sqrt'; "
        "did you mean 'cosine'?",
        "my.toml: seed = -1: should be greater than or equal to 0",
        "my.toml: training.stepz: unknown key; did you mean 'steps'?",
    ]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"optimizer.name": "accasr"}, "here: unknown optimizer 'accasr'; did you mean 'accasro'?"),
        ({"optimizer.decrment": 1}, "here: optimizer.decrment: unknown key; did you mean 'decrement'?"),
        ({"optimizers.mun.lr": 1}, "here: optimizers.mun: unknown optimizer; did you mean 'muon'?"),
        ({"optimizers.muon.ns_step": 1}, "here: optimizers.muon.ns_step: unknown key; did you mean 'ns_steps'?"),
        ({"optimizers.muon.lr": -1}, "here: optimizers.muon.lr = -1: should be greater than or equal to 0"),
        ({"optimizer.by_heads": True}, f"here: optimizer.by_heads: {MATRIX_ONLY}"),
        ({"optimizers.adamw.by_heads": True}, f"here: optimizers.adamw.by_heads: {MATRIX_ONLY}"),
        ({"optimizers.asgo.by_heads": "some"}, "here: optimizers.asgo.by_heads = 'some': should be a valid boolean, "
         "unable to interpret input"),
        ({"optimizers.asgo.by_head": True}, "here: optimizers.asgo.by_head: unknown key; did you mean 'by_heads'?"),
        ({"optimizer.max_scale": 0.01}, "here: optimizer: min_scale=0.1 is above max_scale=0.01"),
        ({"optimizer.lr": float("nan")}, "here: optimizer.lr = nan: should be a finite number"),
        ({"schedule.warmup_fraction": 0.5}, "here: schedule: give warmup_steps or warmup_fraction, not both"),
        ({"training.micro_batch_size": 3}, "here: training: micro_batch_size=3 does not divide batch_size=16"),
        ({"runtime.device": "x"}, "here: runtime.device = 'x': should be 'auto', 'cuda', 'mps' or 'cpu'"),
        ({"optimizers.muon": 3}, "here: optimizers.muon = 3: should be a table of settings"),
        ({"optimizers.accasro": 3}, "here: optimizers.accasro = 3: should be a table of settings"),
        ({"optimizers": 3}, "here: optimizers = 3: should be a table of settings"),
    ],
)  # fmt: skip
def test_one_problem_is_one_line(values: dict[str, Any], problem: str) -> None:
    assert problems_of(given("here", values)) == [problem]


def test_a_value_where_a_table_belongs_and_the_reverse_are_named() -> None:
    assert any("training" in line for line in problems_of(given("here", {"training": 3})))
    assert any("seed" in line for line in problems_of(given("here", {"seed.x": 3})))


def test_assignments_without_a_value_are_all_named() -> None:
    with pytest.raises(UsageError) as error:
        assignment_layer(["a", "=3", "seed=1"])
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"[a]\n[a]"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "my.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"my\.toml: not valid TOML"):
        file_layer(tmp_path / "my.toml")
    with pytest.raises(UsageError, match=r"absent\.toml: No such file"):
        file_layer(tmp_path / "absent.toml")


def test_a_file_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 7\r\n")
    assert file_layer(tmp_path / "my.toml").values == {"training.steps": 7}
    (tmp_path / "my.toml").write_bytes("[training]".encode("utf-16"))
    with pytest.raises(UsageError, match=r"my\.toml: not valid TOML: it is UTF-16; save it as UTF-8$"):
        file_layer(tmp_path / "my.toml")


@pytest.mark.parametrize(
    "content",
    [
        f"x = {'[' * 5000}{']' * 5000}",
        f"x = {'[' * 100}{']' * 100}",
        f"{'a.' * 5000}b = 1",
        f"{'a.' * 500}b = 1",
        f"[[runs]]\n{'a.' * 900}b = 1",
        f"x = {'9' * 5000}",
    ],
    ids=range(6),
)
def test_what_is_nested_too_deeply_or_too_long_a_number_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(content)
    with pytest.raises(UsageError, match=r"my\.toml: not valid TOML: [^\n]{,200}$"):
        file_layer(tmp_path / "my.toml")
    assert problems_of(assignment_layer([f"optimizer.lr={content.removeprefix('x = ')}"]))
    with pytest.raises(UsageError, match="nested too deeply"):
        assignment_layer([f"{'a.' * 500}b=1"])
    (tmp_path / "config.json").write_text(f'{{"config": {"[" * 100_000}{"]" * 100_000}}}')
    with pytest.raises(UsageError, match="not a configuration that asgo wrote"):
        saved_layer(tmp_path, None)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_a_seed_that_torch_cannot_take_is_one_line(seed: int) -> None:
    (problem,) = problems_of(given("--seed", {"seed": seed}))
    assert problem.startswith(f"--seed: seed = {seed}: should be ")
    assert resolve([TINY, given("--seed", {"seed": 2**64 - 1})]).seed == 2**64 - 1


@pytest.mark.parametrize(
    "key",
    ["model.n_layers", "model.d_model", "model.d_ff", "model.context_length", "model.vocab_multiple", "training.steps",
     "training.batch_size", "optimizers.asgo.root_steps", "optimizers.muon.ns_steps", "evaluation.every"],
)  # fmt: skip
def test_no_number_of_a_file_sizes_anything_without_a_bound(key: str) -> None:
    (problem, *others) = problems_of(given("my.toml", {key: 10**18}))
    assert "should be less than or equal to" in problem
    assert all("divide" in other for other in others)


def test_a_model_beyond_the_memory_is_one_line() -> None:
    huge = {"model.d_model": 2**20, "model.d_ff": 2**20, "model.n_layers": 10_000}
    config = resolve([TINY, given("my.toml", huge)])
    assert isinstance(config, GPTRunConfig)
    with pytest.raises(UsageError, match=r"^model: its weights take [0-9,]+ GiB, more than this machine's memory$"):
        build_decoder(config.model, 100)
    small = resolve([TINY])
    assert isinstance(small, GPTRunConfig)
    weights = [param.numel() for param in build_decoder(small.model, 100).parameters() if param.ndim == 2]
    assert small.model.parameters(100) == sum(weights)


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = resolve([TINY, given("my.toml", {"data.folder": "~/data"})])
    assert config.data.folder == "/home/somebody/data"


def test_an_unknown_preset_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="unknown preset 'asgo-gpt'; did you mean"):
        preset_layer("gpt", "asgo-gpt")


def test_differences_leave_out_what_may_change() -> None:
    saved = resolve([TINY])
    asked = resolve([TINY, assignment_layer(["runtime.compile=true", "data.folder='x'", "checkpoint.keep=9"])])
    assert differences(saved, asked) == []
    asked = resolve([TINY, given("--optimizer", {"optimizer.name": "asgo"})])
    assert "optimizer.name is accasro in the run, asgo now" in differences(saved, asked)


def test_presets_are_complete_without_any_other_setting() -> None:
    for name in preset_names("gpt"):
        assert isinstance(resolve([preset_layer("gpt", name)]), RunConfig)
        assert read_preset(name)["task"] == "gpt"


def test_a_model_in_shares_has_no_loss_scale() -> None:
    """A problem of two keys of different tables is told without a key before it."""
    layer = Layer("--set", {"runtime.shard_model": True, "training.precision": "fp16"})
    with pytest.raises(UsageError, match=r"^configuration: training\.precision=fp16 does not work with"):
        resolve([preset_layer("gpt", "tiny"), layer])
