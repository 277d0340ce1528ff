"""The loss is the loop's, the network sees nothing of what is hidden, and masks are fresh."""

import pytest
import torch
from conftest import INFOS, TinySource, on_ranks
from reference import masked_reconstruction as reference
from torch import nn

from mmnas_lab import distributed
from mmnas_lab.loader import FixedBatches, draw_clean
from mmnas_lab.objective.masked_reconstruction import MaskedReconstruction
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.types import Batch, InputError, InputInfo, Output, OutputInfo

IMAGE = {"image": InputInfo((3, 8, 12), "image")}
LEVELS = OutputInfo(6, {"stage.0": (4, 4, 6), "stage.1": (6, 2, 3)})
FUSED = OutputInfo(24, {"cell.0": (3, 4), "cell.1": (3, 4)})


class Levels(nn.Module):
    """A CNN with two levels; the last input that it saw is kept."""

    def __init__(self, inputs=3):
        super().__init__()
        self.first = nn.Conv2d(inputs, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, inputs):
        self.seen = inputs["image"]
        fine = self.first(inputs["image"])
        coarse = self.second(torch.relu(fine))
        return Output(coarse.mean((2, 3)), {"stage.0": fine, "stage.1": coarse})


def fusion(generator, count=5):
    torch.manual_seed(1)
    network = FusionSpace(num_cells=2, num_steps=1, channels=3, length=4).hypernet(INFOS)
    inputs = {name: torch.randn(count, *info.shape, generator=generator) for name, info in INFOS.items()}
    return network, inputs


def images(generator, count=5):
    return {"image": torch.randn(count, 3, 8, 12, generator=generator)}


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("loss_on", ["masked", "all"])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_loss_of_images_is_the_loop(patch, loss_on, normalise, generator):
    objective = MaskedReconstruction(
        LEVELS, IMAGE, patch=patch, loss_on=loss_on, normalise_patches=normalise, mask_ratio=0.3
    )
    truth, output = images(generator), images(generator)
    masks = objective.masks(truth)
    expected = reference.loss(
        *([reference.patches(image, patch) for image in given["image"]] for given in (truth, output)),
        masks["image"],
        loss_on,
        normalise,
    )
    assert objective.loss(truth, masks, output).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_the_loss_of_features_counts_units_of_all_inputs_alike(loss_on, generator):
    objective = MaskedReconstruction(FUSED, INFOS, patch=1, loss_on=loss_on, normalise_patches=True)
    (_, truth), (_, output) = fusion(generator), fusion(generator)
    masks = objective.masks(truth)
    units = [
        [[unit for name in INFOS for unit in reference.runs(given[name][b], 1)] for b in range(5)]
        for given in (truth, output)
    ]
    expected = reference.loss(*units, torch.cat(list(masks.values()), 1), loss_on, True)
    assert objective.loss(truth, masks, output).item() == pytest.approx(expected.item(), rel=1e-5)


def test_all_inputs_together_hide_the_exact_count(generator):
    _, inputs = fusion(generator, 50)
    for unit, total in (("patch", 4 + 4 + 1), ("channel", 6 + 7 + 5), ("input", 3)):
        objective = MaskedReconstruction(FUSED, INFOS, unit=unit, patch=1, mask_ratio=0.4)
        masks = objective.masks(inputs)
        joined = torch.cat(list(masks.values()), 1)
        assert joined.shape == (50, total)
        assert joined.sum(1).tolist() == [round(0.4 * total)] * 50
        assert len({tuple(mask) for mask in joined.tolist()}) > 2


