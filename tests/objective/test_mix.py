"""A mix is the weighted sum of its terms, with weights of its own in each half-step."""

import pytest
import torch
from conftest import INFOS, TinySource
from torch import nn

from mmnas_lab.build import build_with_facts, check_node
from mmnas_lab.experiment import Experiment
from mmnas_lab.loader import FixedBatches, draw_pairs
from mmnas_lab.objective.barlow_twins import BarlowTwins
from mmnas_lab.objective.base import Needs
from mmnas_lab.objective.masked_reconstruction import MaskedReconstruction
from mmnas_lab.objective.mix import Mix, Term
from mmnas_lab.objective.nt_xent import NTXent
from mmnas_lab.objective.supervised import Supervised
from mmnas_lab.types import Batch, InputError, Output, OutputInfo

CLASSES = ("a", "b", "c")
MIX = "mmnas_lab.objective.mix.Mix"
TERM = "mmnas_lab.objective.mix.Term"


class Counted(nn.Module):
    """A linear network on `text.0` that counts its samples."""

    def __init__(self):
        super().__init__()
        self.linear, self.batches = nn.Linear(5, 6), []

    def forward(self, inputs):
        self.batches.append(len(inputs["text.0"]))
        return Output(self.linear(inputs["text.0"][..., 0]), {})


def parts():
    torch.manual_seed(0)
    return {
        "contrast": NTXent(6, 0.5, hidden=5, projection=4),
        "twins": BarlowTwins(6, hidden=5, projection=4),
        "classes": Supervised(6, "multilabel", CLASSES, torch.zeros(3)),
    }


def batch():
    return TinySource(6).views(torch.arange(6), torch.Generator().manual_seed(1), 2)


def losses_of(objectives, network):
    return {name: objective(network, batch()).total for name, objective in objectives.items()}


def test_it_is_the_weighted_sum_of_each_half():
    objectives, network = parts(), Counted()
    mix = Mix(
        contrast=Term(objectives["contrast"], arch=2.0, weights=0.5),
        twins=Term(objectives["twins"], arch=0.1, weights=0.3),
        classes=Term(objectives["classes"], arch=0.0, weights=4.0),
    )
    each = {name: loss.item() for name, loss in losses_of(objectives, network).items()}
    arch, weights = mix(network, batch(), "arch"), mix(network, batch(), "weights")
    assert arch.total.item() == pytest.approx(2 * each["contrast"] + 0.1 * each["twins"], rel=1e-5)
    expected = 0.5 * each["contrast"] + 0.3 * each["twins"] + 4 * each["classes"]
    assert weights.total.item() == pytest.approx(expected, rel=1e-5)
    assert mix(network, batch()).total.item() == pytest.approx(expected, rel=1e-5), "plain training"
    twins = {"twins_loss", "twins_invariance", "twins_redundancy"}
    assert arch.parts.keys() == {"loss", "contrast_loss", *twins}
    assert weights.parts.keys() == {"loss", "contrast_loss", *twins, "classes_loss"}
    for losses in (arch, weights):
        assert losses.parts["loss"].item() == pytest.approx(losses.total.item(), rel=1e-5)
        assert losses.parts["contrast_loss"].item() == pytest.approx(each["contrast"], rel=1e-5)
        assert not any(part.requires_grad for part in losses.parts.values())


