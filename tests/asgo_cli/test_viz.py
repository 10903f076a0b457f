"""`asgo viz` through the command line."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from asgo_cli import app, viz
from models.functions import FUNCTIONS, NOISY_FUNCTIONS, PAPER_FUNCTIONS
from models.matrix_problems import PROBLEMS
from pipelines.analysis import trajectories
from pipelines.analysis.matrix_losses import run_losses
from pipelines.analysis.optimizer_settings import MATRICES, default_settings, parse_settings
from pipelines.analysis.trajectories import run_trajectories
from tests.long import long

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def asgo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `asgo viz ...` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["asgo", "viz", *arguments])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_the_names_in_the_help_are_those_of_the_functions() -> None:
    assert tuple(FUNCTIONS) == viz.FUNCTION_NAMES
    assert tuple(function.name for function in PAPER_FUNCTIONS) == viz.PAPER_FUNCTIONS
    assert tuple(function.name for function in NOISY_FUNCTIONS) == viz.NOISY_FUNCTIONS
    assert tuple(PROBLEMS) == viz.MATRIX_PROBLEMS


def test_the_command_is_imported_without_torch() -> None:
    heavy = "{'torch', 'numpy', 'matplotlib', 'pydantic'}"
    code = f"import sys, asgo_cli.viz; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_gives_the_numbers_of_the_trajectories(asgo: Run, tmp_path: Path) -> None:
    code, out, err = asgo("abs_sum")
    assert code == 0
    runs = run_trajectories(FUNCTIONS["abs_sum"], default_settings())
    for run in runs:
        (row,) = [line for line in out.splitlines() if run.settings.label in line]
        x, y = run.final_point
        reached = f"{run.steps_to_reach}" if run.steps_to_reach is not None else "never"
        expected = [
            f"{x:.4f}, {y:.4f}",
            f"{run.final_value:.3g}",
            f"{run.distance:.3g}",
            reached,
        ]
        assert [cell.strip() for cell in row.split("│")[2:-1]] == expected
    assert (tmp_path / "abs_sum.png").read_bytes().startswith(b"\x89PNG")
    assert "abs_sum.png: trajectories on abs_sum" in err
    assert "asgo viz abs_sum --optimizer" in err


def test_json_gives_the_full_floats(asgo: Run) -> None:
    code, out, _ = asgo("booth", "--optimizer", "adam:lr=0.3", "--start", "-1.5,2", "--steps", "40", "--json")
    assert code == 0
    printed = json.loads(out)
    (run,) = run_trajectories(FUNCTIONS["booth"], [parse_settings("adam:lr=0.3")], (-1.5, 2.0), 40)
    (function,) = printed["functions"]
    assert (function["function"], function["start"], function["steps"]) == ("booth", [-1.5, 2], 40)
    (row,) = function["trajectories"]
    assert row == {
        "label": "Adam, lr 0.3",
        "optimizer": "adam",
        "keywords": {"lr": 0.3},
        "final_point": list(run.final_point),
        "final_value": run.final_value,
        "distance": run.distance,
        "late_distance": run.late_distance,
        "steps_to_reach": run.steps_to_reach,
        "lowest_point": list(run.lowest_point),
        "lowest_value": run.values.min(),
        "diverged_at": None,
    }
    assert printed["figure"] == "booth.png"


def test_all_is_one_figure_of_the_papers_six_functions(asgo: Run, tmp_path: Path) -> None:
    code, out, err = asgo("all", "--steps", "3", "--json")
    assert code == 0
    assert [function["function"] for function in json.loads(out)["functions"]] == list(viz.PAPER_FUNCTIONS)
    assert struct.unpack(">II", (tmp_path / "functions.png").read_bytes()[16:24]) == (1620, 1260)
    assert "asgo viz all --optimizer" in err


def test_several_functions_are_panels_of_one_figure(asgo: Run, tmp_path: Path) -> None:
    code, out, _ = asgo("matyas", "ackley", "matyas", "--steps", "3", "--start", "-2,-4", "--out", "a/b.svg")
    assert code == 0
    assert out.count("from (-2, -4) to (0, 0) in 3 steps") == 2
    svg = (tmp_path / "a/b.svg").read_text(encoding="utf-8")
    assert svg.count(">Matyas<") == svg.count(">Ackley<") == 1


def test_an_expression_takes_start_steps_and_any_optimizer(asgo: Run, tmp_path: Path) -> None:
    arguments = ("--expression", "x**2 + 10*y**2", "--start", "4,-3", "--steps", "30")
    optimizers = ("--optimizer", "accasro:lr=0.02,increment=0.2", "--optimizer", "rmsprop")
    code, out, err = asgo(*arguments, *optimizers)
    assert code == 0
    assert "expression: x**2 + 10*y**2\nfrom (4, -3) in 30 steps" in "\n".join(map(str.rstrip, out.splitlines()))
    assert "lowest value" in out
    assert "distance" not in out
    assert (tmp_path / "expression.png").exists()
    assert "asgo viz --expression 'x**2 + 10*y**2' --optimizer" in err
    code, out, _ = asgo(*arguments, *optimizers, "--json")
    assert code == 0
    (function,) = json.loads(out)["functions"]
    assert (function["formula"], function["optima"]) == ("x**2 + 10*y**2", [])
    for row in function["trajectories"]:
        x, y = row["lowest_point"]
        assert row["lowest_value"] == pytest.approx(x**2 + 10 * y**2)
        assert row["distance"] is row["steps_to_reach"] is None


def test_a_gif_moves(asgo: Run, tmp_path: Path) -> None:
    code, _, err = asgo("booth", "--steps", "6", "--optimizer", "adam", "--out", "new/a.GIF")
    assert code == 0
    assert "new/a.GIF: trajectories on booth" in err
    with Image.open(tmp_path / "new/a.GIF") as gif:
        assert getattr(gif, "n_frames", 1) == 7


def test_a_page_is_interactive(asgo: Run, tmp_path: Path) -> None:
    code, _, err = asgo("--expression", "x*x + y**2", "--steps", "6", "--optimizer", "adam", "--out", "new/a.HTML")
    assert code == 0
    assert "new/a.HTML: trajectories on expression" in err
    text = (tmp_path / "new/a.HTML").read_text(encoding="utf-8")
    assert "<code>x*x + y**2</code>" in text
    assert "Plotly.newPlot(" in text


def test_matrix_optimizers_are_drawn_on_matrix_problems(asgo: Run, tmp_path: Path) -> None:
    arguments = ("kronecker_quadratic", "matrix_factorization", "--steps", "40", "--seed", "3")
    optimizers = ("--optimizer", "asgo:lr=0.1", "--optimizer", "adamw")
    code, out, err = asgo(*arguments, *optimizers, "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed["figure"] == "problems.png"
    assert (tmp_path / "problems.png").read_bytes().startswith(b"\x89PNG")
    settings = [parse_settings(text, MATRICES) for text in ("asgo:lr=0.1", "adamw")]
    for shown, problem in zip(printed["problems"], PROBLEMS.values(), strict=True):
        runs = run_losses(problem, settings, steps=40, seed=3)
        assert (shown["problem"], shown["seed"], shown["steps"]) == (problem.name, 3, 40)
        assert shown["first_loss"] == runs[0].values[0]
        for row, run in zip(shown["runs"], runs, strict=True):
            assert (row["label"], row["keywords"]) == (run.settings.label, run.settings.keywords)
            assert row["final_loss"] == pytest.approx(run.values[-1], rel=1e-6)
            assert row["lowest_loss"] == pytest.approx(run.values.min(), rel=1e-6)
            assert (row["steps_to_reach"], row["diverged_at"]) == (run.steps_to_reach, None)
    code, out, err = asgo(*arguments, *optimizers, "--out", "a.html")
    assert code == 0
    assert "ASGO, lr 0.1" in out
    assert f"{printed['problems'][0]['runs'][0]['final_loss']:.3g}" in out
    assert "Kronecker quadratic" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "asgo viz kronecker_quadratic matrix_factorization --lr-grid" in err


def test_a_grid_of_rates_is_a_table_and_a_figure(asgo: Run, tmp_path: Path) -> None:
    arguments = ("inseparable_l2", "--lr-grid", "1e-2:1:3", "--optimizer", "adam", "--optimizer", "sgd-momentum")
    code, out, _ = asgo(*arguments, "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed["rates"] == [0.01, 0.1, 1]
    assert (tmp_path / "inseparable_l2-rates.png").read_bytes().startswith(b"\x89PNG")
    (problem,) = printed["problems"]
    for scan in problem["optimizers"]:
        steps = {}
        for row in scan["runs"]:
            text = f"{scan['optimizer']}:lr={row['lr']}"
            (run,) = run_trajectories(FUNCTIONS["inseparable_l2"], [parse_settings(text)])
            assert (row["steps_to_converge"], row["diverged_at"]) == (run.steps_to_reach, run.diverged_at)
            if run.steps_to_reach is not None:
                steps[row["lr"]] = run.steps_to_reach
        assert (scan["lowest_converging_rate"], scan["highest_converging_rate"]) == (min(steps), max(steps))
        assert scan["best_steps"] == min(steps.values()) == steps[scan["best_rate"]]
    code, out, err = asgo(*arguments)
    assert code == 0
    assert "converging: stays within 0.1 of an optimum, in 400 steps" in out
    assert f"asgo viz inseparable_l2 --optimizer adam:lr={problem['optimizers'][0]['best_rate']:g}" in err


def test_a_grid_of_rates_works_on_matrices(asgo: Run) -> None:
    code, out, _ = asgo(
        "matrix_factorization", "--lr-grid", "0.05:0.5:2", "--optimizer", "muon", "--optimizer", "asgo", "--steps", "20"
    )
    assert code == 0
    assert "converging: the loss stays below 0.001 of the first, in 20 steps" in out
    assert out.count("none") == 2


def test_the_seed_decides_the_noise(asgo: Run) -> None:
    ends = []
    for seed in ("1", "1", "2"):
        code, out, _ = asgo("noisy_rosenbrock", "--seed", seed, "--steps", "9", "--json")
        assert code == 0
        (function,) = json.loads(out)["functions"]
        assert function["gradient_noise"] == 10
        ends.append(function["trajectories"][0]["final_point"])
    assert ends[0] == ends[1] != ends[2]


def test_a_divergence_is_said_in_the_table_and_is_a_step_in_json(asgo: Run) -> None:
    arguments = ("rosenbrock", "--optimizer", "sgd-momentum:lr=1", "--optimizer", "adam", "--steps", "50")
    code, out, _ = asgo(*arguments)
    assert code == 0
    assert "diverged" in out
    code, out, _ = asgo(*arguments, "--json")
    assert code == 0
    diverged, converging = json.loads(out)["functions"][0]["trajectories"]
    assert 0 < diverged["diverged_at"] < 50
    assert diverged["steps_to_reach"] is None
    assert converging["diverged_at"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rosenbrok",), "unknown function 'rosenbrok'; did you mean 'rosenbrock'? `asgo viz --help` lists them"),
        (("abs_sum", "xyzzy"), "unknown function 'xyzzy'; `asgo viz --help` lists them"),
        (("abs_sum", "--out", "a.jpg"), "a.jpg: the name of a figure must end in .png, .pdf, .svg, .gif, .html"),
        (("abs_sum", "--optimizer", "adm"), "unknown optimizer: 'adm'; did you mean 'adam'?"),
        (("abs_sum", "--optimizer", "adam", "--optimizer", "muon"), "muon updates matrices"),
        (("abs_sum", "--start", "1"), "--start 1: must be two finite numbers, as in --start -1.5,2"),
        (("abs_sum", "--start", "1,2,3"), "--start 1,2,3: must be two finite numbers"),
        (("abs_sum", "--start", "inf,0"), "--start inf,0: must be two finite numbers"),
        (("beale", "--start", "1e160,3"), "beale is not finite at"),
        (("abs_sum", "--steps", "0"), "--steps"),
        (("--expression", "x**2 + foo(y)"), "--expression: character 8, 'foo': is not a known function"),
        (
            ("--expression", "log(x)", "--start", "-1,0"),
            "expression is not finite at (-1.0, 0.0): choose another --start",
        ),
        (("noisy_abs_sum", "--seed", "-1"), "--seed"),
        (("beale", "--optimizer", "asgo"), "or draw a matrix problem: kronecker_quadratic, matrix_factorization"),
        (
            ("kronecker_quadratic", "beale"),
            "kronecker_quadratic is a matrix problem and beale a function of x and y: draw them with two commands",
        ),
        (("kronecker_quadratic", "--expression", "x*y"), "and --expression a function of x and y"),
        (("kronecker_quadratic", "--start", "1,2"), "--start 1,2: kronecker_quadratic has no x and y"),
        (("matrix_factorization", "--out", "a.gif"), "a.gif: losses cannot be animated; give --out FILE.png"),
        (("matrix_factorization", "--out", "a.jpg"), "a.jpg: the name of a figure must end in .png, .pdf, .svg, .html"),
        (("matrix_factorization", "--optimizer", "asgo:root_method=guess"), "invalid root_method: 'guess'"),
        (("booth", "--lr-grid", "1:2"), "--lr-grid 1:2: must be LOW:HIGH:COUNT, as in --lr-grid 1e-4:1:13"),
        (
            ("booth", "--lr-grid", "1:2:3", "--optimizer", "adam:betas=0.8,0.9,lr=1"),
            "--lr-grid chooses the learning rate; leave lr out",
        ),
        (("booth", "--lr-grid", "1:2:3", "--out", "a.html"), "must end in .png, .pdf, .svg, with --lr-grid"),
        ((), "give a FUNCTION, as in `asgo viz rosenbrock`, or an --expression"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    asgo: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = asgo(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_arguments_are_checked_before_the_work(asgo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "run_trajectories", lambda *_: pytest.fail("ran before the check"))
    for arguments in (
        ("abs_sum", "--out", "a.bmp"),
        ("abs_sum", "--expression", "x^2"),
        ("abs_sum", "--optimizer", "adam", "--optimizer", "adm"),
    ):
        assert asgo(*arguments)[0] == 2


@long
def test_the_backend_of_a_notebook_is_of_no_consequence(tmp_path: Path) -> None:
    """In a process of its own: matplotlib reads the variable when it is imported."""
    environment = {**os.environ, "MPLBACKEND": "module://not_installed.backend_inline"}
    command = [sys.executable, "-m", "asgo_cli", "viz", "booth", "--steps", "2", "--out", "a.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()


def test_an_optimizer_by_import_path_moves_like_the_same_one_by_name(asgo: Run) -> None:
    path = "torch.SGD:lr=0.001,momentum=0.9"
    pair = ("--optimizer", path, "--optimizer", "sgd-momentum:lr=0.001", "--optimizer", "torch.NAdam")
    code, out, err = asgo("rosenbrock", *pair, "--steps", "20", "--json")
    assert code == 0, err
    (drawn,) = json.loads(out)["functions"]
    by_path, by_name, nadam = drawn["trajectories"]
    assert by_path["final_point"] == pytest.approx(by_name["final_point"], rel=1e-9)
    assert by_path["final_point"] != nadam["final_point"]
    code, out, err = asgo("kronecker_quadratic", "--optimizer", "torch.Muon:lr=0.1", "--steps", "5", "--json")
    assert code == 0, err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.Muon:lr=0.1", "its constructor fails: ValueError: Muon only supports 2D parameters"),
        ("torch.AdamW:wait_decay=1", "unknown keyword of torch.AdamW: 'wait_decay'; did you mean 'weight_decay'?"),
        ("./mine.py:Fails", "a step with it fails: ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_import_path_is_one_line(path: str, message: str, asgo: Run) -> None:
    text = "import torch\nclass Fails(torch.optim.SGD):\n    def step(self, closure=None): 1 / 0\n"
    Path("mine.py").write_text(text)
    code, _, err = asgo("rosenbrock", "--optimizer", path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