@pytest.mark.parametrize("fill", ["zero", "mean", "learned", "noise"])
def test_the_network_sees_nothing_of_what_is_hidden(fill, generator):
    objective, network = MaskedReconstruction(LEVELS, IMAGE, fill=fill, patch=2), Levels()
    inputs = images(generator)
    masks = objective.masks(inputs)
    hidden = objective.units["image"].expand(masks["image"])
    others = {"image": torch.where(hidden, 100.0, inputs["image"])}
    draws = [torch.Generator().manual_seed(4) for _ in range(2)]
    network(objective.filled(inputs, masks, draws[0]))
    seen = network.seen
    assert torch.equal(seen[~hidden], inputs["image"][~hidden])
    network(objective.filled(others, masks, draws[1]))
    torch.testing.assert_close(network.seen, seen)
    assert torch.equal(others["image"][hidden], torch.full((int(hidden.sum()),), 100.0)), "in place"


def test_what_fills_the_hidden_units(generator):
    inputs = {"image": 2 + images(generator)["image"]}

    def hidden_values(fill):
        objective = MaskedReconstruction(LEVELS, IMAGE, fill=fill, patch=2)
        for token in objective.tokens:
            token.data.copy_(torch.tensor([1.0, 2.0, 3.0])[:, None, None])
        masks = objective.masks(inputs)
        hidden = objective.units["image"].expand(masks["image"])
        return objective.filled(inputs, masks)["image"], hidden

    seen, hidden = hidden_values("zero")
    assert (seen[hidden] == 0).all()
    seen, hidden = hidden_values("learned")
    assert (seen[:, 1][hidden[:, 1]] == 2).all()
    assert (seen[:, 2][hidden[:, 2]] == 3).all()
    seen, hidden = hidden_values("mean")
    expected = inputs["image"][3, 1][~hidden[3, 1]].mean().item()
    torch.testing.assert_close(seen[3, 1][hidden[3, 1]].unique().item(), expected)
    seen, hidden = hidden_values("noise")
    assert seen[hidden].mean().abs() < 0.3
    assert seen[hidden].std().item() == pytest.approx(1, abs=0.2)


