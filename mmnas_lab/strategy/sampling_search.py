"""Strategies without gradients: a genotype that is given, and random draws."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from mmnas_lab import distributed
from mmnas_lab.config import FitSettings
from mmnas_lab.loader import Batches, FixedBatches
from mmnas_lab.randomness import generator, seed_of
from mmnas_lab.stage import write_json
from mmnas_lab.strategy.base import Problem, SearchResult
from mmnas_lab.training import Point, train
from mmnas_lab.types import InputError


class Fixed:
    """A given genotype, with no search at all.

    Args:
        genotype: path of a `genotype.json`, as a run leaves it, or the name of a published genotype of the
            space (`DARTS_V2`), or of one of its fixed networks (`m2_mixer`, a modality).
    """

    name = "fixed"
    space_needs = ()
    needs_data, regularised, splits_train = False, False, True

    def __init__(self, genotype: str) -> None:
        path = Path(genotype)
        self.data: dict[str, Any] | None = None
        self.published = genotype
        if not path.is_file():
            if path.suffix != ".json" and len(path.parts) == 1:
                return
            raise InputError(
                f"strategy.genotype: no file '{genotype}'; give the genotype.json of a finished run"
            )
        try:
            self.data = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"strategy.genotype: '{genotype}' is not JSON ({error})") from None

    def settings(self) -> dict[str, Any]:
        """The genotype itself, not the file's name, is what the result depends on."""
        return {"genotype": self.published if self.data is None else self.data}

    def search(self, problem: Problem, folder: Path) -> SearchResult:
        """The given genotype, checked against the space and its inputs."""
        if self.data is None:
            try:
                genotype = problem.space.fixed(self.published, problem.inputs)
            except InputError as error:
                raise InputError(
                    f"strategy.genotype: no file '{self.published}', and space '{problem.space.name}' knows "
                    f"no such network ({error}); give the genotype.json of a finished run"
                ) from None
            return SearchResult(genotype, {}, {"name": "published"})
        return SearchResult(problem.space.parse(self.data, problem.inputs), {}, {"name": "fixed"})


class Random:
    """Random search: genotypes drawn uniformly, each trained for a while, the best on the held half taken.

    Args:
        draws: at most so many.
        epochs: that each draw is trained on the weight half, by the search's objective and optimizer.
        seconds: stop drawing after this time, for a comparison within the time of another search
            (`timing.search.seconds` of its record); null for no limit. Where the limit bites, the number of
            draws depends on the machine.
    """

    name = "random"
    space_needs = ("sample",)
    needs_data, regularised, splits_train = True, False, True

    def __init__(self, draws: int = 8, epochs: int = 10, seconds: float | None = None) -> None:
        if draws < 1 or epochs < 1:
            raise InputError(
                f"strategy.draws and strategy.epochs must be at least 1, got {draws} and {epochs}"
            )
        self.draws, self.epochs, self.seconds = draws, epochs, seconds

    def search(self, problem: Problem, folder: Path) -> SearchResult:
        """The draw with the lowest eval-mode loss on the architecture half."""
        store = folder / "draws.json"
        results: list[dict[str, Any]] = distributed.broadcast(
            json.loads(store.read_text()) if store.exists() else []
        )
        draw_from = generator(problem.seed, "search", "draws")
        started = time.monotonic() - sum(result["seconds"] for result in results)
        for number in range(self.draws):
            genotype = problem.space.sample(problem.inputs, draw_from)
            if number < len(results):
                continue
            late = self.seconds is not None and time.monotonic() - started >= self.seconds
            if number > 0 and distributed.broadcast(late):
                break
            results.append({"genotype": genotype.to_json(), **self._score(problem, genotype, number, folder)})
            if distributed.rank() == 0:
                write_json(store, results)
        best = min(range(len(results)), key=lambda k: results[k]["loss"])
        history = [Point(k, k, "search/eval_loss", result["loss"]) for k, result in enumerate(results)]
        return SearchResult(
            problem.space.parse(results[best]["genotype"], problem.inputs),
            {},
            {"name": "search/eval_loss", "value": results[best]["loss"], "draw": best, "draws": len(results)},
            history,
        )

    def _score(self, problem: Problem, genotype: Any, number: int, folder: Path) -> dict[str, float]:
        settings, address = problem.settings, (problem.seed, "search", f"draw.{number}")
        whole = problem.needs.views == 2
        torch.manual_seed(seed_of(*address, "init"))
        network = problem.space.build(genotype, problem.inputs)
        started = time.monotonic()
        held = FixedBatches(
            problem.architecture, problem.draw, settings.batch_size, (problem.seed, "search", "held"), whole
        )
        trained = train(
            network,
            problem.objective(network.info),
            Batches(problem.weights, problem.draw, settings.batch_size, address, whole),
            held,
            FitSettings(**{name: getattr(settings, name) for name in FitSettings.model_fields}),
            label=f"search.draw.{number}",
            address=address,
            runtime=problem.runtime,
            num_epochs=self.epochs,
            save_point=folder / "draw.ckpt",
        )
        loss = trained.scored.objective.evaluate(trained.scored.network, held)["loss"]
        return {"loss": loss, "seconds": time.monotonic() - started}
