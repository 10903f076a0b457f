"""The kernels in C get bare pointers: only to what lies in memory as it looks, and whatever the machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from optim import native

from .cases import DESCRIPTIONS, noise, parameter, relative_error, set_gradient, start

BY_NAME = {case.name: case for case in DESCRIPTIONS}
SHAPE = (256, 256)  # above native.WORTH_FROM

needs_compiler = pytest.mark.skipif(not native.is_available(), reason="needs a C compiler")
every_native = pytest.mark.parametrize("name", ["Asro", "AccAsro", "DASGO"])
every_optimizer = pytest.mark.parametrize("name", list(BY_NAME))


class Wrapped(Tensor):
    """A tensor that has its numbers in another one, as subclasses for quantization or offloading do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        return tree_map(lambda x: Wrapped(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


def stepped(name: str, gradient: Tensor) -> Tensor:
    param = nn.Parameter(torch.ones(SHAPE))
    optimizer = BY_NAME[name].build([param])
    param.grad = gradient
    optimizer.step()
    return param.detach()


def gradient_of(seed: int = 0) -> Tensor:
    return torch.from_numpy(noise(SHAPE, 1, seed)[0].astype(np.float32))


@every_native
@pytest.mark.parametrize("compiler", [True, False])
def test_a_lazily_negated_gradient_is_read_with_its_sign(name, compiler):
    native.use(compiler)
    try:
        expected = stepped(name, -gradient_of())
        found = stepped(name, torch._neg_view(gradient_of()))
    finally:
        native.use(True)
    # Two kernels at most, whose few operations an element round otherwise.
    assert relative_error(found, expected.numpy()) < 1e-6


@every_optimizer
def test_fake_and_meta_tensors_take_steps(name):
    with FakeTensorMode():
        assert stepped(name, torch.ones(SHAPE)).shape == SHAPE
    with torch.device("meta"):
        assert stepped(name, torch.ones(SHAPE)).device.type == "meta"


@every_optimizer
def test_a_default_device_does_not_move_what_a_step_needs(name):
    param = parameter(start(SHAPE), torch.float32)
    optimizer = BY_NAME[name].build([param])
    param.grad = gradient_of()
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()
    assert {tensor.device.type for tensor in optimizer.state[param].values()} == {"cpu"}
    assert torch.isfinite(param).all()


@every_native
def test_a_subclass_is_stepped_by_its_own_operations(name):
    inner = torch.ones(SHAPE)
    param = nn.Parameter(Wrapped(inner))
    optimizer = BY_NAME[name].build([param])
    param.grad = Wrapped(gradient_of())
    optimizer.step()
    assert relative_error(inner, stepped(name, gradient_of()).numpy()) < 1e-6


def test_memory_that_was_freed_is_not_given_to_a_kernel():
    """As a storage that FSDP resized to zero."""
    tensor = torch.ones(SHAPE)
    assert native.is_bare(tensor)
    tensor.untyped_storage().resize_(0)
    assert not native.is_bare(tensor)


@every_optimizer
def test_autograd_notices_that_weights_changed(name):
    w1, w2 = (parameter(start(SHAPE), torch.float32) for _ in range(2))
    optimizer = BY_NAME[name].build([w1, w2])
    out = torch.tanh(torch.ones(4, SHAPE[0]) @ w1) @ w2
    out.square().mean().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.abs().mean().backward()


@pytest.mark.parametrize("name", list(BY_NAME))
def test_autograd_notices_that_weights_of_the_adam_rule_changed(name):
    if name in ("Asro", "AccAsro"):
        pytest.skip("has no Adam rule")
    bias = parameter(start((64,)), torch.float32)
    optimizer = BY_NAME[name].build([{"params": [bias], "rule": "adam"}])
    loss = bias.exp().mul(bias).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def change_shape(state: dict[str, Tensor]) -> None:
    state["exp_avg"] = torch.zeros(3, SHAPE[1])


def change_dtype(state: dict[str, Tensor]) -> None:
    state["exp_avg"] = state["exp_avg"].bfloat16()


def lose(state: dict[str, Tensor]) -> None:
    state["another"] = state.pop("exp_avg")


@every_optimizer
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (change_shape, r"is \(3, 256\), float32"),
        (change_dtype, r"is \(256, 256\), bfloat16"),
        (lose, "is missing"),
    ],
)
def test_a_state_that_does_not_fit_is_named(name, change, found):
    param = parameter(start(SHAPE), torch.float32)
    optimizer = BY_NAME[name].build([("weight", param)])
    param.grad = gradient_of()
    optimizer.step()
    before = param.detach().clone()
    change(optimizer.state[param])
    with pytest.raises(
        ValueError,
        match=rf"{name}: the state 'exp_avg' of parameter 'weight' of shape \(256, 256\) {found}; "
        r"it must be \(256, 256\), float32",
    ):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_sign_that_became_float32_is_still_a_sign():
    """As where code that adds rows to a state makes them with `torch.zeros`."""
    results = []
    for dtype in (torch.int8, torch.float32):
        param = parameter(start(SHAPE), torch.float32)
        optimizer = BY_NAME["AccAsro"].build([param])
        for step in range(4):
            set_gradient(param, noise(SHAPE, 1, seed=step)[0])
            optimizer.step()
            optimizer.state[param]["last_sign"] = optimizer.state[param]["last_sign"].to(dtype)
        results.append(param.detach().numpy())
    assert relative_error(torch.from_numpy(results[1]), results[0]) < 1e-5  # one by a kernel, one without


