"""`asgo train ... --slurm` and `asgo sweep ... --slurm`, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipelines.resolve import assignment_layer
from pipelines.sweeps.definition import read_sweep, resolve_runs
from pipelines.training.metrics import to_line
from pipelines.training.train import train as train_run
from tests.asgo_cli.test_sweep import GOOD, write_sweep
from tests.command_lines import Result, asgo
from tests.conftest import SMALL, SilentReporter
from tests.fake_slurm import FakeSlurm, fake_slurm
from tests.long import long

__all__ = ["fake_slurm"]

SEARCH = 'trials = 3\n[search.space]\n"optimizer.lr" = { factor = 3.0, points = 3 }\n'


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, token_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write_sweep(tmp_path / "my.toml", token_folder, *GOOD)


def train(data: Path, *words: object) -> Result:
    settings = [f"--set={key}={value}" for key, value in {**SMALL, "data.folder": data}.items()]
    return asgo("train", "gpt", "--preset", "tiny", *settings, *words)


def run_job(fake_slurm: FakeSlurm, script: Path, task: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Do what Slurm does: run the script on another machine's empty environment, in another folder."""
    monkeypatch.chdir("/")
    result = fake_slurm.execute(script.read_text(), task)
    monkeypatch.chdir(script.parents[3])
    return f"{result.returncode}\n{result.stdout}\n{result.stderr}"