def test_masks_are_fresh_at_each_step_and_addressed_by_the_seed(generator):
    objective, network = MaskedReconstruction(LEVELS, IMAGE, patch=2), Levels()
    batch = Batch((images(generator),), object())  # labels that nothing can read
    seen = []
    for seed in (5, None, 5):
        if seed is not None:
            torch.manual_seed(seed)
        objective(network, batch)
        seen.append(network.seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    hidden = (seen[0] == 0).all(1)
    assert len({tuple(mask.flatten().tolist()) for mask in hidden}) == 5


@pytest.mark.parametrize("fill", ["zero", "learned", "noise"])
@pytest.mark.parametrize("kind", ["hierarchical", "plain"])
def test_images_are_decoded_from_the_levels(kind, fill, generator):
    objective, network = (
        MaskedReconstruction(LEVELS, IMAGE, patch=4, decoder=kind, fill=fill, width=5),
        Levels(),
    )
    inputs = images(generator)
    output = network(inputs)
    decoded = objective.decoder(output)
    assert decoded["image"].shape == (5, 3, 8, 12)
    fine = Output(output.embedding, {**output.taps, "stage.0": output.taps["stage.0"] + 1})
    assert torch.equal(objective.decoder(fine)["image"], decoded["image"]) == (kind == "plain")
    coarse = Output(output.embedding, {**output.taps, "stage.1": output.taps["stage.1"] + 1})
    assert not torch.equal(objective.decoder(coarse)["image"], decoded["image"])
    losses = objective(network, Batch((inputs,)))
    losses.total.backward()
    assert losses.parts == {"loss": losses.total}
    for name, parameter in [*objective.named_parameters(), *network.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_decoder_puts_each_pixel_where_it_belongs():
    """A decoder that was fitted reconstructs an image; one that moves or swaps pixels cannot."""
    torch.manual_seed(0)
    inputs = {"image": torch.randn(2, 3, 8, 12)}
    objective = MaskedReconstruction(OutputInfo(1, {"stage.0": (48, 2, 3)}), IMAGE, patch=4, width=48)
    taps = {"stage.0": torch.nn.functional.pixel_unshuffle(inputs["image"], 4)}
    output = Output(torch.zeros(2, 1), taps)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (objective.decoder(output)["image"] - inputs["image"]).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("unit", ["patch", "channel", "input"])
@pytest.mark.parametrize("kind", ["hierarchical", "plain"])
def test_features_are_decoded_from_the_fusion_hypernet(kind, unit, generator):
    network, inputs = fusion(generator)
    objective = MaskedReconstruction(
        network.info, INFOS, unit=unit, patch=1, decoder=kind, fill="learned", width=7
    )
    decoded = objective.decoder(network(inputs))
    assert {name: value.shape for name, value in decoded.items()} == {
        name: value.shape for name, value in inputs.items()
    }
    losses = objective(network, Batch((inputs,)))
    gradients = torch.autograd.grad(losses.total, list(network.arch.values()), retain_graph=True)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    losses.total.backward()
    for name, parameter in [*objective.named_parameters(), *network.named_parameters()]:
        assert parameter.grad is not None, name


def test_flat_features_are_channels_of_one_position(generator):
    infos = {"age": InputInfo((4,), "table"), "text.0": InputInfo((5, 1), "text")}
    inputs = {name: torch.randn(3, *info.shape, generator=generator) for name, info in infos.items()}
    objective = MaskedReconstruction(OutputInfo(4), infos, patch=1, decoder="plain")
    losses = objective(lambda given: Output(given["age"], {}), Batch((inputs,)))
    assert losses.total.item() > 0


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_held_masks_are_fixed_and_the_loss_is_a_mean_over_samples(fill, generator):
    objective, network = MaskedReconstruction(LEVELS, IMAGE, patch=2, fill=fill).eval(), Levels()
    batches = [Batch((images(generator, count),)) for count in (4, 2)]
    values = objective.evaluate(network, batches)
    torch.manual_seed(99)
    assert objective.evaluate(network, batches) == values
    assert values.keys() == {"loss"}
    each = [objective.evaluate(network, [batch])["loss"] for batch in batches]
    assert values["loss"] == pytest.approx((4 * each[0] + 2 * each[1]) / 6, rel=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_picture_has_input_masked_and_output(normalise, generator):
    objective, network = (
        MaskedReconstruction(LEVELS, IMAGE, patch=2, normalise_patches=normalise).eval(),
        Levels(),
    )
    inputs = {"image": 3 + 2 * images(generator)["image"]}
    picture = objective.reconstruct(network, Batch((inputs,)))
    assert torch.equal(picture.input["image"], inputs["image"])
    hidden = (picture.masked["image"] == 0).all(1, keepdim=True).expand_as(inputs["image"])
    assert hidden.float().mean().item() == pytest.approx(0.5)
    assert torch.equal(picture.masked["image"][~hidden], inputs["image"][~hidden])
    masks = {"image": objective.units["image"].split(hidden)[..., 0]}
    output = picture.output["image"]
    if normalise:  # back in the units of the input
        units = objective.units["image"]
        truth = units.split(inputs["image"])
        mean, std = truth.mean(-1, keepdim=True), (truth.var(-1, keepdim=True) + 1e-6).sqrt()
        output = units.join((units.split(output) - mean) / std)
    loss = objective.loss(inputs, masks, {"image": output}).item()
    assert loss == pytest.approx(objective.evaluate(network, [Batch((inputs,))])["loss"], rel=1e-4)
    again = objective.reconstruct(network, Batch((inputs,)))
    assert torch.equal(again.masked["image"], picture.masked["image"])


@pytest.mark.parametrize("ratio", [0, 1])
def test_a_ratio_of_0_or_1_is_refused(ratio):
    with pytest.raises(InputError, match=rf"objective.mask_ratio={ratio} hides {24 * ratio} of 24 units"):
        MaskedReconstruction(LEVELS, IMAGE, patch=2, mask_ratio=ratio)


@pytest.mark.parametrize(
    ("output", "inputs", "settings", "message"),
    [
        (LEVELS, IMAGE, {"patch": 5}, r"patch=5 does not divide 'image' of 8 x 12 .*; choose one of 1, 2, 4"),
        (FUSED, IMAGE, {}, r"images from feature maps .*'cell.0': \(3, 4\).*; choose a search space"),
        (OutputInfo(4, {"a": (2, 3, 6)}), IMAGE, {}, r"multiple of .* finest map, 3 x 6; 'image' is 8 x 12"),
        (OutputInfo(4, {"a": (2, 16, 24)}), IMAGE, {}, r"multiple of the network's finest map, 16 x 24"),
        (OutputInfo(4), INFOS, {"patch": 1}, r"needs taps of one length.*set objective.decoder=plain"),
        (LEVELS, {**IMAGE, **INFOS}, {}, r"images or pooled features of known shapes, got"),
        (FUSED, {}, {}, r"images or pooled features of known shapes, got {}"),
        (LEVELS, IMAGE, {"width": 0}, r"objective.width must be at least 1, got 0"),
        (
            FUSED, {"text.0": InputInfo((1, 4), "text")}, {"patch": 1, "normalise_patches": True},
            r"normalise_patches needs units of two values or more",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_reconstructed_is_refused(output, inputs, settings, message):
    with pytest.raises(InputError, match=message):
        MaskedReconstruction(output, inputs, **settings)


def whole_or_part(inputs, masks, rows, fill):
    """Loss and gradients of one process's rows under given masks; the network is without BatchNorm."""
    torch.manual_seed(0)
    objective, network = MaskedReconstruction(LEVELS, IMAGE, patch=2, fill=fill), Levels()
    objective.masks = lambda inputs, draw=None: {"image": masks[rows]}
    losses = objective(network, Batch(({"image": inputs["image"][rows]},)))
    losses.total.backward()
    return losses.total.item(), [p.grad for p in (*objective.parameters(), *network.parameters())]


def part(inputs, masks, fill):
    return whole_or_part(inputs, masks, slice(distributed.rank(), None, 2), fill)


@pytest.mark.ddp
@pytest.mark.parametrize("fill", ["mean", "learned"])
def test_two_ranks_are_one_process_with_the_whole_batch(fill, generator):
    inputs = images(generator, 6)
    masks = MaskedReconstruction(LEVELS, IMAGE, patch=2).masks(inputs)["image"]
    loss, gradients = whole_or_part(inputs, masks, slice(None), fill)
    first, second = on_ranks(part, inputs, masks, fill)
    assert (first[0] + second[0]) / 2 == pytest.approx(loss, rel=1e-5)
    for one, other, whole in zip(first[1], second[1], gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, whole, rtol=1e-4, atol=1e-6)  # what DDP makes of them


def evaluated(count):
    """An evaluation of the fusion hypernet by this process."""
    torch.manual_seed(1)
    network = FusionSpace(num_cells=2, num_steps=1, channels=3, length=4).hypernet(INFOS).eval()
    objective = MaskedReconstruction(network.info, INFOS, patch=1, fill="noise").eval()
    return objective.evaluate(
        network, FixedBatches(TinySource(count), draw_clean, 4, (0, "held"), whole=False)
    )


@pytest.mark.ddp
@pytest.mark.parametrize("count", [4, 14], ids=["a rank without a batch", "a short last batch"])
def test_evaluation_is_the_same_on_one_and_two_ranks(count):
    alone = evaluated(count)
    first, second = on_ranks(evaluated, count)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)


def test_a_snapshot_is_the_reconstruction(generator):
    objective, network = MaskedReconstruction(LEVELS, IMAGE, patch=2), Levels()
    batch = Batch((images(generator),))
    shown, truth = objective.snapshot(network, batch), objective.reconstruct(network, batch)
    assert torch.equal(shown["image/input"], truth.input["image"])
    assert torch.equal(shown["image/masked"], truth.masked["image"])
    assert torch.equal(shown["image/output"], truth.output["image"])
    assert set(shown) == {"image/input", "image/masked", "image/output"}
