import pytest
import torch

from mmnas_lab.randomness import generator, reseed, seed_of


def test_an_address_has_one_seed_for_good():
    assert seed_of(0, "search", 3) == seed_of(0, "search", 3)
    assert 0 <= seed_of(0, "search", 3) < 2**63
    assert seed_of(0, "search", 3) == 8314761773436846649, (
        "another value makes every recorded run irreproducible"
    )


@pytest.mark.parametrize(
    "other", [(1, "a", 2), (0, "b", 2), (0, "a", 3), (0, "a", "2"), ("0", "a", 2), (0, "a"), (0, "a2")]
)
def test_different_addresses_have_different_seeds(other):
    assert seed_of(*other) != seed_of(0, "a", 2)


def test_draws_do_not_depend_on_what_came_before():
    first = torch.rand(5, generator=generator(0, "a", 2))
    torch.rand(3)
    state = torch.get_rng_state()
    assert torch.equal(torch.rand(5, generator=generator(0, "a", 2)), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was drawn from"


def test_reseeding_is_torchs_without_what_torch_keeps_for_other_devices():
    torch.manual_seed(123)
    expected = torch.rand(3), torch.dropout(torch.ones(8), 0.5, train=True)
    kept = len(torch.cuda._queued_calls)
    reseed(123)
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.dropout(torch.ones(8), 0.5, train=True), expected[1])
    assert len(torch.cuda._queued_calls) == kept
