import json
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
from cli_support import ROOT, TINY, one_message, run, run_process, succeed

from mmnas_lab import cli


def test_help_lists_every_experiment_with_its_line(tmp_path):
    shown = run_process("--help", cwd=tmp_path)
    assert (shown.code, shown.err) == (0, "")
    names = [path.stem for path in (ROOT / "conf/experiment").glob("[!_]*.yaml")]
    assert len(names) >= 4
    for name in names:
        (line,) = [line for line in shown.out.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 3, f"{name} has no line that says what it is"
    for group in (ROOT / "conf").iterdir():
        if group.is_dir():
            assert f"  {group.name} " in shown.out or group.name in ("experiment", "sweep")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--cfg", "job"], ["--cfg", "job", "experiment=bm_nas_mmimdb", "scale=smoke", "seed=3"]],
)
def test_questions_are_answered_without_heavy_imports(tmp_path, arguments):
    code = (
        "import sys, mmnas_lab.cli as cli\n"
        f"sys.argv = ['run.py', *{arguments}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'lightning', 'timm', 'transformers', 'matplotlib', 'sklearn', 'wandb'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "experiment" in done.stdout
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "dataset.nois=1": ["dataset.nois", "noise"],
    "+dataset.nois=1": ["dataset.nois", "noise"],
    "++dataset.nois=1": ["dataset.nois", "noise"],
    "search.epoch=4": ["search.epoch", "epochs"],
    "+search.epoch=4": ["search.epoch", "epochs"],
    "+pretrain.views.dropuot=0.1": ["pretrain.views.dropuot", "dropout"],
    "search.optimizer.lrate=1": ["search.optimizer.lrate", "lr"],
    "+backbone.image.heigth=3": ["backbone.image.heigth", "height"],
    "backbone.image.precision=bfloat16": ["+backbone.image.precision=<value>"],
    "sarch.epochs=3": ["sarch", "search"],
    "~search.epochs": ["search.epochs", "not set"],
    "dataset=moveis": ["dataset=moveis", "movies"],
    "datset=movies": ["datset", "dataset"],
    "experiment=nope": ["experiment=nope", "ssl_nas_movies", "bm_nas_mmimdb"],
    "strategy.alternation=bach": ["strategy.alternation=bach", "batch"],
    "strategy=random strategy.draw=3": ["strategy.draw", "draws"],
    "strategy=fixed": ["strategy.genotype"],
    "strategy=fixed strategy.genotype=nope.json": ["nope.json", "genotype.json of a finished run"],
    "stages=[features,serach]": ["serach", "search"],
    "baselines=[text,imag]": ["imag", "image"],
    "search.epochs=abc": ["search.epochs=abc", "integer"],
    "search.epochs=1,2": ["search.epochs=1,2", "--multirun"],
    "trainer.devices=0": ["trainer.devices=0", "greater than or equal to 1"],
    "nokey=1": ["nokey", "seed", "labelled_share"],
    "+nokey=1": ["nokey", "seed", "labelled_share"],
    "-m seed=0,1 nokey=1": ["nokey", "seed"],
    "--cfg job nokey=1": ["nokey", "seed"],
    "--cfg job +search.epoch=4": ["search.epoch", "epochs"],
    "--cfg job +dataset.nois=1": ["dataset.nois", "noise"],
    "--cfg job search.epochs=abc": ["search.epochs=abc"],
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_is_misspelt_is_refused_with_the_nearest_valid_names(tmp_path, arguments):
    refused = run(*arguments.split(), cwd=tmp_path)
    message = one_message(refused)
    for part in REFUSED[arguments]:
        assert part in message
    assert not (tmp_path / "outputs" / "stages").exists()


def test_an_optional_argument_can_be_added(tmp_path):
    shown = succeed("--cfg", "job", "+backbone.image.precision=bfloat16", cwd=tmp_path)
    assert "precision: bfloat16" in shown.out


def test_a_sweep_over_seeds_names_every_folder(tmp_path):
    done = succeed(*TINY, "-m", "seed=0,1", "stages=[features]", cwd=tmp_path)
    folders = done.out.splitlines()
    assert [folder.rpartition("/")[2] for folder in folders] == ["seed_0", "seed_1"]
    for seed, folder in enumerate(folders):
        record = json.loads((tmp_path / folder / "record.json").read_text())
        assert record["seed"] == seed
        assert f"seed={seed}" in record["overrides"]


def test_a_sweep_goes_on_past_a_failed_job(tmp_path):
    done = run(*TINY, "-m", "dataset.noise=5,0", "stages=[features]", cwd=tmp_path)
    assert done.code == 1
    assert len(done.out.splitlines()) == 1
    report = done.err[done.err.index("1 of 2 jobs failed:") :]
    assert "dataset.noise=5" in report
    assert "dataset.noise=0" not in report
    assert "Traceback" not in done.err


@pytest.mark.skipif(find_spec("hydra_plugins") is None, reason="needs hydra-joblib-launcher")
def test_failures_come_back_from_a_launcher_with_processes_of_its_own(tmp_path):
    done = run("-m", "launcher=joblib", "seed=0,1", "+nokey=1", cwd=tmp_path)
    assert done.code == 1
    assert "2 of 2 jobs failed:" in done.err


def test_a_sweep_file_runs_its_rows_times_its_seeds(tmp_path):
    (tmp_path / "more/sweep").mkdir(parents=True)
    (tmp_path / "more/sweep/tiny.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      experiment: >-\n        ssl_nas_movies,\n        bm_nas_movies\n      seed: range(2)\n"
    )
    options = ["--config-dir", "more", "sweep=tiny", "stages=[features]"]
    done = succeed(*options, *TINY, cwd=tmp_path)
    runs = {(folder.split("/")[1], folder.rpartition("/")[2]) for folder in done.out.splitlines()}
    names = ("ssl_nas_movies", "bm_nas_movies")
    assert runs == {(name, f"seed_{seed}") for name in names for seed in range(2)}
    message = one_message(run("--config-dir", "more", "sweep=tini", cwd=tmp_path))
    assert "did you mean tiny" in message


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130_and_goes_on(tmp_path, by):
    command = [*TINY, "baselines=[]", "stages=[features,search]", "trainer.checkpoint_seconds=0"]
    hook = {"name": "kill_at", "place": "after_step", "fit": "search", "number": 2, "by": by}
    stopped = run(*command, cwd=tmp_path, hook=hook)
    assert stopped.code == 130
    assert "interrupted; the same command goes on" in stopped.err
    assert "Traceback" not in stopped.err
    assert stopped.out == ""
    assert "search goes on at step" in succeed(*command, cwd=tmp_path).err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "a/b.npy"), "for 'a/b.npy'"),
        (RuntimeError('IoError(Os { code: 28, message: "No space left on device" })'), "free some"),
    ],
)
def test_a_full_disk_is_one_message(capsys, error, said):
    wrapped = RuntimeError("unexpected pos 64 vs 0")
    wrapped.__cause__ = error
    assert cli._explain(wrapped, []) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: no space left on the disk")
    assert message.count("\n") == 1
    assert said in message
    assert "output=" in message


RANK = """
import os, sys, time
assert sys.argv[1:] == ["seed=1", "hydra.mode=RUN"], sys.argv
if {failing} and os.environ["RANK"] == "1":
    sys.exit(2)
if {failing}:
    time.sleep(60)
print("outputs/rank_" + os.environ["RANK"] + "_of_" + os.environ["WORLD_SIZE"])
"""


@pytest.mark.parametrize("failing", [False, True])
def test_the_first_failure_of_a_rank_ends_all(tmp_path, monkeypatch, failing):
    script = tmp_path / "run.py"
    script.write_text(RANK.format(failing=failing))
    monkeypatch.setattr(sys, "argv", [str(script), "-m", "seed=1,2"])
    if not failing:
        assert str(cli._run_on_ranks(2, ["seed=1"])) == "outputs/rank_0_of_2"
        return
    with pytest.raises(cli._RanksFailed) as ended:
        cli._run_on_ranks(2, ["seed=1"])
    assert cli._explain(ended.value, []) == 2
