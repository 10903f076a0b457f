"""A sharded optimizer takes the unsharded one's steps, on any number of ranks, with a share of the state and work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from optim import OPTIMIZER_NAMES
from tests.long import sampled

from . import sharded_jobs as jobs
from .ranks import Ranks, ranks
from .sharded_model import Layout

LAYOUTS = [Layout(2), Layout(4), Layout(2, fsdp=True), Layout(3, fsdp=True)]
TWO_LAYOUTS = [Layout(4), Layout(3, fsdp=True)]
EVERY_KIND_OF_STATE = ["asgo", "dasgo", "muon", "shampoo", "asro", "accasro", "amsgrad", "adagrad", "sgd-momentum"]
OF_EACH_KIND = ["asgo", "accasro", "sgd-momentum"]

of_each_kind = pytest.mark.parametrize("name", OF_EACH_KIND)


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with ranks(4) as group:
        yield group


@pytest.mark.parametrize("name", sampled(OPTIMIZER_NAMES, *EVERY_KIND_OF_STATE))
def test_sharded_steps_are_the_unsharded_ones(four: Ranks, name):
    results = four.run(jobs.compare, LAYOUTS, name)
    for layout in LAYOUTS:
        of_ranks = [result[layout] for result in results[: layout.size]]
        assert max(result["weights"] for result in of_ranks) <= 1e-6, layout
        assert of_ranks[0]["state"] <= 1e-6, layout
        assert all(result["matrices are equal"] for result in of_ranks), layout
        assert all(result["digest"] == of_ranks[0]["digest"] for result in of_ranks), layout


@pytest.mark.parametrize("name", EVERY_KIND_OF_STATE)
def test_state_passes_between_sharded_and_unsharded(four: Ranks, name):
    for result in four.run(jobs.hand_over, TWO_LAYOUTS, name):
        for layout, figures in result.items():
            assert figures["loaded"] == 0.0, layout
            assert figures["weights"] <= 1e-6, layout


@of_each_kind
def test_training_resumes_bit_for_bit_on_as_many_ranks(four: Ranks, name):
    assert all(result == dict.fromkeys(result, 0.0) for result in four.run(jobs.resume, TWO_LAYOUTS, name))


@of_each_kind
def test_training_on_leaves_a_gathered_and_a_loaded_state_alone(four: Ranks, name):
    for result in four.run(jobs.keep_apart, TWO_LAYOUTS, name):
        assert all(figures == {"loaded": 0.0, "gathered": 0.0} for figures in result.values())


@pytest.mark.parametrize("name", [*OF_EACH_KIND, "adagrad"])
def test_the_state_before_the_first_step_is_the_unsharded_one(four: Ranks, name):
    for result in four.run(jobs.start_fresh, TWO_LAYOUTS, name):
        for figures in result.values():
            assert figures["state"] == 0.0
            assert figures["weights"] <= 1e-6


def test_a_rank_of_four_has_at_most_0_3_of_the_state_and_of_the_products(four: Ranks):
    layouts = [Layout(4), Layout(4, fsdp=True)]
    results = four.run(jobs.share_of_state_and_products, layouts)
    for layout in layouts:
        states, products = zip(*[result[layout] for result in results], strict=True)
        assert max(states) <= 0.3
        assert max(products) <= 0.3
        assert sum(products) == pytest.approx(1.0)


@of_each_kind
def test_parameters_without_gradients_are_skipped(four: Ranks, name):
    for result in four.run(jobs.skip, TWO_LAYOUTS, name):
        for figures in result.values():
            assert figures["weights"] <= 1e-6
            assert figures["never"] == 0.0
            assert figures["state"] is None or figures["state"] <= 1e-6


@of_each_kind
def test_weights_may_be_loaded_or_moved_after_wrapping(four: Ranks, name):
    assert all(
        figure <= 1e-6 for result in four.run(jobs.load_weights_late, TWO_LAYOUTS, name) for figure in result.values()
    )


@pytest.mark.parametrize("name", ["asgo", "accasro"])
def test_precisions_and_layouts_in_memory_may_be_mixed(four: Ranks, name):
    assert all(figure <= 1e-6 for result in four.run(jobs.mix, [Layout(4)], name) for figure in result.values())


@pytest.mark.parametrize("name", ["asgo", "adamw"])
def test_a_step_has_one_collective_a_parameter_group(four: Ranks, name):
    layouts = [Layout(2), Layout(4)]
    for result in four.run(jobs.collectives, layouts, name):
        for counts, groups in result.values():
            assert counts == {"all-gather of vectors": groups}
            assert groups <= 3


@pytest.mark.parametrize("name", ["asgo", "accasro"])
def test_real_training_with_closure_scheduler_and_scaler(four: Ranks, name):
    layouts = [Layout(2), Layout(2, fsdp=True)]
    assert all(figure <= 1e-5 for result in four.run(jobs.train_for_real, layouts, name) for figure in result.values())


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unknown class", "ValueError: LBFGS cannot be sharded; these can: asgo, "),
        ("no names", "ValueError: AdamW has parameters without names"),
        ("steps taken", "ValueError: ASGO has taken a step"),
        ("steps taken without a count", "ValueError: Muon has taken a step"),
        ("sharded by columns", "ValueError: parameter 'up.weight' of shape (40, 16) must be sharded by rows"),
        ("not sharded", "ValueError: parameter 'up.weight' of shape (40, 16) must be sharded by rows"),
        ("sparse gradient", "ValueError: ShardedOptimizer cannot use the sparse gradient of parameter 'embedding.we"),
        ("state_dict", "RuntimeError: no rank has the whole state of a ShardedOptimizer: use gather_state()"),
        ("load_state_dict", "RuntimeError: a ShardedOptimizer loads its pieces of a whole state: use load_state()"),
        ("another group", "RuntimeError: the parameters of a ShardedOptimizer already have owners"),
        ("unknown name", "ValueError: unknown parameter in the state: 'up.wieght'; did you mean 'up.weight'?"),
        ("state of another shape", "ValueError: the state 'exp_avg' of parameter 'embedding.weight' has shape"),
    ],
)
def test_wrong_use_is_refused_on_every_rank(four: Ranks, case, words):
    for message in four.run(jobs.refuse, case):
        assert message.startswith(words)
        assert "\n" not in message
