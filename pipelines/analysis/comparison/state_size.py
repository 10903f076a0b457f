"""How large an optimizer's state is, from the header of its file alone."""

from __future__ import annotations

from pathlib import Path

from pipelines.storage import parse_json
from pipelines.training.run_folder import checkpoint_folders


def optimizer_state_bytes(checkpoints: Path) -> int | None:
    """Bytes of the optimizer's tensors in the newest checkpoint; None where there is none, or it is damaged.

    A safetensors file is the header's length (8 bytes, little-endian), the header in JSON, and the tensors.
    """
    try:
        folders = checkpoint_folders(checkpoints)
        if not folders:
            return None
        path = folders[-1] / "optimizer.safetensors"
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, size)))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    tensors = size - 8 - length
    return tensors if max(ends, default=0) == tensors else None
