import json
import sys

import pytest
from PIL import Image
from wandb_reader import BLOCK, items, only_run

from mmnas_lab.report.wandb_run import WandbRun, _automatic_mode


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home directory, and no W&B setting from outside."""
    home = tmp_path / "home"
    home.mkdir()
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "WANDB_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    return home


def test_offline_run_can_be_read_back(home, tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "curves.png")
    (tmp_path / "genotype.json").write_text("{}")
    folder = tmp_path / "run"
    config = {"seed": 3, "search": {"epochs": 4}, "long": "x" * 3 * BLOCK}

    run = WandbRun(folder, "mmnas", "ssl_nas seed 3", config, group="ssl_nas", tags=["smoke"])
    for step in range(300):
        run.log("search", {"search/arch_loss": 1 / (step + 1)}, step)
    run.log("train", {"loss": 0.5, "val_f1_weighted": 0.25}, 7)
    run.image("curves", tmp_path / "curves.png")
    run.artifact("genotype", "genotype", [tmp_path / "genotype.json"], {"label_free": True})
    run.summary({"test/f1_weighted": 0.625})
    run.finish()
    run.finish()
    run.log("train", {"loss": 0.4}, 8)

    found = only_run(folder)
    (start,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (start.project, start.display_name, start.run_group) == ("mmnas", "ssl_nas seed 3", "ssl_nas")
    assert list(start.tags) == ["smoke"]
    assert items(start.config.update).items() >= config.items()

    history = [items(r.history.item) for r in found if r.WhichOneof("record_type") == "history"]
    searched = [row for row in history if "search/arch_loss" in row]
    assert [row["search/step"] for row in searched] == list(range(300))
    assert searched[3]["search/arch_loss"] == 0.25
    trained = [row for row in history if "train/step" in row]
    assert [(row["train/step"], row["train/loss"], row["train/val_f1_weighted"]) for row in trained] == [
        (7, 0.5, 0.25)
    ]
    (shown,) = [row for row in history if "curves._type" in row]
    assert (shown["curves._type"], shown["curves.width"], shown["curves.height"]) == ("image-file", 4, 3)
    assert list(folder.glob(f"wandb/offline-run-*/files/{shown['curves.path']}"))

    metrics = [r.metric for r in found if r.WhichOneof("record_type") == "metric"]
    assert ("search/*", "search/step") in {(metric.glob_name, metric.step_metric) for metric in metrics}
    artifacts = [r.request.log_artifact.artifact for r in found if r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in found if r.WhichOneof("record_type") == "artifact"]
    (artifact,) = [artifact for artifact in artifacts if artifact.name == "genotype"]
    assert json.loads(artifact.metadata) == {"label_free": True}
    assert [entry.path for entry in artifact.manifest.contents] == ["genotype.json"]
    summaries = [items(r.summary.update) for r in found if r.WhichOneof("record_type") == "summary"]
    assert any(summary.get("test/f1_weighted") == 0.625 for summary in summaries)
    assert list(home.rglob("*")) == []


def test_a_failing_start_is_one_warning(tmp_path, monkeypatch, caplog):
    import wandb

    def refuse(**_):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    run = WandbRun(tmp_path, "mmnas", "name", {})
    run.log("train", {"loss": 1.0}, 0)
    run.image("curves", tmp_path / "absent.png")
    run.artifact("genotype", "genotype", [], {})
    run.summary({"test/loss": 1.0})
    run.finish()
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "did not start" in warning.getMessage()
    assert "no route to host" in warning.getMessage()


def test_an_absent_package_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    WandbRun(tmp_path, "mmnas", "name", {}).log("train", {"loss": 1.0}, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_auto_is_online_for_a_key_only(home, monkeypatch):
    assert _automatic_mode() == "offline"
    (home / ".netrc").write_text("machine other.example login user password 0\n")
    assert _automatic_mode() == "offline"
    (home / ".netrc").write_text("machine api.wandb.ai login user password 0\n")
    (home / ".netrc").chmod(0o600)
    assert _automatic_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert _automatic_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert _automatic_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _automatic_mode() == "offline"


def test_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="offline, online or auto, got 'dryrun'"):
        WandbRun(tmp_path, "mmnas", "name", {}, mode="dryrun")
