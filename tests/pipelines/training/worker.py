"""One of several processes that train together: `python worker.py JOBS.json`, with torchrun's variables set.

A job is a configuration, its run folder, whether it resumes, its precision, and the port where its processes meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

from pipelines.config import load_run_config
from pipelines.errors import RunInterrupted
from pipelines.training.lineage import BranchPoint
from pipelines.training.train import train
from tests.pipelines.training.double_precision import double_precision


class Silent:
    """Shows nothing."""

    def begin(self, first_step: int, last_step: int) -> None: ...

    def trained(self, row: object) -> None: ...

    def validated(self, row: object) -> None: ...

    def hung(self, message: str) -> None: ...

    def note(self, message: str) -> None:
        """Lost."""


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(job["port"])
        precision = double_precision() if job["double"] else contextlib.nullcontext()
        try:
            with precision:
                branch = BranchPoint.parse(job["branch"]) if job["branch"] else None
                config = load_run_config(job["config"])
                train(config, Path(job["out"]), Silent(), resume=job["resume"], branch=branch)
        except RunInterrupted as interrupted:
            sys.exit(interrupted.exit_code)


if __name__ == "__main__":
    main()
