"""`--slurm` of `asgo train` and `asgo sweep`: submit what is missing, and show the states of all jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asgo_cli import console
from asgo_cli.export import export_command
from asgo_cli.launch import LAUNCH_FLAGS, Launch, own_path, without_options
from pipelines.errors import AsgoError, UsageError
from pipelines.shell import command

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.slurm import Job, Request
    from pipelines.sweeps.status import RunStatus

SlurmOption = Annotated[
    str | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="Submit to Slurm: partition, time, gpus, cpus, mem, nodes, jobs (how many at once), or any other option "
        "of sbatch; `default` for none.",
    ),
]


@dataclass(frozen=True)
class Task:
    """A run, or a worker of a search, that is one job."""

    name: str
    state: str
    """What its files say: new, partial or done."""
    step: str = ""


@dataclass(frozen=True)
class SlurmJobs:
    """What the user asks of Slurm."""

    request: Request
    launch: Launch
    """The processes of each job."""

    @classmethod
    def of(cls, text: str, launch: Launch) -> SlurmJobs:
        """Parse `--slurm`. The number of GPUs may be given there or with --gpus.

        Raises `UsageError` if the two differ, or if the options of the launcher contradict the request.
        """
        from pipelines.slurm import read_request

        request = read_request(text)
        if launch.nodes is not None or launch.node_rank is not None or launch.rendezvous is not None:
            raise UsageError("--nodes, --node-rank and --rendezvous: leave them out; write nodes=N in --slurm")
        if launch.gpus is not None and request.gpus not in (None, launch.gpus):
            raise UsageError(f"--gpus {launch.gpus}: --slurm asks for gpus={request.gpus}")
        if launch.gpus is not None and request.gpus is None and "gres" not in request.options:
            request = replace(request, options={**request.options, "gpus-per-node": str(launch.gpus)})
        if request.gpus is not None and not launch and (request.gpus > 1 or request.nodes > 1):
            launch = replace(launch, gpus=request.gpus)
        if request.nodes > 1 and not launch:
            raise UsageError(f"--slurm nodes={request.nodes}: write gpus=N too, or give --processes N")
        return cls(request, launch)

    def flags(self) -> list[str]:
        """Return the options of `asgo train` for the processes of a job."""
        if not self.launch:  # a node without a GPU that works is an error, not a slow run
            return [] if self.request.gpus is None else ["--device", "cuda"]
        given = {flag: getattr(self.launch, name) for name, flag in LAUNCH_FLAGS.items()}
        return [word for flag, value in given.items() if value for word in (flag, str(value))]

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a job. A user's OMP_NUM_THREADS stays."""
        if self.request.cpus is None or "OMP_NUM_THREADS" in os.environ:
            return own_path()
        return {**own_path(), "OMP_NUM_THREADS": str(max(1, self.request.cpus // self.launch.local_size))}


def submit_training(jobs: SlurmJobs, settings: RunConfig, folder: Path, dry_run: bool) -> None:
    """Submit the run of this command, unless it is done or in the queue."""
    from pipelines.sweeps.definition import SweepRun
    from pipelines.sweeps.status import check_data, run_status

    place = folder.resolve()
    run = SweepRun(place.name, place.name, settings)
    check_data([run])
    status = run_status(run, place.parent)
    dropped = ["--slurm", "--out", "--plot", *LAUNCH_FLAGS.values()]
    words = without_options(sys.argv[1:], *dropped, without_value=["--dry-run", "--resume"])
    flags = jobs.flags() if words == without_options(words, "--device") else []
    arguments = f'{command(*words, "--resume", *flags)} --out "$folder"'
    is_left = _submit(jobs, [_task(status)], folder, arguments, is_array=False, dry_run=dry_run)
    if not is_left:
        console.suggest_next(export_command(folder))


def submit_runs(jobs: SlurmJobs, plan: Sequence[RunStatus], folder: Path, dry_run: bool, as_json: bool) -> None:
    """Submit an array with a task for each run of a sweep that is neither done nor in the queue."""
    from pipelines.sweeps.queue import FOLDER, write_config
    from pipelines.sweeps.status import check_data

    check_data([status.run for status in plan])
    if not dry_run:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        for status in plan:
            write_config(status.run, folder / FOLDER)
    task = plan[0].run.config.task
    arguments = f'train {task} --config "$folder/{FOLDER}/$run.toml" --resume --out "$folder/$run"'
    arguments = " ".join([arguments, *jobs.flags()])
    tasks = [_task(status) for status in plan]
    is_left = _submit(jobs, tasks, folder, arguments, results="$folder/$run", dry_run=dry_run, as_json=as_json)
    if not is_left:
        console.suggest_next(export_command(folder), command("asgo", "compare", folder))


def submit_workers(jobs: SlurmJobs, left: int, folder: Path, dry_run: bool, as_json: bool) -> None:
    """Submit an array with a task for each worker of a search with `left` runs that have not ended."""
    from pipelines.sweeps.queue import workers

    if jobs.request.nodes > 1:
        raise UsageError("--slurm nodes: a worker of a search uses one machine; write jobs=N for N workers")
    console.say(f"{left} trials and final runs are left")
    words = without_options(sys.argv[1:], "--slurm", "--out", without_value=["--dry-run", "--json"])
    count = min(jobs.request.jobs or 1, left)
    tasks = [Task(str(number), "new") for number in sorted({*range(count), *workers(folder)})]
    arguments = f'{command(*words)} --out "$folder" --worker "$run"'
    _submit(jobs, tasks, folder, arguments, dry_run=dry_run, as_json=as_json)


def _task(status: RunStatus) -> Task:
    from pipelines.training.run_folder import RunFolder

    rows = RunFolder(status.folder).rows() if status.state == "partial" else []
    step = rows[-1]["step"] if rows else status.step
    return Task(status.run.name, status.state, f"{step:,} of {status.run.config.training.steps:,}")


def _submit(
    jobs: SlurmJobs,
    tasks: Sequence[Task],
    folder: Path,
    arguments: str,
    *,
    results: str = "$folder",
    is_array: bool = True,
    dry_run: bool,
    as_json: bool = False,
) -> bool:
    """Submit the tasks that are neither done nor in the queue, and show all states; return whether any is not done."""
    from pipelines import slurm

    program = slurm.Program([sys.executable, "-m", "asgo_cli"], arguments, jobs.environment(), results)

    def script(names: Sequence[str]) -> str:
        return slurm.make_script(jobs.request, program, folder, names if is_array else None)

    submissions = slurm.Submissions(folder)
    if dry_run:
        newest: dict[str, Job] = {}
        try:
            newest = submissions.newest()
        except AsgoError as error:  # the script can be printed anywhere
            console.warn(f"the queue is unknown: {error}")
        missing = _missing(tasks, newest)
        if missing:
            typer.echo(script(missing), nl=False)
            console.say(command(*slurm.sbatch_words(submissions.next_script())))
        console.say(f"{len(tasks)} in all, {len(missing)} to submit; dry run: nothing was written")
        return True
    with submissions:
        newest = submissions.newest()
        missing = _missing(tasks, newest)
        _report_failures(missing, newest)
        if missing:
            job = submissions.submit(missing, script(missing), is_array=is_array)
            console.say(f"job {job}: {len(missing)} submitted")
            newest = submissions.newest()
    _show(tasks, newest, as_json)
    is_left = any(task.state != "done" for task in tasks)
    if is_left:
        console.suggest_next(command("asgo", *sys.argv[1:]))
    return is_left


def _missing(tasks: Sequence[Task], newest: dict[str, Job]) -> list[str]:
    """Return the names of the tasks to submit, at most as many as fit in an array."""
    from pipelines.slurm import MOST_TASKS

    names = [task.name for task in tasks if task.state != "done"]
    return [name for name in names if name not in newest or newest[name].state is None][:MOST_TASKS]


def _report_failures(names: Sequence[str], newest: dict[str, Job]) -> None:
    for name in names:
        if name in newest and (error := newest[name].error()) is not None:
            console.warn(f"{name}: job {newest[name].id} failed: {error}; its log: {newest[name].log}")


def _show(tasks: Sequence[Task], newest: dict[str, Job], as_json: bool) -> None:
    jobs = [(task, newest.get(task.name)) for task in tasks]
    if as_json:
        rows = [{"name": task.name, "state": _state(task, job), "step": task.step, **_facts(job)} for task, job in jobs]
        console.show_json({"jobs": rows})
        return
    cells = [(task.name, _state(task, job), task.step, job.id if job else "") for task, job in jobs]
    console.show_table(("name", "state", "step", "job"), cells)
    log = next((job.log for _, job in jobs if job is not None and job.state == "RUNNING"), None)
    if log is not None:
        console.say(f"the log of a running job: {log}")


def _facts(job: Job | None) -> dict[str, str | None]:
    return {"job": job.id, "log": str(job.log)} if job else {"job": None, "log": None}


def _state(task: Task, job: Job | None) -> str:
    """Return the state of a task in a word or two."""
    if task.state == "done" or job is None:
        return task.state
    if job.state is None:
        return "stopped" if job.error() is None else "failed"
    reason = f": {job.reason}" if job.state == "PENDING" and job.reason != "None" else ""
    return f"{job.state.lower()}{reason}"
