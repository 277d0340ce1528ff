"""Greedy micro-benchmarks: what is scored, how ties are broken, and what the store saves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fits import runtime

from mmnas_lab.config import Optimizer, Search
from mmnas_lab.loader import draw_clean
from mmnas_lab.objective.multi_head import MultiHead
from mmnas_lab.score_store import ScoreStore
from mmnas_lab.search_space.mixers.space import MixerSpace
from mmnas_lab.strategy.base import Problem
from mmnas_lab.strategy.bench import Bench, Trial
from mmnas_lab.strategy.data_sample import draw_sample
from mmnas_lab.strategy.decision import decide
from mmnas_lab.strategy.micro_benchmark import MicroBenchmark
from mmnas_lab.types import Batch, InputError, InputInfo

INFOS = {
    "frame": InputInfo((1, 4, 4), "frame", "image"),
    "pulse": InputInfo((6, 3), "pulse", "series"),
}
MLP = {
    "_target_": "mmnas_lab.search_space.mixers.mlp_mixer.MLPMixer",
    "token_hidden": 4, "channel_hidden": 6, "num_blocks": 1,
}  # fmt: skip
HYPER = {
    "_target_": "mmnas_lab.search_space.mixers.hyper_mixer.HyperMixer",
    "token_hidden": 4, "channel_hidden": 6, "num_blocks": 1,
}  # fmt: skip
MONARCH = {"_target_": "mmnas_lab.search_space.mixers.monarch_mixer.MonarchMixer", "num_blocks": 1}


class Signals:
    """Rows whose pictures tell the class; the series tell nothing."""

    def __init__(self, count, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.infos = INFOS
        self.labels = torch.arange(count) % 2
        self.frame = torch.randn(count, 1, 4, 4, generator=draw) + 2.0 * self.labels[:, None, None, None]
        self.pulse = torch.randn(count, 6, 3, generator=draw)

    def __len__(self):
        return len(self.frame)

    def clean(self, index):
        return Batch(({"frame": self.frame[index], "pulse": self.pulse[index]},), self.labels[index])


def space(**more):
    encoders = {
        "image": {"mlp_mixer": {**MLP, "patch": 2}, "hyper_mixer": {**HYPER, "patch": 2}},
        "series": {"mlp_mixer": MLP, **more},
    }
    return MixerSpace(encoders, ["concat", "mean"], {"mlp_mixer": MLP, "hyper_mixer": HYPER}, width=4)


def problem(folder, one=None, epochs=2, select="auto", seed=0):
    settings = Search(
        epochs=epochs, batch_size=8, optimizer=Optimizer(lr=0.02), arch_optimizer=Optimizer(), on="train_val"
    )

    def objective(info):
        return MultiHead(info.embedding, "multiclass", ("no", "yes"), torch.zeros(2), info, select=select)

    return Problem(
        one or space(), INFOS, objective, MultiHead.needs, Signals(64), Signals(32, 1), draw_clean, settings,
        seed, runtime(), root=folder, data="signals", objective_settings={"name": "multi_head"},
    )  # fmt: skip


def strategy(**settings):
    return MicroBenchmark(**{"seeds": 2, "fraction": 0.5, "distance": 0.2, **settings})


def searched(folder, one=None, epochs=2, seed=0, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "search").mkdir(exist_ok=True)
    return strategy(**settings).search(problem(folder, one, epochs, seed=seed), folder / "search")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    return folder, searched(folder)


def test_every_choice_is_made_and_told(done):
    _, result = done
    assert set(result.margins) == {"encoder.frame", "encoder.pulse", "fusion_function", "fusion_network"}
    assert result.genotype.features == ("frame", "pulse")
    decisions = result.selection["decisions"]
    for name, decision in decisions.items():
        assert decision["option"] in decision["options"]
        if name != "encoder.pulse":
            assert all(len(option["scores"]) == 2 for option in decision["options"].values())
    assert result.selection["sample"]["rows"] == 32
    assert result.selection["name"] == "accuracy"
    assert result.selection["new_scores"] == 10  # 2 seeds of 2 encoders, 2 functions and one more network
    assert max(decisions["encoder.frame"]["options"]["mlp_mixer"]["scores"]) > 0.6


def test_what_is_in_the_store_is_not_measured_again(done):
    folder, first = done
    again = searched(folder)
    assert again.selection["new_scores"] == 0
    assert again.genotype == first.genotype
    assert again.selection["decisions"] == first.selection["decisions"]


def test_searches_of_two_seeds_share_no_micro_benchmark(tmp_path):
    # The sample is the whole data, so that nothing but the seeds tells the searches apart.
    first, second = (searched(tmp_path, epochs=1, seed=seed, fraction=1.0) for seed in (0, 1))
    assert first.selection["sample"]["rows"] == second.selection["sample"]["rows"] == 64
    assert second.selection["new_scores"] >= 8
    options = [each.selection["decisions"]["encoder.frame"]["options"] for each in (first, second)]
    assert options[0].keys() == options[1].keys()
    assert all(options[0][name]["scores"] != options[1][name]["scores"] for name in options[0])
    assert searched(tmp_path, epochs=1, seed=1, fraction=1.0).selection["new_scores"] == 0


def test_a_candidate_added_later_is_the_only_one_measured(done):
    folder, _ = done
    more = searched(folder, space(monarch_mixer=MONARCH))
    taken = more.selection["decisions"]["encoder.pulse"]["option"]
    # 2 seeds of the new encoder and of the one that had no rival; with the new one taken, fusion is new too.
    assert more.selection["new_scores"] == 4 + (6 if taken == "monarch_mixer" else 0)
    assert searched(folder, epochs=1).selection["new_scores"] == 10


def test_an_interrupted_search_goes_on_to_the_same_choice(done, tmp_path, monkeypatch):
    _, expected = done
    original, calls = Bench.measure, []

    def stop(self, trial):
        calls.append(trial)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, trial)

    monkeypatch.setattr(Bench, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path)
    monkeypatch.setattr(Bench, "measure", original)
    result = searched(tmp_path)
    assert result.selection["new_scores"] == 5
    assert result.selection["decisions"] == expected.selection["decisions"]
    assert result.genotype == expected.genotype


def test_two_workers_give_the_same_scores(done, tmp_path):
    _, expected = done
    result = searched(tmp_path, workers=2)
    assert result.selection["decisions"] == expected.selection["decisions"]


def test_the_order_of_candidates_changes_no_score(done, tmp_path):
    _, expected = done
    turned = space()
    turned.encoders["image"] = dict(reversed(turned.encoders["image"].items()))
    result = searched(tmp_path, turned)
    before, after = (r.selection["decisions"]["encoder.frame"]["options"] for r in (expected, result))
    assert {k: v["scores"] for k, v in before.items()} == {k: v["scores"] for k, v in after.items()}


def test_halving_measures_the_better_options_longer(tmp_path):
    three = space(monarch_mixer=MONARCH, hyper_mixer=HYPER)
    result = searched(tmp_path, three, epochs=4, halving=True)
    decisions = result.selection["decisions"]
    assert len(decisions["encoder.pulse"]["options"]) == 2
    assert len(decisions["encoder.frame"]["options"]) == 2
    whole = searched(tmp_path, three, epochs=4)
    assert len(whole.selection["decisions"]["encoder.pulse"]["options"]) == 3
    kept = decisions["encoder.pulse"]["options"]
    assert kept.items() <= whole.selection["decisions"]["encoder.pulse"]["options"].items()


def test_a_failed_trial_loses_no_other(tmp_path, monkeypatch):
    original = Bench.measure

    def fail(self, trial):
        if trial.option == "hyper_mixer" and trial.seed == 1:
            raise ZeroDivisionError
        return original(self, trial)

    monkeypatch.setattr(Bench, "measure", fail)
    with pytest.raises(ZeroDivisionError):
        searched(tmp_path, workers=2)
    monkeypatch.setattr(Bench, "measure", original)
    kept = len(ScoreStore(tmp_path / "scores.sqlite").rows())
    assert kept >= 1
    assert searched(tmp_path).selection["new_scores"] == 10 - kept


def test_without_labels_the_loss_scores(tmp_path):
    from mmnas_lab.objective.nt_xent import NTXent

    def draw(source, index, generator):
        (view,) = source.clean(index).views
        noisy = [
            {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in view.items()} for _ in "ab"
        ]
        return Batch(tuple(noisy))

    given = replace(
        problem(tmp_path),
        objective=lambda info: NTXent(info.embedding, 0.5, hidden=5, projection=4),
        needs=NTXent.needs,
        draw=draw,
    )
    for source in (given.weights, given.architecture):
        source.labels = None
        source.clean = lambda index, source=source: Batch(
            ({"frame": source.frame[index], "pulse": source.pulse[index]},)
        )
    result = strategy().search(given, tmp_path)
    assert result.selection["name"] == "loss"
    assert result.selection["sample"]["distance"] is None
    scores = result.selection["decisions"]["encoder.frame"]["options"]["mlp_mixer"]["scores"]
    assert max(scores) < 0  # losses, the sign turned


def test_a_clear_difference_wins_and_noise_is_a_tie_broken_by_cost():
    clear = decide({"big": [0.9, 0.91, 0.92], "small": [0.5, 0.52, 0.51]}, {"big": 9, "small": 1}, 2.0)
    assert clear.option == "big"
    assert clear.tied == ("big",)
    assert clear.confidence > 0.99
    noisy = decide({"big": [0.9, 0.5, 0.7], "small": [0.5, 0.89, 0.69]}, {"big": 9, "small": 1}, 2.0)
    assert noisy.option == "small"
    assert set(noisy.tied) == {"big", "small"}
    assert noisy.confidence < 0.6
    paired = decide({"big": [0.9, 0.5, 0.7], "small": [0.88, 0.48, 0.68]}, {"big": 9, "small": 1}, 2.0)
    assert paired.option == "big"  # the seeds differ more than the options, which are compared within a seed
    single = decide({"big": [0.9], "small": [0.8]}, {"big": 9, "small": 1}, 2.0)
    assert single.option == "big"
    assert single.confidence is None
    assert np.isfinite(list(noisy.flops.values())).all()


@pytest.mark.parametrize(
    "settings",
    [{"seeds": 0}, {"seeds": 1001}, {"workers": 0}, {"fraction": 0.0}, {"z": 0.0}, {"p": 1.0},
     {"held_rows": 0},
     {"tie": -1.0}, {"seconds": 0.0}],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match="strategy"):
        MicroBenchmark(**settings)


def test_several_devices_are_refused(tmp_path):
    given = replace(problem(tmp_path), runtime=replace(runtime(), devices=2))
    with pytest.raises(InputError, match="one device"):
        strategy().search(given, tmp_path)


def test_scores_under_another_precision_are_not_taken_for_these(tmp_path):
    given = problem(tmp_path)
    sample = draw_sample(given.weights, 32, "random", 0, 0.2)
    mixed = replace(given, runtime=replace(given.runtime, precision="bf16-mixed"))
    genotype = given.space.candidate("encoder.frame", "mlp_mixer", {}, INFOS)
    trial = Trial("encoder.frame", "mlp_mixer", genotype, 0, 2)
    keys = [Bench(strategy(), one, sample).key(trial)[0] for one in (given, mixed)]
    assert keys[0] != keys[1]


def test_scores_are_of_the_metric_that_selects_and_kept_under_its_name(tmp_path):
    """One store, two metrics: none is taken for the other, and the loss is the better the smaller it is."""
    found = {}
    for select in ("auto", "auroc", "loss"):
        result = strategy().search(problem(tmp_path, select=select), tmp_path)
        found[select] = result.selection
    assert [found[select]["name"] for select in found] == ["accuracy", "auroc", "loss"]
    assert len({selection["new_scores"] for selection in found.values()}) == 1  # nothing was reused
    rows = ScoreStore(tmp_path / "scores.sqlite").rows()
    assert {row["metric"] for row in rows} == {"accuracy", "auroc", "loss"}
    assert len({row["key"] for row in rows}) == len(rows)
    options = found["loss"]["decisions"]["encoder.frame"]["options"].values()
    assert all(score < 0 for option in options for score in option["scores"])


def test_an_encoder_of_one_modality_reads_a_source_of_it_alone(tmp_path):
    asked = []

    def restricted(names):
        asked.append(names)
        return Signals(64), Signals(32, 1)

    strategy().search(replace(problem(tmp_path), restricted=restricted), tmp_path)
    assert asked == [("frame",)]  # the other modality had one encoder, and nothing to measure
