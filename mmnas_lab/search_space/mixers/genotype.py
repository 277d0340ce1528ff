"""What a search over mixers decides: an encoder a modality, a fusion function and a fusion network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmnas_lab.build import near
from mmnas_lab.types import InputError

SCHEMA = 1


@dataclass(frozen=True)
class MixerGenotype:
    """Names of candidates; a network of one modality alone has no fusion.

    Attributes:
        encoders: (modality, candidate) in the order of the inputs.
        fusion_function: of the tokens of all modalities.
        fusion_network: on the fused tokens.
    """

    encoders: tuple[tuple[str, str], ...]
    fusion_function: str | None = None
    fusion_network: str | None = None

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the inputs that the network reads."""
        return tuple(modality for modality, _ in self.encoders)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `parse_genotype` reads them back."""
        return {
            "space": "mixers",
            "schema": SCHEMA,
            "encoders": dict(self.encoders),
            "fusion_function": self.fusion_function,
            "fusion_network": self.fusion_network,
        }


@dataclass(frozen=True)
class Options:
    """Names of the candidates of each choice; encoders by modality."""

    encoders: Mapping[str, Sequence[str]]
    fusion_functions: Sequence[str]
    fusion_networks: Sequence[str]


def parse_genotype(data: Mapping[str, Any], options: Options) -> MixerGenotype:
    """A genotype from its JSON form.

    Args:
        data: the JSON form.
        options: of the space for the inputs at hand.

    Raises:
        InputError: another space or schema, a modality or candidate that does not exist, several modalities
            without fusion, or a shape that is not a genotype's; the message names it and what is there.
    """
    if not isinstance(data, Mapping):
        raise InputError(
            f"not a genotype of mixers: a JSON object is needed, got {data!r}; see genotype.json of a run"
        )
    if data.get("space") != "mixers" or data.get("schema") != SCHEMA:
        raise InputError(
            f"this genotype is of space {data.get('space')!r}, schema {data.get('schema')!r}; mixers reads "
            f"space 'mixers', schema {SCHEMA}; set search_space to the genotype's space"
        )
    try:
        encoders = tuple((str(modality), str(name)) for modality, name in data["encoders"].items())
        function, network = data["fusion_function"], data["fusion_network"]
    except (KeyError, AttributeError) as error:
        raise InputError(
            f"not a genotype of mixers: {type(error).__name__} {error}; see genotype.json of a run"
        ) from None
    genotype = MixerGenotype(encoders, function, network)
    check_genotype(genotype, options)
    return genotype


def check_genotype(genotype: MixerGenotype, options: Options) -> None:
    """Refuse a genotype that no network can be built of. Raises InputError, see `parse_genotype`."""
    if not genotype.encoders:
        raise InputError("the genotype of mixers has no encoder; name one for at least one modality")
    names = [modality for modality, _ in genotype.encoders]
    for modality, name in genotype.encoders:
        if modality not in options.encoders:
            raise InputError(
                f"the genotype encodes the modality '{modality}'; {near(modality, options.encoders)}"
            )
        if names.count(modality) > 1:
            raise InputError(f"the genotype encodes the modality '{modality}' twice; leave one encoder")
        if name not in options.encoders[modality]:
            raise InputError(
                f"the genotype encodes '{modality}' by '{name}', which its vocabulary has not; "
                f"{near(name, options.encoders[modality])}"
            )
    for what, chosen, known in (
        ("fusion function", genotype.fusion_function, options.fusion_functions),
        ("fusion network", genotype.fusion_network, options.fusion_networks),
    ):
        if chosen is not None and chosen not in known:
            raise InputError(f"the genotype has the {what} {chosen!r}; {near(str(chosen), known)}")
    fused = genotype.fusion_function is not None, genotype.fusion_network is not None
    if fused[0] != fused[1] or (len(names) > 1 and not fused[0]):
        raise InputError(
            f"the genotype encodes {', '.join(names)} and has fusion function "
            f"{genotype.fusion_function!r} and fusion network {genotype.fusion_network!r}; several "
            "modalities need both, one modality both or none"
        )
