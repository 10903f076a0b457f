"""The options of `--slurm`, the script, and the queue; the script runs in a real shell, with stand-ins for Slurm."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from pipelines.errors import AsgoError, UsageError
from pipelines.slurm import Program, Request, Submissions, make_script, read_request
from tests.fake_slurm import FakeSlurm, fake_slurm

__all__ = ["fake_slurm"]


def test_options_are_read() -> None:
    text = "partition=gpu,time=4:00:00,gpus=a100:2,cpus=16,nodes=3,jobs=8,exclude=n1,n[3,5],exclusive"
    request = read_request(text)
    assert request.options == {
        "partition": "gpu",
        "time": "4:00:00",
        "gpus-per-node": "a100:2",
        "cpus-per-task": "16",
        "nodes": "3",
        "exclude": "n1,n[3,5]",
        "exclusive": None,
    }
    assert (request.gpus, request.cpus, request.nodes, request.jobs) == (2, 16, 3, 8)
    assert read_request("default") == read_request("") == Request({})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("my.toml", "'my.toml': write KEY=VALUE"),
        ("time", "time: needs a value"),
        ("partition=", "must be printable"),
        ("partition=a\nb", "must be printable"),
        ("comment=it's", "must be printable"),
        ("Partition=a", "'Partition': write KEY=VALUE"),
        ("wrap=rm", "wrap: asgo sets it"),
        ("gpus-per-node=2", "write gpus=N"),
        ("gpus=0", "gpus=0: must be the number"),
        ("jobs=two", "jobs=two: must be a whole number"),
        ("time=1,time=2", "time: given twice"),
    ],
)
def test_a_wrong_option_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_request(text)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("--slurm ")
    assert words in line


def program(line: str) -> Program:
    return Program(["bash", "-c"], line, {"ONE": "it's"})


def test_odd_names_arrive_as_they_are(fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b$HOME#[1]"
    (folder / "slurm").mkdir(parents=True)
    monkeypatch.chdir(folder)
    script = make_script(
        read_request("jobs=2"), program('\'echo "$1|$2|$ONE|$PWD"\' - "$folder" "$run"'), folder, ["x", "y z"]
    )
    result = fake_slurm.execute(script, task=1)
    assert result.returncode == 0
    assert f"{folder}|y z|it's|{folder}" in result.stdout.splitlines()
    assert "#SBATCH --array='0-1%2'" in script or "#SBATCH --array=0-1%2" in script
    assert f"#SBATCH --output='{folder}/slurm/%A_%a.out'" in script


def test_a_folder_that_sbatch_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose another --out"):
        make_script(Request({}), program("true"), tmp_path / "it's", None)


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        *[(0, "RUNNING", False), (1, "RUNNING", False), (137, "RUNNING", False), (75, "RUNNING", True)],
        *[(143, "RUNNING", True), (75, "COMPLETING", False), (75, "", False)],
    ],
)
def test_only_an_interrupted_job_that_nobody_cancelled_is_requeued(
    code: int, state: str, requeued: bool, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    fake_slurm.states = state
    (tmp_path / "slurm").mkdir()
    result = fake_slurm.execute(make_script(Request({}), program(f"'exit {code}'"), tmp_path, ["a", "b"]), task=1)
    assert result.returncode == code
    assert fake_slurm.calls("scontrol") == (["requeue 7_1"] if requeued else [])


def test_a_job_without_an_array_is_requeued_under_its_own_number(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    fake_slurm.execute(make_script(Request({}), program("'exit 75'"), tmp_path, None), task=None)
    assert fake_slurm.calls("scontrol") == ["requeue 7"]


def test_attempts_without_a_checkpoint_end_after_the_fifth(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    idle = make_script(Request({}), program("'exit 75'"), tmp_path, None)
    saves = make_script(Request({}), program('\'mkdir -p "$0/run/step-$RANDOM"; exit 75\' "$folder"'), tmp_path, None)
    for script in [idle] * 4 + [saves] + [idle] * 5:
        result = fake_slurm.execute(script, task=None)
    assert len(fake_slurm.calls("scontrol")) == 9
    assert "error: five attempts without a new checkpoint" in result.stdout


def test_the_shell_outlives_the_signal_and_keeps_the_exit_code(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    line = "'trap \"sleep 0.3; exit 75\" TERM; kill -TERM $PPID; sleep 0.2; kill -TERM $PPID $$; sleep 9 & wait'"
    result = fake_slurm.execute(make_script(Request({}), program(line), tmp_path, None), task=None)
    assert result.returncode == 75
    assert fake_slurm.calls("scontrol") == ["requeue 7"]


def test_several_nodes_start_one_launcher_each(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    line = "'echo \"$@\"' - train"
    script = make_script(read_request("nodes=2,cpus=4"), program(line), tmp_path, None)
    result = fake_slurm.execute(script, task=None, SLURM_NNODES="2", SLURM_NODEID="1")
    assert f"train --nodes 2 --node-rank 1 --rendezvous {socket.gethostname()}:20007" in result.stdout
    assert fake_slurm.calls("srun")[0].startswith("--export=ALL --cpus-per-task=4 ")


def test_no_second_job_for_a_run_in_the_queue(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    with Submissions(tmp_path) as submissions:
        assert submissions.newest() == {}
        assert submissions.submit(["a", "b"], "#!/bin/bash\n", is_array=True) == "7"
    fake_slurm.queue = f"7_0|RUNNING|None|{tmp_path}/slurm/1.sh\n8|PENDING|Resources|/other\n9|RUNNING|None|(null)\n"
    (tmp_path / "slurm" / "7_1.out").write_text("error: old\nmore\nerror: the disk is full\nnext\n")
    newest = Submissions(tmp_path).newest()
    assert (newest["a"].id, newest["a"].state) == ("7_0", "RUNNING")
    assert (newest["b"].id, newest["b"].state, newest["b"].error()) == ("7_1", None, "the disk is full")


def test_a_kill_after_sbatch_loses_no_job(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    """The queue shows the job, although its number was not recorded."""
    fake_slurm.answer = "exit 1"
    with Submissions(tmp_path) as submissions, pytest.raises(AsgoError):
        submissions.submit(["a"], "#!/bin/bash\n", is_array=True)
    assert Submissions(tmp_path).newest() == {}
    fake_slurm.queue = f"7_0|PENDING|Priority|{tmp_path}/slurm/1.sh\n"
    assert Submissions(tmp_path).newest()["a"].id == "7_0"


def test_two_commands_do_not_submit_at_the_same_time(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    with Submissions(tmp_path), pytest.raises(UsageError, match="another command submits here"), Submissions(tmp_path):
        pass


def test_slurms_refusal_is_one_line(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.answer = (
        "echo 'sbatch: error: invalid partition specified: x' >&2; echo 'sbatch: error: failed' >&2; exit 1"
    )
    with Submissions(tmp_path) as submissions, pytest.raises(AsgoError) as refused:
        submissions.submit(["a"], "#!/bin/bash\n", is_array=True)
    assert str(refused.value) == "sbatch: error: invalid partition specified: x; sbatch: error: failed"


def test_a_machine_without_slurm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AsgoError, match="there is no squeue here"):
        Submissions(tmp_path).newest()


def test_a_list_of_jobs_from_a_stranger_is_refused(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    for content in ("[1]", '[{"script": "1.sh", "runs": ["a"], "is_array": true, "job": "1 --me"}]', "[" * 5000):
        (tmp_path / "slurm" / "jobs.json").write_text(content)
        with pytest.raises(AsgoError, match="not a list of jobs that asgo wrote"):
            Submissions(tmp_path)


def test_a_job_starts_without_the_variables_of_the_job_that_submits_it(
    fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SRUN_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES", "SQUEUE_STATES"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SLURM_CONF", "kept")
    with Submissions(tmp_path) as submissions:
        submissions.submit(["a"], "#!/bin/bash\n", is_array=True)
    names = {line.partition("=")[0] for line in fake_slurm.environment()}
    assert {name for name in names if name.startswith(("SLURM", "SRUN", "SQUEUE", "CUDA"))} == {"SLURM_CONF"}


def test_options_come_before_the_defaults_in_the_environment(
    fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch itself prefers its variables to the options in a script."""
    for name in ("PARTITION", "TIMELIMIT", "MEM_PER_NODE", "ARRAY_INX", "NO_REQUEUE", "SIGNAL", "WAIT", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "3")
    script = make_script(read_request("partition=gpu,time=10,mem=4G"), program("true"), tmp_path, None)
    with Submissions(tmp_path) as submissions:
        submissions.submit(["a"], script, is_array=False)
    names = {line.partition("=")[0] for line in fake_slurm.environment()}
    assert {name for name in names if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT"}


def test_the_script_is_valid_for_the_shell(tmp_path: Path) -> None:
    for runs in (None, ["a"]):
        script = make_script(read_request("nodes=2,gpus=8"), program("true"), tmp_path, runs)
        assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0
