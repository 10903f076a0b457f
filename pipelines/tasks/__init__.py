"""The tasks that the program can train. One file describes each; the rest of the program reads its description.

Importing this package imports neither torch nor pydantic: the functions of a description import what they need when
they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.tasks.description import TaskDescription
from pipelines.tasks.gpt import GPT
from pipelines.tasks.images import IMAGENET, IMAGES

if TYPE_CHECKING:
    from pipelines.config import RunConfig

TASKS = {task.name: task for task in (GPT, IMAGES)}
"""Descriptions by the value of `task` in a configuration."""

COMMANDS = (GPT, IMAGES, IMAGENET)
"""Descriptions of the subcommands of `asgo train`; two of them train the same task."""


def task_of(config: RunConfig) -> TaskDescription:
    """Return the description of a configuration's task."""
    return TASKS[config.task]
