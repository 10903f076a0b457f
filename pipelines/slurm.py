"""Submit runs to Slurm: options, script, and the jobs that wait or run. Only Slurm's own commands are used.

Slurm's queue is the only record of what waits or runs. A job is recognized by the path of its script, which exists with
the list of its runs before `sbatch` is called: a kill between the two never leads to a second job for a run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError

from pipelines.errors import AsgoError, UsageError
from pipelines.locking import try_lock
from pipelines.shell import command
from pipelines.storage import write_atomically

FOLDER = "slurm"
"""Folder of scripts, logs and the list of submissions. No run has this name: the names of runs end with a seed."""
MOST_TASKS = 1000
"""Tasks of one array: Slurm's default for the highest index."""

_DEFAULT = "default"
_FLAGS = ("contiguous", "exclusive", "hold", "oversubscribe", "spread-job")
_SHORT = {"gpus": "gpus-per-node", "cpus": "cpus-per-task"}
_OURS = (
    *("array", "chdir", "error", "input", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable"),
    *("requeue", "test-only", "wait", "wrap"),
)
_KEY = re.compile(r"[a-z][a-z0-9-]*")
_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_QUEUED = re.compile(r"(?P<id>[0-9]+(?P<suffix>(_[0-9]+)?))\|(?P<state>[^|]*)\|(?P<reason>[^|]*)\|(?P<path>.*)")
_LOG_TAIL = 64 * 1024


@dataclass(frozen=True)
class Request:
    """The value of `--slurm`."""

    options: Mapping[str, str | None]
    """Options of `sbatch`; None for one without a value."""
    jobs: int | None = None
    """Number of jobs at once."""

    @property
    def nodes(self) -> int:
        """Machines of one job."""
        return _number(self.options, "nodes") or 1

    @property
    def gpus(self) -> int | None:
        """GPUs on each machine; None if not given."""
        return _number(self.options, "gpus-per-node")

    @property
    def cpus(self) -> int | None:
        """Cores on each machine; None if not given."""
        return _number(self.options, "cpus-per-task")


def read_request(text: str) -> Request:
    """Parse `KEY=VALUE,...`. Raises `UsageError` with one line for each problem.

    A part without `=` belongs to the value before it, as in `exclude=n1,n2`, unless it is an option without a value.
    """
    pairs: list[list[str | None]] = []
    for part in [] if text.strip() in ("", _DEFAULT) else text.split(","):
        key, equals, value = part.strip().partition("=")
        if equals or key in _FLAGS or not pairs or pairs[-1][1] is None:
            pairs.append([key, value if equals else None])
        else:
            pairs[-1][1] = f"{pairs[-1][1]},{part}"
    problems = [problem for key, value in pairs for problem in [_problem(str(key), value)] if problem]
    keys = [str(key) for key, _ in pairs]
    problems += [f"{key}: given twice" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if problems:
        raise UsageError("\n".join(f"--slurm {line}" for line in problems))
    given = {str(key): value for key, value in pairs}
    jobs = given.pop("jobs", None)
    return Request({_SHORT.get(key, key): value for key, value in given.items()}, None if jobs is None else int(jobs))


def _problem(key: str, value: str | None) -> str | None:
    """Return what is wrong with an option; None if it can be given to `sbatch`."""
    if not _KEY.fullmatch(key):
        return f"{key!r}: write KEY=VALUE with commas, such as partition=gpu,time=4:00:00,gpus=1"
    if key in _OURS:
        return f"{key}: asgo sets it"
    if key in _SHORT.values():
        return f"{key}: write {next(short for short, long in _SHORT.items() if long == key)}=N"
    if value is None:
        return None if key in _FLAGS else f"{key}: needs a value, as in {key}=VALUE"
    if not value or not _fits_script(value):
        return f"{key}={value!r}: must be printable, without quotes and backslashes"
    if key in ("cpus", "jobs", "nodes") and not (value.isdecimal() and int(value) > 0):
        return f"{key}={value}: must be a whole number above 0"
    if key == "gpus" and not re.fullmatch(r"([\w.-]+:)?[1-9][0-9]*", value):
        return f"gpus={value}: must be the number of GPUs per machine, as in gpus=2 or gpus=a100:2"
    return None


def _fits_script(text: str) -> bool:
    """Whether sbatch reads the text back from a script, within single quotes."""
    return text.isprintable() and not set(text) & set("'\"\\")


def _number(options: Mapping[str, str | None], key: str) -> int | None:
    value = options.get(key)
    return None if value is None else int(value.rpartition(":")[2])


@dataclass(frozen=True)
class Program:
    """What a job executes."""

    words: Sequence[str]
    """The command, before its `arguments`."""
    arguments: str
    """Arguments, quoted for a shell; may contain $folder and $run."""
    environment: Mapping[str, str]
    results: str = "$folder"
    """Folder in which checkpoints appear, for a shell."""


def make_script(request: Request, program: Program, folder: Path, runs: Sequence[str] | None) -> str:
    """Return the script of a job, or of an array with a task for each of `runs`.

    The job resumes after preemption, and after its time limit, for which it is asked to stop 120 s before. It does not
    after a failure, after `scancel`, or after five attempts without a new checkpoint.
    """
    logs = _logs(folder)
    log = f"{str(logs).replace('%', '%%')}/{'%j' if runs is None else '%A_%a'}.out"
    if not _fits_script(log):
        raise UsageError(
            f"{folder}: sbatch cannot write there: it reads no quotes and backslashes; choose another --out"
        )
    options: dict[str, str | None] = {
        "job-name": folder.resolve().name,
        "output": log,
        "open-mode": "append",
        "requeue": None,
    }
    options |= {"ntasks-per-node": "1", "signal": "TERM@120", **request.options}
    if runs is not None:
        limit = "" if request.jobs is None else f"%{request.jobs}"
        options["array"] = f"0-{len(runs) - 1}{limit}"
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{key}" + ("" if value is None else f"={command(value)}") for key, value in options.items()]
    lines += ["", f"cd {command(Path.cwd())} || exit 1", f"folder={command(folder.resolve())}"]
    lines += [f"export {name}={command(value)}" for name, value in program.environment.items()]
    if runs is None:
        lines += ["job=$SLURM_JOB_ID"]
    else:
        lines += [f"runs=({command(*runs)})", 'run="${runs[SLURM_ARRAY_TASK_ID]}"']
        lines += ['job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"']
    return "\n".join([*lines, _BODY.format(results=program.results, start=_start(request, program))])


_BODY = """
# An attempt counts until there is a checkpoint that is newer than its start.
attempts="$folder/slurm/$job.attempts"
progressed() {{ [ -n "$(find "{results}" -name 'step-*' -newer "$attempts" -print -quit 2>/dev/null)" ]; }}
if progressed; then : > "$attempts"; fi
echo "attempt of job $job on $(hostname)" | tee -a "$attempts"

# Slurm sends SIGTERM to the step, before the time limit and on preemption; this shell only has to outlive it.
trap 'signaled=1' TERM
{start} &
step=$!
signaled=1
while [ "$signaled" ]; do  # a signal interrupts `wait`
    signaled=
    wait "$step"
    code=$?
done

# 75: interrupted, and saved. 143: ended by SIGTERM before training began. A cancelled or preempted job is not running.
if [ "$code" -eq 75 ] || [ "$code" -eq 143 ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    if progressed || [ "$(wc -l < "$attempts")" -lt 5 ]; then
        scontrol requeue "$job"
    else
        echo "error: five attempts without a new checkpoint: give the jobs more time"
    fi
fi
exit "$code"
"""


def _start(request: Request, program: Program) -> str:
    """Return the shell command that starts the program, once on every machine of the job."""
    cpus = [] if request.cpus is None else [f"--cpus-per-task={request.cpus}"]  # srun does not take it from the job
    srun = ["srun", "--export=ALL", *cpus]
    if request.nodes == 1:
        return f"{command(*srun, *program.words)} {program.arguments}"
    place = 'exec "$@" --nodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rendezvous "$RENDEZVOUS"'
    return (
        f'export RENDEZVOUS="$(hostname):$((20000 + SLURM_JOB_ID % 20000))"  # this shell runs on machine 0\n'
        f"{command(*srun, 'bash', '-c', place, 'asgo', *program.words)} {program.arguments}"
    )


_JobId = Annotated[str, StringConstraints(pattern=r"^[0-9]+$")]


class _Submission(BaseModel):
    """A call of `sbatch`."""

    script: str
    runs: list[str]
    is_array: bool
    job: _JobId | None = None
    """None if the call ended before its answer was recorded."""


@dataclass(frozen=True)
class Job:
    """The newest job of a run."""

    id: str
    state: str | None
    """Slurm's word, such as PENDING; None if the job has ended."""
    reason: str
    log: Path

    def error(self) -> str | None:
        """Return the last error in its log; None if there is none."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _LOG_TAIL))
                lines = file.read(_LOG_TAIL).decode(errors="replace").splitlines()
        except OSError:
            return None
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)


class Submissions:
    """The jobs of a folder. Use it as a context manager, which holds the folder's lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = _logs(folder)
        self._out = folder
        self._path = self._folder / "jobs.json"
        self._submissions = self._read()
        self._lock = -1

    def __enter__(self) -> Submissions:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        if not try_lock(self._lock):
            os.close(self._lock)
            raise UsageError(f"{self._out}: another command submits here; wait for it")
        self._submissions = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def newest(self) -> dict[str, Job]:
        """Return the newest job of every run that was ever submitted, with its state in Slurm's queue."""
        queued = self._queued()
        jobs: dict[str, Job] = {}
        for submission in self._submissions:
            for index, run in enumerate(submission.runs):
                suffix = f"_{index}" if submission.is_array else ""
                job = f"{submission.job}{suffix}"
                found = queued.get((str(self._folder / submission.script), suffix))
                if found is not None:
                    jobs[run] = Job(*found, self._folder / f"{found[0]}.out")
                elif submission.job is not None and (run not in jobs or jobs[run].state is None):
                    jobs[run] = Job(job, None, "", self._folder / f"{job}.out")
        return jobs

    def submit(self, runs: Sequence[str], script: str, *, is_array: bool) -> str:
        """Submit a script; returns the number of the job. Raises `AsgoError` with sbatch's words if it refuses."""
        name = f"{len(self._submissions) + 1}.sh"
        path = self._folder / name
        self._record([*self._submissions, _Submission(script=name, runs=list(runs), is_array=is_array)])
        write_atomically(path, script.encode())
        job = _answer(sbatch_words(path), _overriding(script)).partition(";")[0]
        self._submissions[-1].job = job
        self._record(self._submissions)
        return job

    def next_script(self) -> Path:
        """Return the path of the script that the next call of `submit` writes."""
        return self._folder / f"{len(self._submissions) + 1}.sh"

    def _queued(self) -> dict[tuple[str, str], tuple[str, str, str]]:
        """Return id, state and reason of this user's jobs in the queue, by script and suffix of the id in an array."""
        words = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%r|%o"]
        matches = filter(None, map(_QUEUED.fullmatch, _answer(words).splitlines()))
        return {(each["path"], each["suffix"]): (each["id"], each["state"], each["reason"]) for each in matches}

    def _read(self) -> list[_Submission]:
        if not self._path.is_file():
            return []
        try:
            return TypeAdapter(list[_Submission]).validate_json(self._path.read_bytes())
        except ValidationError:
            raise AsgoError(f"{self._path}: not a list of jobs that asgo wrote; choose another --out") from None

    def _record(self, submissions: list[_Submission]) -> None:
        write_atomically(self._path, TypeAdapter(list[_Submission]).dump_json(submissions, indent=1))
        self._submissions = submissions


def sbatch_words(script: Path) -> list[str]:
    """Return the command that submits a script."""
    return ["sbatch", "--parsable", str(script)]


def _logs(folder: Path) -> Path:
    return folder.resolve() / FOLDER


def _overriding(script: str) -> set[str]:
    """Return the environment variables that sbatch prefers to the options in a script, such as `SBATCH_PARTITION`."""
    names = {"array": "array-inx", "mem": "mem-per-node", "time": "timelimit"}  # others have the name of the option
    keys = {*_OURS, *re.findall(r"^#SBATCH --([a-z0-9-]+)", script, re.MULTILINE)}
    return {f"SBATCH_{names.get(key, key).upper().replace('-', '_')}" for key in keys}


def _answer(words: Sequence[str], left_out: Collection[str] = ()) -> str:
    """Return what one of Slurm's commands prints; `left_out` are environment variables that it does not receive.

    Raises `AsgoError` if it fails, with its words in one line.
    """
    if shutil.which(words[0]) is None:
        raise AsgoError(f"--slurm: there is no {words[0]} here; give the command on a machine that submits to Slurm")
    environment = {name: value for name, value in _environment().items() if name not in left_out}
    answer = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if answer.returncode != 0:
        reason = "; ".join(line.strip() for line in answer.stderr.splitlines() if line.strip())
        raise AsgoError(reason or f"{words[0]}: exit code {answer.returncode}")
    return answer.stdout.strip()


def _environment() -> dict[str, str]:
    """Return the environment without what Slurm set for the job that this process may be part of."""
    dropped = ("SLURM_", "SLURMD_", "SRUN_", "SQUEUE_", *(_DEVICES if "SLURM_JOB_ID" in os.environ else ()))
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(dropped)}
