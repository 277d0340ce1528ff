"""Which strategies and objectives fit which search space: asked before a run, and shown in the README.

`python -m mmnas_lab.fits` prints the README's table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from mmnas_lab.build import build, build_with_facts, target
from mmnas_lab.types import InputError

CONF = Path(__file__).parent.parent / "conf"
GENOTYPE = "DARTS_V2"
"""A genotype for the one strategy that has no default."""


def strategy_unfit(strategy: Any, space: Any) -> str | None:
    """Why a strategy cannot search a space; None where it can."""
    needed = {"hypernet": "a hypernet", "candidate": "stages of candidates", "sample": "genotypes to draw"}
    for method, what in needed.items():
        if method in strategy.space_needs and not hasattr(space, method):
            return f"strategy={strategy.name} needs a search space with {what}, and '{space.name}' has none"
    if "revised" in strategy.space_needs and not getattr(space, "revises", False):
        return f"strategy={strategy.name} compares single genotypes, which '{space.name}' does not list"
    return None


def objective_unfit(node: Mapping[str, Any], space: Any) -> str | None:
    """Why an objective, or one of those within a mix, cannot drive a search of a space; None where it can."""
    unfit: Callable[[Any, Mapping[str, Any]], str | None] | None
    unfit = getattr(target(dict(node), "objective"), "unfit", None)
    if unfit is not None and (reason := unfit(space, node)):
        return reason
    within = [value for value in node.values() if isinstance(value, Mapping) and "_target_" in value]
    return next((reason for value in within if (reason := objective_unfit(value, space))), None)


def refuse_unfit(strategy: Any, objective: Mapping[str, Any], space: Any) -> None:
    """Compare what a search is made of.

    Raises:
        InputError: parts that do not fit the space, with those that do.
    """
    if reason := strategy_unfit(strategy, space):
        fitting = [name for name, one in strategies().items() if strategy_unfit(one, space) is None]
        raise InputError(f"{reason}; choose strategy={' or '.join(fitting)}")
    if "pins" in strategy.space_needs and not getattr(space, "pins", True):
        raise InputError(
            f"strategy={strategy.name} needs a hypernet that can stand for single genotypes, and one mixture "
            "for both inputs of a cell cannot; set search_space.pairing=distinct, or strategy=bilevel"
        )
    if strategy.needs_data and (reason := objective_unfit(objective, space)):
        fitting = [name for name, node in nodes("objective").items() if objective_unfit(node, space) is None]
        raise InputError(f"{reason}; choose objective={' or '.join(fitting)}")


def nodes(group: str) -> dict[str, dict[str, Any]]:
    """The bundled choices of a group of the configuration, by name."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    found: dict[str, dict[str, Any]] = {}
    begun = GlobalHydra.instance().is_initialized()  # by the command line
    start = nullcontext() if begun else hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3")
    with start:
        for path in sorted((CONF / group).glob("*.yaml")):
            given = {"fixed": [f"strategy.genotype={GENOTYPE}"]}.get(path.stem, [])
            config = hydra.compose("config", overrides=[f"{group}={path.stem}", *given])
            found[path.stem] = OmegaConf.to_container(config[group], resolve=True)  # type: ignore[assignment]
    return found


def strategies() -> dict[str, Any]:
    """The bundled strategies with their defaults."""
    return {name: build(node, "strategy") for name, node in nodes("strategy").items()}


def spaces() -> dict[str, Any]:
    """The bundled search spaces with their defaults."""
    # As their files say: a composed one also holds what the default experiment sets.
    return {
        path.stem: build_with_facts(yaml.safe_load(path.read_text()), "search_space", {})
        for path in sorted((CONF / "search_space").glob("*.yaml"))
    }


def table() -> str:
    """What fits what, in Markdown: a column a search space, a row a strategy or objective."""
    every = spaces()
    lines = [
        f"| | {' | '.join(f'`{name}`' for name in every)} |",
        f"|---|{':---:|' * len(every)}",
    ]
    rows = {
        f"`strategy={name}`": [strategy_unfit(strategy, space) for space in every.values()]
        for name, strategy in strategies().items()
    }
    rows |= {
        f"`objective={name}`": [objective_unfit(node, space) for space in every.values()]
        for name, node in nodes("objective").items()
    }
    for label, reasons in rows.items():
        lines.append(f"| {label} | {' | '.join('-' if reason else 'yes' for reason in reasons)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