@pytest.fixture
def fresh():
    """Compiled anew, and again afterwards."""
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()


def steps_without_kernels(reason: str) -> None:
    assert not native.is_available()
    assert reason in native.description()
    assert torch.isfinite(stepped("AccAsro", gradient_of())).all()


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    steps_without_kernels("no C compiler 'no-such-compiler'")


@needs_compiler
def test_no_temporary_folder(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    steps_without_kernels("no temporary folder to compile in: No such file or directory")


def compiler_that(does: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("exit 1", "fails"),
        ('for a; do last=$p; p=$a; done; echo x > "$last"', "does not load"),  # as from a folder without execution
        ("read answer || exit 1; sleep 600", "fails"),  # whatever asks gets no answer
    ],
)
def test_a_compiler_that_does_not_work(does, reason, fresh, monkeypatch, tmp_path):
    compiler_that(does, tmp_path, monkeypatch)
    steps_without_kernels(reason)


def test_a_compiler_that_hangs_is_given_up_once(fresh, monkeypatch, tmp_path):
    compiler_that(f"echo >> {tmp_path}/tries; exec sleep 600", tmp_path, monkeypatch)
    monkeypatch.setattr(native, "_TIMEOUT_S", 3)
    steps_without_kernels("takes longer than 3 s")
    assert len((tmp_path / "tries").read_text().splitlines()) <= 1


@needs_compiler
def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(native, "_call", lambda *_: pytest.fail("a kernel ran"))
    native.use(False)
    try:
        assert "switched off" in native.description()
        stepped("AccAsro", gradient_of())
        stepped("DASGO", gradient_of())
    finally:
        native.use(True)
    assert native.description().startswith("C kernels (")


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_after_a_step_takes_steps():
    """OpenMP's threads do not survive `fork`: a kernel that waited for them would hang."""
    script = """if True:
        import os, torch
        from optim import AccAsro
        torch.set_num_threads(2)
        param = torch.nn.Parameter(torch.ones(256, 256))
        param.grad = torch.ones(256, 256)
        optimizer = AccAsro([param], lr=0.1, increment=0.1, decrement=0.1, max_scale=2, min_scale=0.1, total_steps=9)
        optimizer.step()
        child = os.fork()
        if not child:
            optimizer.step()
            os._exit(7)
        optimizer.step()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    # Its own group, so that a child that hangs ends with it.
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            pytest.fail("the forked process hangs")
    assert printed.strip() == "7"
