"""Native kernels, a compiled graph and pieces of a CPU's cache take the steps that the plain functions take."""

from __future__ import annotations

import platform
import shutil
import warnings

import numpy as np
import pytest
import torch

from optim import DASGO, AccAsro, Asro, dasgo, elementwise, native, rows
from tests.long import sampled

from .cases import DESCRIPTIONS, Description, noise, parameter, relative_error, set_gradient, start

BY_NAME = {case.name: case for case in DESCRIPTIONS}
SHAPES = [(260, 130), (130, 7), (5, 1), (3, 16, 3, 3)]
"""Above `native.WORTH_FROM` in all; sizes that no vector width divides; a single column; a convolution."""

needs_compiler = pytest.mark.skipif(not native.is_available(), reason="needs a C compiler")
every_fast = pytest.mark.parametrize("name", ["Asro", "AccAsro", "DASGO"])


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without a C compiler."""
    monkeypatch.setenv("CC", "no-such-compiler")
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()


def trained(case: Description, steps: int = 12, **keywords) -> list[torch.Tensor]:
    """Float32 parameters after steps with gradients that also hold zeros, as embeddings have them."""
    params = [parameter(start(shape), torch.float32) for shape in SHAPES]
    optimizer = case.build(params, weight_decay=0.1, **keywords)
    for step in range(steps):
        for index, param in enumerate(params):
            gradient = noise(tuple(param.shape), 1, seed=100 * step + index)[0]
            set_gradient(param, np.where(np.abs(gradient) < 0.3, 0.0, gradient))
        optimizer.step()
    return [param.detach() for param in params]


@needs_compiler
@every_fast
def test_native_kernels_are_used_for_large_parameters(name, monkeypatch):
    called, call = [], native._call
    monkeypatch.setattr(native, "_call", lambda kernel, *others: called.append(kernel) or call(kernel, *others))
    case = BY_NAME[name]
    small = parameter(start((3, 4)), torch.float32)
    set_gradient(small, noise((3, 4), 1)[0])
    case.build([small]).step()
    assert not called
    trained(case, steps=1)
    assert called


@every_fast
def test_the_path_without_a_compiler_follows_the_reference(name, no_compiler):
    assert_each_follows(BY_NAME[name])


@needs_compiler
@every_fast
def test_native_kernels_follow_the_reference(name):
    assert_each_follows(BY_NAME[name])


def assert_each_follows(case: Description) -> None:
    references = [case.refer(start(shape).astype(np.float32), weight_decay=0.1) for shape in SHAPES]
    for step in range(12):
        for index, refer in enumerate(references):
            gradient = noise(tuple(refer.shape), 1, seed=100 * step + index)[0]
            refer.step(np.where(np.abs(gradient) < 0.3, 0.0, gradient).astype(np.float32))
    for mine, refer in zip(trained(case), references, strict=True):
        # Twelve steps of a dozen roundings of 6e-8, none of which is made larger: 9e-6.
        assert relative_error(mine, refer.parameter) < 2e-5


@needs_compiler
@pytest.mark.parametrize("name", ["Asro", "AccAsro"])
def test_native_results_do_not_depend_on_the_number_of_threads(name):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(trained(BY_NAME[name]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(results[0], other, strict=True))


@needs_compiler
def test_chunks_that_fit_in_the_cache_change_nothing(no_compiler, monkeypatch):
    whole = trained(BY_NAME["AccAsro"])
    monkeypatch.setattr(rows, "CHUNK", 100)
    torch.testing.assert_close(trained(BY_NAME["AccAsro"]), whole, rtol=0, atol=0)


@pytest.mark.parametrize("reason", ["does not compile", "does not load"])
def test_a_compiler_that_does_not_work_is_no_obstacle(reason, monkeypatch, tmp_path):
    fake = tmp_path / "fake-cc"
    # Either fails, or leaves a file that is no library where it was told to.
    fake.write_text(
        "#!/bin/sh\nexit 1\n"
        if reason == "does not compile"
        else '#!/bin/sh\nfor a; do last=$p; p=$a; done; echo x > "$last"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    native._loaded.cache_clear()
    try:
        assert not native.is_available()
        assert_each_follows(BY_NAME["AccAsro"])
    finally:
        native._loaded.cache_clear()


@needs_compiler
@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("compiler", [True, False])
def test_dasgo_takes_gradients_whose_squares_leave_float32(scale, compiler, request):
    if not compiler:
        request.getfixturevalue("no_compiler")
    shape = (260, 130)
    param, refer = parameter(np.zeros(shape), torch.float32), BY_NAME["DASGO"].refer(np.zeros(shape))
    optimizer = DASGO([param], lr=0.1)
    for gradient in noise(shape, 5):
        scaled = (scale * gradient).astype(np.float32)
        set_gradient(param, scaled)
        optimizer.step()
        refer.step(scaled)
    assert relative_error(param, refer.parameter) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dasgo_in_stacks_takes_the_steps_of_one_matrix_after_another(dtype, monkeypatch):
    """As on a GPU, with at most two matrices of (24, 40) in a stack."""
    shapes = [(24, 40), (7, 5), (24, 40), (40, 24), (16, 3, 3, 3), (24, 40), (24, 120), (16, 3, 3, 3), (1, 5), (7, 5)]
    monkeypatch.setattr(dasgo, "can_be_read", lambda tensor: False)
    monkeypatch.setattr(dasgo, "_STACK", 2 * 24 * 40)
    monkeypatch.setattr(native, "is_available", lambda: False)
    stepped = {}
    for most in (0, 24 * 40):
        monkeypatch.setattr(dasgo, "STACKED", most)
        params = [parameter(start(shape), dtype) for shape in shapes]
        optimizer = DASGO(params, lr=0.1)
        for step in range(4):
            for index, param in enumerate(params):
                set_gradient(param, noise(tuple(param.shape), 1, seed=100 * step + index)[0])
            optimizer.step()
        stepped[most] = params
    for one, other in zip(*stepped.values(), strict=True):
        # Norms are summed in another order in float64, which may round a factor to the next float32.
        torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("optimizer", "expected"), [(Asro, 12), (AccAsro, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_bytes_a_parameter(optimizer, expected, dtype):
    param = parameter(start((64, 33)), dtype)
    case = BY_NAME[optimizer.__name__]
    built = case.build([param])
    set_gradient(param, noise((64, 33), 1)[0])
    built.step()
    state = built.state[param]
    size = sum(tensor.numel() * tensor.element_size() for key, tensor in state.items() if key != "step")
    assert size == expected * param.numel()


class TestCompiledGraph:
    """What a GPU runs, compiled for the CPU here."""

    @pytest.fixture(autouse=True)
    def as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(
            elementwise.ElementwiseOptimizer,
            "_run",
            lambda self, rows, scalars: (
                elementwise.run_compiled(type(self).update, rows, scalars) or pytest.fail("not compiled")
            ),
        )

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
    @pytest.mark.skipif(
        (platform.machine(), torch.backends.cpu.get_cpu_capability()) == ("x86_64", "DEFAULT"),
        reason="what torch.compile writes for this update does not compile for a CPU without AVX2",
    )
    @pytest.mark.parametrize("name", sampled(["Asro", "AccAsro"], "AccAsro"))
    def test_follows_the_reference_without_recompiling(self, name):
        """Neither a step nor a new learning rate is a constant of the graph."""
        import torch._dynamo

        torch._dynamo.reset()
        elementwise._graphs.clear()
        case = BY_NAME[name]
        params = [parameter(start(shape), torch.float32) for shape in SHAPES[1:]]
        references = [case.refer(param.detach().numpy()) for param in params]
        optimizer = case.build(params)
        for step in range(8):
            optimizer.param_groups[0]["lr"] = lr = 0.1 / (step + 1)
            for index, (param, refer) in enumerate(zip(params, references, strict=True)):
                gradient = noise(tuple(param.shape), 1, seed=100 * step + index)[0].astype(np.float32)
                set_gradient(param, gradient)
                refer.lr = lr
                refer.step(gradient)
            with torch._dynamo.config.patch(error_on_recompile=True):
                optimizer.step()
        for param, refer in zip(params, references, strict=True):
            assert relative_error(param, refer.parameter) < 2e-5

    def test_a_graph_that_does_not_compile_is_said_once_and_goes_without(self, monkeypatch):
        from torch._dynamo.exc import Unsupported

        def broken(*_):
            raise Unsupported("no compiler on this machine", None, "test")

        monkeypatch.undo()
        monkeypatch.setattr(elementwise, "_compile", lambda update: broken)
        monkeypatch.setattr(elementwise, "_graphs", {})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = [elementwise.run_compiled(Asro.update, [[torch.ones(2)] * 2], {}) for _ in range(3)]
        assert results == [False] * 3
        assert len(caught) == 1
        assert "not compiled" in str(caught[0].message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Asro", "AccAsro"])
def test_rows_joined_for_a_gpu_are_stepped_as_they_are_one_by_one(name, dtype, monkeypatch):
    """Bit for bit: each element has its own update. One row is too long to be joined, one is not contiguous."""

    def run(self, given, scalars):
        for group in rows.joined(given):
            with group as row:
                joined_lengths.append(row[0].numel())
                rows.update_rows(type(self).update, [row], scalars)

    def stepped() -> list[torch.Tensor]:
        params = [parameter(start(shape), dtype) for shape in [*SHAPES, (7, 5)]]
        params[3].data = params[3].data.to(memory_format=torch.channels_last)
        optimizer = BY_NAME[name].build(params)
        for step in range(4):
            for index, param in enumerate(params):
                set_gradient(param, noise(tuple(param.shape), 1, seed=10 * step + index)[0])
            optimizer.step()
        return params

    joined_lengths: list[int] = []
    native.use(False)
    try:
        expected = stepped()
        monkeypatch.setattr(rows, "JOINED", 1000)
        monkeypatch.setattr(elementwise.ElementwiseOptimizer, "_run", run)
        found = stepped()
    finally:
        native.use(True)
    assert joined_lengths[:3] == [260 * 130, 130 * 7 + 5, 3 * 16 * 9 + 35]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
