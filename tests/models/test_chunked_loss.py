"""The loss in chunks is the cross-entropy, with its gradient; on a GPU it keeps no float32 copy of the logits."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import chunked_loss
from models.chunked_loss import chunked_cross_entropy
from models.gpt import next_token_loss
from pipelines.config import GPTSettings
from pipelines.resolve import read_preset
from pipelines.training.gpt_task import build_decoder

VOCABULARY = 37


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_loss_and_gradient_are_those_of_the_cross_entropy(
    dtype: torch.dtype, off: float, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "_ELEMENTS_AT_ONCE", 5 * VOCABULARY)  # 24 rows: four whole chunks and four rows
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 12, VOCABULARY, generator=generator)).to(dtype)
    targets = torch.randint(VOCABULARY, (2, 12), generator=generator)
    targets[1, 3:9] = chunked_loss.IGNORED
    found: list[tuple[Tensor, Tensor]] = []
    for chunked in (False, True):
        own = logits.clone().requires_grad_()
        if chunked:
            loss = chunked_cross_entropy(own.flatten(0, 1), targets.flatten(), z_loss)
        else:
            loss = next_token_loss(own, targets, z_loss)
        (3 * loss).backward()
        assert own.grad is not None
        found.append((loss.detach(), own.grad))
    (loss, grad), (own_loss, own_grad) = found
    assert own_loss.dtype == torch.float32
    assert own_grad.dtype == dtype
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.linalg.vector_norm(own_grad - grad) <= off * torch.linalg.vector_norm(grad)


class Memory(TorchDispatchMode):
    """Bytes of all storages that operations make, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.operations: Counter[str] = Counter()
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def test_a_micro_batch_of_the_asro_papers_model_takes_at_most_9_gb() -> None:
    """With two float32 copies of the logits, it was 17.9 GB."""
    settings = GPTSettings.model_validate(read_preset("asro-gpt")["model"])
    with FakeTensorMode():
        model = build_decoder(settings, 50_257)
        inputs, targets = (torch.empty(40, settings.context_length, dtype=torch.int64) for _ in range(2))
        with Memory() as memory:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(inputs)
            chunked_cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert logits.dtype == torch.bfloat16
    assert logits.nbytes == 40 * 512 * 50_259 * 2
    assert 2 * logits.nbytes < memory.peak <= 9e9


def test_on_a_gpu_the_loss_of_a_gpt_works_in_chunks() -> None:
    """The backward pass of fake CUDA tensors needs a GPU."""
    with FakeTensorMode(), torch.device("cuda"):
        logits = torch.empty(40, 512, 50_259, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(40, 512, dtype=torch.int64)
        with Memory() as memory:
            loss = next_token_loss(logits, targets, 1e-4)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert memory.peak <= logits.nbytes + 0.6e9


def test_compiled_the_loss_keeps_no_float32_copy_of_the_logits() -> None:
    logits = torch.randn(4, 16, VOCABULARY).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    compiled = torch.compile(next_token_loss, dynamic=False, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(logits, torch.zeros(4, 16, dtype=torch.int64)).backward()
    assert logits.grad is not None
    assert not [each for each in kept if each.numel() >= logits.numel() and each.dtype == torch.float32]