def test_a_term_that_the_weights_do_not_learn_from_trains_its_own_head():
    objectives, network = parts(), Counted()
    mix = Mix(
        twins=Term(objectives["twins"], arch=1.0, weights=0.0),
        classes=Term(objectives["classes"], arch=0.0, weights=2.0),
    )
    losses = mix(network, batch(), "weights")
    assert network.batches == [6, 6]  # the first view once for both terms
    losses.total.backward()
    mixed = [p.grad.clone() for p in network.parameters()]
    head = [p.grad.clone() for p in objectives["twins"].parameters()]
    for module in (network, mix):
        module.zero_grad()
    alone = losses_of(objectives, network)
    assert losses.parts["loss"].item() == pytest.approx(2 * alone["classes"].item(), rel=1e-5)
    expected = torch.autograd.grad(2 * alone["classes"], list(network.parameters()))
    for one, other in zip(mixed, expected, strict=True):
        torch.testing.assert_close(one, other)
    expected = torch.autograd.grad(alone["twins"], list(objectives["twins"].parameters()))
    for one, other in zip(head, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_parameter_takes_part_in_the_weight_half_step(generator):
    infos = {"text.0": INFOS["text.0"]}
    learned = MaskedReconstruction(
        OutputInfo(6), infos, unit="channel", patch=1, fill="learned", decoder="plain"
    )
    mix = Mix(masks=Term(learned, weights=0.0), twins=Term(parts()["twins"]))
    network = Counted()
    mix(network, batch(), "weights").total.backward()
    assert all(p.grad is not None for p in (*mix.parameters(), *network.parameters()))


def test_views_that_several_terms_read_are_computed_once():
    objectives, network = parts(), Counted()
    Mix(twins=Term(objectives["twins"]), classes=Term(objectives["classes"]))(network, batch(), "arch")
    assert network.batches == [6, 6]


def test_it_needs_what_its_terms_need():
    objectives = parts()
    mixes = {
        "twins": (Needs(2, False), ("weights_loss", "min")),
        "classes": (Needs(1, True), ("classes_f1_weighted", "max")),
    }
    for name, (needs, selects) in mixes.items():
        mix = Mix(**{name: Term(objectives[name])})
        assert (mix.needs, mix.selects) == (needs, selects)
    both = Mix(twins=Term(objectives["twins"]), classes=Term(objectives["classes"]))
    assert both.needs == Needs(2, True)
    assert both.selects == ("classes_f1_weighted", "max")
    probe = Mix(twins=Term(objectives["twins"]), classes=Term(objectives["classes"], weights=0.0))
    assert probe.selects == ("weights_loss", "min")
    for name in objectives:
        assert isinstance(objectives[name].needs, Needs)


def test_label_free_terms_read_no_label():
    objectives, network = parts(), Counted()
    mix = Mix(contrast=Term(objectives["contrast"]), twins=Term(objectives["twins"]))
    hidden = Batch(batch().views, object())  # what no loss can read
    assert mix(network, hidden).total.item() == mix(network, Batch(batch().views)).total.item()


def test_evaluation_weighs_for_the_search_and_for_training():
    objectives, network = parts(), Counted()
    mix = Mix(
        contrast=Term(objectives["contrast"], arch=2.0, weights=0.0),
        classes=Term(objectives["classes"], arch=0.5, weights=3.0),
    ).eval()
    held = FixedBatches(TinySource(14), draw_pairs, 4, (0, "held"), whole=True)
    values = mix.evaluate(network, held)
    own = {name: objectives[name].evaluate(network, held) for name in ("contrast", "classes")}
    for name, quantities in own.items():
        assert {f"{name}_{k}": v for k, v in quantities.items()}.items() <= values.items()
    losses = {name: quantities["loss"] for name, quantities in own.items()}
    assert values["loss"] == pytest.approx(2 * losses["contrast"] + 0.5 * losses["classes"])
    assert values["weights_loss"] == pytest.approx(3 * losses["classes"])
    assert mix.selects[0] in values


def test_what_is_refused():
    objective = parts()["twins"]
    with pytest.raises(InputError, match=r"objective.twins: weights must not be negative, got arch=-1"):
        Mix(twins=Term(objective, arch=-1.0))
    with pytest.raises(InputError, match=r"no term of the mix counts in the half-step 'arch'.*one of: twins"):
        Mix(twins=Term(objective, arch=0.0))
    with pytest.raises(InputError, match=r"half-step 'weights'"):
        Mix(twins=Term(objective, weights=0.0))
    with pytest.raises(InputError, match=r"no terms"):
        Mix()


NODE = {
    "_target_": MIX,
    "masks": {
        "_target_": TERM,
        "arch": 2.0,
        "objective": {
            "_target_": "mmnas_lab.objective.masked_reconstruction.MaskedReconstruction",
            "patch": 1,
            "decoder": "plain",
        },
    },
    "twins": {
        "_target_": TERM,
        "objective": {"_target_": "mmnas_lab.objective.barlow_twins.BarlowTwins", "hidden": 5},
    },
}


def test_a_node_is_built_with_the_facts_that_each_constructor_names():
    check_node(NODE, "objective")
    assert Experiment.objective_needs(NODE) == Needs(2, False)
    facts = {"embedding": 6, "output": OutputInfo(6), "inputs": INFOS, "task": "multilabel"}
    mix = build_with_facts(NODE, "objective", facts)
    assert (mix.terms["masks"].arch, mix.terms["masks"].weights) == (2.0, 1.0)
    assert mix.terms["masks"].objective.units.keys() == INFOS.keys()
    assert mix.terms["twins"].objective.projector[0].weight.shape == (5, 6)
    without = {"_target_": "mmnas_lab.objective.supervised.Supervised"}
    with pytest.raises(InputError, match="objective cannot be built: .*prior"):
        build_with_facts(without, "objective", facts)
    with pytest.raises(InputError, match="the mix has no terms"):
        Experiment.objective_needs({"_target_": MIX})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arhc": 1.0}, r"unknown key 'objective\.twins\.arhc'; did you mean arch\?"),
        ({"arch": "much"}, r"objective\.twins\.arch=much: .*number"),
        (
            {"objective": {**NODE["twins"]["objective"], "lambda": 1}},
            r"unknown key 'objective\.twins\.objective\.lambda'",
        ),
    ],
)
def test_a_misspelt_key_within_a_term_is_named(change, message):
    with pytest.raises(InputError, match=message):
        check_node({**NODE, "twins": {**NODE["twins"], **change}}, "objective")
