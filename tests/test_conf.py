import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from mmnas_lab.build import GROUPS, check_config, check_schema, parameter_names, target
from mmnas_lab.types import InputError

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
SNAPSHOTS = ROOT / "tests/snapshots/experiment"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("[!_]*.yaml"))
SCALES = sorted(path.stem for path in (CONF / "scale").glob("*.yaml"))
CHOICES = sorted((group, path.stem) for group in GROUPS for path in (CONF / group).glob("*.yaml"))
GENOTYPE = "strategy.genotype=genotype.json"


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    return values


def targets(node: Any) -> list[str]:
    if not isinstance(node, dict):
        return []
    here = [node["_target_"]] if "_target_" in node else []
    return here + [name for value in node.values() for name in targets(value)]


def test_the_walk_found_some():
    assert len(EXPERIMENTS) >= 4
    assert {"cpu", "paper", "smoke"} <= set(SCALES)
    assert {group for group, _ in CHOICES} == set(GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_mirrors_the_package_and_composes(group, choice):
    overrides = [f"{group}={choice}", *([GENOTYPE] if choice == "fixed" else [])]
    node = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    names = targets(node)
    assert "_target_" in node or "defaults" in node
    assert all(name.startswith(f"mmnas_lab.{group}.") for name in names)
    if group == "search_space":
        overrides.append(f"sizes={choice}")  # a space comes with its sizes, and two of them with pixels
        overrides += ["experiment=darts_cifar10"] * (choice != "fusion")
    if choice == "image_folder":
        overrides.append("dataset.path=pictures")
    check_config(composed(*overrides))
    for name in names:
        read = parameter_names(name)
        signature = inspect.signature(target({"_target_": name}, group)).parameters
        assert read is None or read == list(signature)


@pytest.mark.parametrize("group", ["trainer", "logger", "launcher", "scale"])
def test_every_choice_without_a_class_composes(group):
    choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert choices
    for choice in choices:
        check_config(composed(f"{group}={choice}"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_at_every_scale(experiment, scale):
    values = composed(f"experiment={experiment}", f"scale={scale}")
    config = check_config(values)
    check_schema(values)
    assert (config.experiment, config.scale) == (experiment, scale)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_composed_configuration_is_the_reviewed_one(experiment):
    text = yaml.safe_dump(composed(f"experiment={experiment}"), sort_keys=False, allow_unicode=True)
    snapshot = SNAPSHOTS / f"{experiment}.yaml"
    if os.environ.get("MMNAS_UPDATE_SNAPSHOTS"):
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.write_text(text)
    assert snapshot.read_text() == text, "MMNAS_UPDATE_SNAPSHOTS=1 pytest tests/test_conf.py takes this over"


ZERO_ONE = "mmnas_lab.objective.regularisers.ZeroOne"


def regularised(**node):
    values = composed()
    values["search"]["regularisers"] = {"zero_one": node}
    return values


def test_regularisers_are_nodes_by_name():
    config = check_config(regularised(weight=10.0, function={"_target_": ZERO_ONE, "form": "l1"}))
    assert config.search.regularisers["zero_one"].weight == 10


@pytest.mark.parametrize("check", [check_config, check_schema])
@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"wieght": 1}, r"unknown key 'search\.regularisers\.zero_one\.wieght'; did you mean weight\?"),
        (
            {"function": {"_target_": ZERO_ONE, "from": "l1"}},
            r"function\.from'; did you mean form\?",
        ),
        ({"weight": -1.0}, r"search\.regularisers\.zero_one\.weight=-1\.0: .*greater than or equal to 0"),
    ],
)
def test_a_misspelt_regulariser_is_named(check, node, message):
    with pytest.raises(InputError, match=message):
        check(regularised(**({"weight": 1.0, "function": {"_target_": ZERO_ONE}} | node)))


SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml") if path.stem != "none")


def values_of(override: Override) -> list[str]:
    """What a sweep goes through for one key, as words of a command line."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return [str(value) for value in override.sweep_string_iterator()]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_job_of_a_sweep_composes(sweep):
    params = yaml.safe_load((CONF / f"sweep/{sweep}.yaml").read_text())["hydra"]["sweeper"]["params"]
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    grid = {override.key_or_group: values_of(override) for override in parsed}
    others = [f"{key}={values[-1]}" for key, values in grid.items() if key != "experiment"]
    for experiment in grid["experiment"]:
        config = check_config(composed(f"sweep={sweep}", f"experiment={experiment}", *others))
        assert config.experiment == experiment


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_says_what_hydra_runs(sweep):
    """The defaults of a sweep reach Hydra's own sweeper, as more than one job."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", [f"sweep={sweep}"], return_hydra_config=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    assert "experiment" in hydra.sweeper.params
    assert "seed" in hydra.sweeper.params


def test_no_snapshot_is_left_over():
    assert sorted(path.stem for path in SNAPSHOTS.iterdir()) == EXPERIMENTS


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_says_first_what_it_is(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    assert len(lines[0].split()) > 2
