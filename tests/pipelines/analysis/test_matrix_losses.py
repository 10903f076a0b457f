"""Losses on matrix problems against runs that are written here in numpy."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from models.matrix_problems import PROBLEMS
from optim import OPTIMIZER_NAMES
from pipelines.analysis.descent import first_for_good
from pipelines.analysis.matrix_figure import write_losses
from pipelines.analysis.matrix_losses import run_losses
from pipelines.analysis.optimizer_settings import MATRICES, default_settings, parse_settings
from pipelines.resolve import read_preset
from tests.optim.cases import PUBLISHED


def reference_adam(name: str, lr: float, steps: int, seed: int) -> list[float]:
    instance = PROBLEMS[name].make(seed)
    places = [start.numpy().copy() for start in instance.start]
    first = [np.zeros_like(place) for place in places]
    second = [np.zeros_like(place) for place in places]
    losses = []
    for t in range(1, steps + 2):
        tensors = [torch.from_numpy(place).requires_grad_() for place in places]
        loss = instance.loss(tensors)
        losses.append(loss.item())
        for i, gradient in enumerate(torch.autograd.grad(loss, tensors)):
            g = gradient.numpy()
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            places[i] = places[i] - lr * (first[i] / (1 - 0.9**t)) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
    return losses


@pytest.mark.parametrize("name", PROBLEMS)
def test_adams_losses_agree_with_an_independent_run(name: str) -> None:
    # Beside others, whose steps must not touch it.
    settings = [parse_settings(text, MATRICES) for text in ("muon", "adam:lr=0.05", "adam:lr=0.1", "sgd-momentum")]
    runs = run_losses(PROBLEMS[name], settings, steps=40, seed=1)
    for run, lr in ((runs[1], 0.05), (runs[2], 0.1)):
        assert run.values == pytest.approx(reference_adam(name, lr, 40, seed=1), rel=1e-9)


def test_asgos_losses_agree_with_an_independent_run() -> None:
    instance = PROBLEMS["kronecker_quadratic"].make(0)
    place = instance.start[0].numpy().copy()
    momentum, factor = np.zeros((24, 40)), np.zeros((24, 24))
    expected = []
    for _ in range(21):
        tensor = torch.from_numpy(place).requires_grad_()
        loss = instance.loss([tensor])
        expected.append(loss.item())
        g = torch.autograd.grad(loss, tensor)[0].numpy()
        momentum = 0.9 * momentum + 0.1 * g
        factor = 0.8 * factor + 0.2 * g @ g.T
        eigenvalues, vectors = np.linalg.eigh(factor)
        update = vectors / np.sqrt(eigenvalues) @ vectors.T @ momentum
        place = place - 0.05 * update * 0.2 * np.sqrt(24 * 40) / np.linalg.norm(update)
    setting = parse_settings("asgo:lr=0.05,root_method=eigh", MATRICES)
    (run,) = run_losses(PROBLEMS["kronecker_quadratic"], [setting], steps=20)
    assert run.values == pytest.approx(expected, rel=1e-5)


def test_weight_decay_is_0_unless_given() -> None:
    for name in OPTIMIZER_NAMES:
        settings = parse_settings(name, MATRICES)
        if name in ("asgo", "dasgo", "muon", "shampoo", "adamw"):
            assert settings.keywords["weight_decay"] == 0
        else:
            assert "weight_decay" not in settings.keywords  # these have none by themselves
    given = parse_settings("muon:weight_decay=0.1", MATRICES)
    assert given.keywords["weight_decay"] == 0.1
    assert given.label.endswith("weight_decay 0.1")


def test_every_optimizer_of_the_preset_lowers_the_loss_by_its_name_alone() -> None:
    names = list(read_preset(MATRICES)["optimizers"])
    assert set(names) >= set(PUBLISHED)
    settings = [parse_settings(name, MATRICES) for name in names]
    for problem in PROBLEMS.values():
        for run in run_losses(problem, settings, steps=60):
            assert run.values[-1] < 0.7 * run.values[0], run.settings.label


def test_a_divergence_ends_a_run_and_leaves_the_others_alone() -> None:
    settings = [parse_settings(text, MATRICES) for text in ("sgd-momentum:lr=100", "asgo")]
    diverged, other = run_losses(PROBLEMS["matrix_factorization"], settings, steps=60)
    assert diverged.diverged_at == len(diverged.values)
    assert diverged.diverged_at < 60
    assert np.isfinite(diverged.values).all()
    assert diverged.steps_to_reach is None
    (alone,) = run_losses(PROBLEMS["matrix_factorization"], settings[1:], steps=60)
    assert other.values == pytest.approx(alone.values, rel=1e-6)


def test_for_good_counts_from_the_last_miss() -> None:
    assert first_for_good(np.array([False, True, False, True, True])) == 3
    assert first_for_good(np.array([True, True])) == 0
    assert first_for_good(np.array([True, False])) is None


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_a_figure_shows_every_run_and_problem(tmp_path: Path, suffix: str) -> None:
    settings = default_settings(MATRICES)[3:]
    panels = [run_losses(problem, settings, steps=5) for problem in PROBLEMS.values()]
    path = tmp_path / f"a{suffix}"
    write_losses(panels, path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")
    if suffix == ".svg":
        texts = re.findall(r">([^<]+)</(?:text|tspan)>", path.read_text(encoding="utf-8"))
        assert {setting.label for setting in settings} | {problem.title for problem in PROBLEMS.values()} <= set(texts)
