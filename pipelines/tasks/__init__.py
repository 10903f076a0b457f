"""What the program can train. Each task is described in one file here, which everything else asks.

Importing this package imports neither torch nor pydantic: the functions of a description import what they need when
they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.tasks.description import TaskDescription
from pipelines.tasks.gpt import GPT
from pipelines.tasks.images import IMAGES

if TYPE_CHECKING:
    from pipelines.config import RunConfig

TASKS = {task.name: task for task in (GPT, IMAGES)}
"""By the name that a configuration has in `task`."""


def task_of(config: RunConfig) -> TaskDescription:
    """The description of the task that a configuration trains."""
    return TASKS[config.task]
