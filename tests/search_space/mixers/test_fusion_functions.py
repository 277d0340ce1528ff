"""Fusion functions equal their definitions, for any number of modalities and of samples that lack some."""

import pytest
import torch
from reference import mixers as reference

from mmnas_lab.search_space.mixers.fusion_function import FUSION_NAMES, fusion_function

SIZES = ((3, 4), (5, 6), (1, 6))


def tokens_of(sizes, batch, generator):
    return [torch.randn(batch, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("protocol", ["intended", "released_code"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", FUSION_NAMES)
def test_unequal_tokens_of_any_number_of_modalities_are_fused(name, count, protocol, generator):
    sizes = SIZES[:count]
    function = fusion_function(name, sizes, 6, protocol)
    fused, mask = function(tokens_of(sizes, 2, generator), None)
    assert mask is None
    assert fused.shape == (2, *function.size)
    number = sum(n for n, _ in sizes) if name == "concat" else max(n for n, _ in sizes)
    filled = name == "concat" and protocol == "released_code"  # to the widest, whatever width is asked for
    assert function.size == (number, max(d for _, d in sizes) if filled else 6)
    assert bool(list(function.parameters())) is not filled
    if not filled:
        fused.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in function.parameters())


@pytest.mark.parametrize("name", ["mean", "max", "sum", "product"])
def test_elementwise_functions_are_the_definition_over_what_is_present(name, generator):
    function = fusion_function(name, SIZES, 6, "intended")
    tokens = tokens_of(SIZES, 8, generator)
    present = torch.tensor([[k & 1, k & 2, k & 4] for k in range(8)]).bool()
    fused, mask = function(tokens, present)
    assert mask is None
    aligned = function.aligned(tokens)
    for b in range(8):
        torch.testing.assert_close(fused[b], reference.fuse(name, aligned[b], present[b]))
    everything, _ = function(tokens, None)
    torch.testing.assert_close(everything[7], fused[7])


def test_tokens_are_pooled_to_the_largest_number(generator):
    function = fusion_function("mean", ((2, 6), (4, 6)), 6, "intended")
    (two, four) = tokens_of(((2, 6), (4, 6)), 1, generator)
    aligned = function.aligned([two, four])
    assert torch.equal(aligned[:, 0], two.repeat_interleave(2, 1))
    assert torch.equal(aligned[:, 1], four)


def test_gated_fusion_of_two_is_the_bimodal_unit_at_every_token(generator):
    sizes = ((3, 4), (3, 4))
    function = fusion_function("gated", sizes, 4, "intended")
    x, y = tokens_of(sizes, 2, generator)
    fused, _ = function([x, y], None)
    state = function.state_dict()
    for b in range(2):
        for n in range(3):
            torch.testing.assert_close(fused[b, n], reference.gated_unit(x[b, n], y[b, n], state))


@pytest.mark.parametrize("name", FUSION_NAMES)
def test_nothing_of_a_missing_modality_is_left(name, generator):
    function = fusion_function(name, SIZES, 6, "intended")
    tokens = tokens_of(SIZES, 8, generator)
    present = torch.tensor([[k & 1, k & 2, k & 4] for k in range(8)]).bool()
    fused, mask = function(tokens, present)
    others = [
        torch.where(present[:, m, None, None], x, torch.randn(x.shape, generator=generator))
        for m, x in enumerate(tokens)
    ]
    assert fused.isfinite().all()
    torch.testing.assert_close(function(others, present)[0], fused)
    assert not fused[0].any()
    if name == "concat":
        assert torch.equal(mask[5], torch.tensor([True] * 3 + [False] * 5 + [True]))
        assert not fused[~mask].any()
    else:
        assert mask is None


def test_concatenation_projects_only_other_widths_and_the_released_one_fills_up_with_zeros(generator):
    tokens = tokens_of(SIZES, 2, generator)
    function = fusion_function("concat", SIZES, 6, "intended")
    fused, _ = function(tokens, None)
    torch.testing.assert_close(fused[:, :3], function.projections[0](tokens[0]))
    assert torch.equal(fused[:, 3:8], tokens[1])
    fused, _ = fusion_function("concat", SIZES, 9, "released_code")(tokens, None)
    assert fused.shape == (2, 9, 6)
    assert torch.equal(fused[:, :3, :4], tokens[0])
    assert not fused[:, :3, 4:].any()