def test_a_sweep_is_submitted_once_and_ends(fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    result = asgo("sweep", "my.toml", "--slurm", "partition=gpu,jobs=1")
    assert result.code == 0, result.err
    assert fake_slurm.calls("sbatch") == [f"--parsable {Path.cwd()}/runs/my/slurm/1.sh"]
    assert "job 7: 2 submitted" in result.err
    assert result.err.splitlines()[-1] == "next: asgo sweep my.toml --slurm partition=gpu,jobs=1"

    script = Path("runs/my/slurm/1.sh").absolute()
    fake_slurm.queue = f"7_0|RUNNING|None|{script}\n7_1|PENDING|JobArrayTaskLimit|{script}\n"
    states = json.loads(asgo("sweep", "my.toml", "--slurm", "partition=gpu,jobs=1", "--json").out)["jobs"]
    assert [row["state"] for row in states] == ["running", "pending: JobArrayTaskLimit"]
    assert [row["step"] for row in states] == ["0 of 6", "0 of 6"]
    assert len(fake_slurm.calls("sbatch")) == 1, "both runs are in the queue"

    assert run_job(fake_slurm, script, 0, monkeypatch).startswith("0\n")
    fake_slurm.queue = ""
    result = asgo("sweep", "my.toml", "--slurm", "partition=gpu,jobs=1", "--json")
    assert [row["state"] for row in json.loads(result.out)["jobs"]] == ["done", "stopped"]
    assert "runs=(b-s42)" in Path("runs/my/slurm/2.sh").read_text(), "only what is missing"
    assert run_job(fake_slurm, script.with_name("2.sh"), 0, monkeypatch).startswith("0\n")
    result = asgo("sweep", "my.toml", "--slurm", "partition=gpu,jobs=1")
    assert "next: asgo export-metrics runs/my --out my.csv" in result.err
    assert len(fake_slurm.calls("sbatch")) == 2


def test_seeds_until_certain_are_submitted_look_by_look(fake_slurm: FakeSlurm, reporter: SilentReporter) -> None:
    words = ("sweep", "my.toml", "--until-certain", "--seeds", "1,2", "--max-seeds", 3, "--slurm", "default")
    runs = {run.name: run for run in resolve_runs(read_sweep("my.toml"), assignment_layer([]), [1, 2, 3])}
    dry = asgo(*words, "--dry-run")
    assert "runs=(a-s1 b-s1 a-s2 b-s2)" in dry.out
    assert not Path("runs").exists()
    assert asgo(*words).code == 0
    assert "runs=(a-s1 b-s1 a-s2 b-s2)" in Path("runs/my/slurm/1.sh").read_text()
    for name in ("a-s1", "b-s1", "a-s2"):
        train_run(runs[name].config, Path("runs/my", name), reporter)
    result = asgo(*words, "--json")
    assert [row["name"] for row in json.loads(result.out)["jobs"]] == ["b-s2"], "the look waits for it"
    train_run(runs["b-s2"].config, Path("runs/my/b-s2"), reporter)
    result = asgo(*words)
    assert "look after 2 seeds: 1 of 1 pairs undecided; seed 3 of a, b" in result.err
    assert "runs=(a-s3 b-s3)" in Path("runs/my/slurm/3.sh").read_text()
    for name in ("a-s3", "b-s3"):
        train_run(runs[name].config, Path("runs/my", name), reporter)
    result = asgo(*words, "--json")
    assert json.loads(result.out)["seeds"] == {"a": 3, "b": 3}
    assert result.err.splitlines()[-1] == "next: asgo compare runs/my"
    assert len(fake_slurm.calls("sbatch")) == 3


@pytest.mark.usefixtures("fake_slurm")
def test_workers_of_a_search_keep_slots_and_runs_of_a_list_refuse_them() -> None:
    words = ("sweep", "my.toml", "--slurm", "default", "--slots", 2, "--dry-run")
    for more in ((), ("--until-certain",)):
        result = asgo(*words, *more)
        assert (result.code, "--slots and --gpus: with --slurm" in result.err) == (2, True)
    Path("my.toml").write_text(f"{Path('my.toml').read_text()}\n[search]\n{SEARCH}")
    result = asgo(*words, "--seeds", "1,2")
    assert result.code == 0, result.err
    assert "sweep my.toml --slots 2" in result.out


def test_a_search_ends_before_its_seeds_are_added(fake_slurm: FakeSlurm) -> None:
    Path("my.toml").write_text(f"{Path('my.toml').read_text()}\n[search]\n{SEARCH}")
    result = asgo("sweep", "my.toml", "--until-certain", "--slurm", "default")
    assert result.code == 2
    assert "--until-certain with --slurm: the search has not ended; submit it without --until-certain" in result.err
    assert fake_slurm.calls("sbatch") == []


def test_a_dry_run_prints_the_script_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine without Slurm."""
    monkeypatch.setenv("PATH", "/nowhere")
    before = sorted(Path().rglob("*"))
    result = asgo("sweep", "my.toml", "--slurm", "gpus=2,cpus=8,qos=low", "--dry-run")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in ("#SBATCH --gpus-per-node=2", "#SBATCH --qos=low", "#SBATCH --requeue", "export OMP_NUM_THREADS=4"):
        assert line in lines
    (start,) = [line for line in lines if line.startswith("srun ")]
    assert start == (
        f"srun --export=ALL --cpus-per-task=8 {sys.executable} -m asgo_cli train gpt"
        ' --config "$folder/sweep/$run.toml" --resume --out "$folder/$run" --gpus 2 &'
    )
    assert f"sbatch --parsable {Path.cwd()}/runs/my/slurm/1.sh" in result.err.splitlines()
    assert sorted(Path().rglob("*")) == before
    assert "there is no squeue here" in asgo("sweep", "my.toml", "--slurm", "default").err
    assert sorted(path.name for path in Path().rglob("*") if "slurm" in path.name) == ["slurm"]


def test_a_failed_run_is_reported_with_its_log_and_submitted_again(fake_slurm: FakeSlurm) -> None:
    asgo("sweep", "my.toml", "--slurm", "default")
    log = Path("runs/my/slurm/7_1.out").absolute()
    log.write_text("error: the disk is full\n")
    result = asgo("sweep", "my.toml", "--slurm", "default")
    assert f"warning: b-s42: job 7_1 failed: the disk is full; its log: {log}" in result.err.splitlines()
    assert "runs=(a-s42 b-s42)" in Path("runs/my/slurm/2.sh").read_text()


def test_training_is_one_job_with_the_same_settings(
    fake_slurm: FakeSlurm, token_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--optimizer", "asgo", "--out", "runs/x y", "--slurm", "time=10")
    assert train(token_folder, *words, "--dry-run").out.startswith("#!/bin/bash")
    assert not Path("runs").exists()
    result = train(token_folder, *words)
    assert (result.code, "job 7: 1 submitted" in result.err) == (0, True), result.err
    script = Path("runs/x y/slurm/1.sh").absolute()
    assert "--array" not in script.read_text()
    fake_slurm.queue = f"7|RUNNING|None|{script}\n"
    assert "7" in train(token_folder, *words).out.splitlines()[-2]
    output = run_job(fake_slurm, script, None, monkeypatch)
    assert output.startswith("0\n"), output
    fake_slurm.queue = ""
    result = train(token_folder, *words)
    assert "done" in result.out
    assert "next: asgo export-metrics 'runs/x y' --out 'x y.csv'" in result.err
    assert len(fake_slurm.calls("sbatch")) == 1
    result = train(token_folder, *words, "--lr", "0.5")
    assert (result.code, "optimizer.lr is" in result.err) == (2, True)


def test_a_run_shows_its_step(fake_slurm: FakeSlurm, token_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between two checkpoints."""
    words = ("--out", "runs/x", "--slurm", "default")
    train(token_folder, *words)
    run_job(fake_slurm, Path("runs/x/slurm/1.sh").absolute(), None, monkeypatch)
    for checkpoint in Path("runs/x/checkpoints").iterdir():
        (checkpoint / "state.json").rename(checkpoint / "lost.json")
    metrics = Path("runs/x/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(to_line(row) for row in rows if row["step"] < 5))
    assert "4 of 6" in train(token_folder, *words).out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--slurm", "gpus=1"], "--device cuda"),
        (["--slurm", "gpus=8"], "--gpus 8"),
        (["--slurm", "default", "--gpus", "4", "--max-restarts", "2"], "--gpus 4 --max-restarts 2"),
        (["--slurm=gres=gpu:2", "--gpus=2"], "--gpus 2"),
        (["--slurm", "cpus=2", "--processes", "2"], "--processes 2"),
        (["--slurm", "nodes=2,gpus=1"], "--gpus 1"),
        (["--slurm", "gpus=1", "--device=cpu"], "--device=cpu"),
        (["--slurm", "default"], "--resume"),
    ],
)
def test_the_processes_of_a_job(words: list[str], expected: str, token_folder: Path) -> None:
    result = train(token_folder, *words, "--dry-run", "--out", "x", "--set=runtime.device=auto")
    script = result.out
    (start,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert f" {expected} " in start, result.err
    assert ("--device cuda" in start) == (words == ["--slurm", "gpus=1"])
    assert ("--gpus-per-node" in script) == (("gpus" in words[1] or "--gpus" in words) and "gres" not in words[0])
    assert ("--node-rank" in start) == ("nodes=2" in words[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slurm", "gpus=2", "--gpus", "4"], "--gpus 4: --slurm asks for gpus=2"),
        (["--slurm", "nodes=2"], "--slurm nodes=2: write gpus=N too"),
        (["--slurm", "default", "--nodes", "2"], "leave them out; write nodes=N in --slurm"),
        (["--slurm", "my.toml"], "--slurm 'my.toml': write KEY=VALUE"),
    ],
)
def test_a_contradiction_is_refused(words: list[str], message: str, token_folder: Path) -> None:
    result = train(token_folder, *words, "--dry-run")
    assert (result.code, message in result.err) == (2, True), result.err


def test_a_list_has_no_slots_and_no_workers() -> None:
    assert "with --slurm, every run is a job" in asgo("sweep", "my.toml", "--slurm", "default", "--slots", "2").err
    assert "--worker: for a search" in asgo("sweep", "my.toml", "--worker", "1").err


@long
def test_workers_share_the_folder_of_a_search(
    fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path("my.toml").read_text()
    Path("se.toml").write_text(f"seeds = [1, 2]\n{text}[search]\n{SEARCH}")
    words = ("sweep", "se.toml", "--slurm", "jobs=2,cpus=1")
    script = asgo(*words, "--dry-run").out
    assert f'{sys.executable} -m asgo_cli sweep se.toml --out "$folder" --worker "$run" &' in script
    assert not Path("runs").exists()
    assert "job 7: 2 submitted" in asgo(*words).err
    path = Path("runs/se/slurm/1.sh").absolute()
    for task in (1, 0):
        output = run_job(fake_slurm, path, task, monkeypatch)
        assert output.startswith("0\n"), output
    assert {path.name for path in Path("runs/se").glob("*-s?")} == {"a-s1", "a-s2", "b-s1", "b-s2"}
    assert len(list(Path("runs/se/trials").glob("*-t?"))) == 6
    assert Path("runs/se/sweep/worker-1/a-t0.toml").is_file()
    assert "final losses" in asgo(*words).out
    assert len(fake_slurm.calls("sbatch")) == 1
