"""The space of mixers: its vocabulary of yaml nodes, its choices, and the networks that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mmnas_lab.build import build_with_facts, check_node, near
from mmnas_lab.search_space.base import Choice
from mmnas_lab.search_space.mixers.encoder import FUSED, KINDS, Encoder, ForeignEncoder, Protocol
from mmnas_lab.search_space.mixers.found_network import PRESENT, MixerNetwork
from mmnas_lab.search_space.mixers.fusion_function import FUSION_NAMES, FusionName
from mmnas_lab.search_space.mixers.genotype import (
    MixerGenotype,
    Options,
    check_genotype,
    parse_genotype,
)
from mmnas_lab.types import InputError, InputInfo, InputInfos

Node = dict[str, Any]
M2_MIXER = "m2_mixer"


class MixerSpace:
    """All-MLP networks of several modalities, after MixMAS (arXiv 2412.18437).

    A candidate is one yaml node: a `_target_` and its settings. Its constructor is handed those of these
    facts that it names and the node leaves open: `shape` and `kind` of the input, `width`, `dropout`,
    `protocol`. It may be one of the encoders beside this module, or any module that reads (B, *shape) and
    gives (B, D), (B, N, D) or (B, D, H, W).

    Args:
        encoders: by the kind of a modality, candidates by name; one that is null is left out.
        fusion_functions: names of the functions that join the tokens of all modalities.
        fusion_networks: candidates by name, likewise; they read fused tokens (N, D), of kind `fused`.
        width: D of encoders.
        fusion_width: D of the fused tokens; null for the widest encoder's.
        dropout: of encoders and fusion networks.
        protocol: `intended`, or `released_code` with its blocks as they are wired there.
    """

    name = "mixers"
    length = None

    def __init__(
        self,
        encoders: dict[str, dict[str, Node | None]],
        fusion_functions: list[FusionName],
        fusion_networks: dict[str, Node | None],
        width: int = 128,
        fusion_width: int | None = None,
        dropout: float = 0.1,
        protocol: Protocol = "intended",
    ) -> None:
        for name, value in (("width", width), ("fusion_width", fusion_width)):
            if value is not None and value < 1:
                raise InputError(f"search_space.{name} must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise InputError(f"search_space.dropout must be in [0, 1), got {dropout:g}")
        for kind in encoders:
            if kind not in KINDS:
                raise InputError(f"search_space.encoders has no kind '{kind}'; {near(kind, KINDS)}")
        self.encoders = {
            kind: _candidates(nodes, f"search_space.encoders.{kind}") for kind, nodes in encoders.items()
        }
        self.fusion_networks = _candidates(fusion_networks, "search_space.fusion_networks")
        for function in fusion_functions:
            if function not in FUSION_NAMES:
                raise InputError(
                    f"search_space.fusion_functions has no '{function}'; {near(function, FUSION_NAMES)}"
                )
        if not fusion_functions or len(set(fusion_functions)) < len(fusion_functions):
            raise InputError(
                f"search_space.fusion_functions names different functions, at least one, got "
                f"{list(fusion_functions)}"
            )
        self.fusion_functions = tuple(fusion_functions)
        self.width, self.fusion_width = width, fusion_width
        self.dropout, self.protocol = dropout, protocol

    # Parts, as the found network asks for them.

    def encoder(self, name: str, info: InputInfo, dropout: float | None = None) -> Encoder:
        """A candidate for an input, with fresh weights."""
        path = f"search_space.encoders.{info.kind}.{name}"
        return self._candidate(self.encoders[info.kind][name], path, info, dropout)

    def fusion_network(self, name: str, info: InputInfo, dropout: float | None = None) -> Encoder:
        """A candidate for fused tokens, with fresh weights."""
        return self._candidate(
            self.fusion_networks[name], f"search_space.fusion_networks.{name}", info, dropout
        )

    def _candidate(self, node: Node, path: str, info: InputInfo, dropout: float | None) -> Encoder:
        if dropout is not None:
            node = {key: value for key, value in node.items() if key != "dropout"}
        facts = {
            "shape": info.shape,
            "kind": info.kind,
            "width": info.shape[1] if info.kind == FUSED else self.width,
            "dropout": self.dropout if dropout is None else dropout,
            "protocol": self.protocol,
        }
        module = build_with_facts(node, path, facts)
        if isinstance(module, Encoder):
            return module
        if not isinstance(module, nn.Module):
            raise InputError(f"{path} must be a torch module, got {type(module).__name__}")
        return ForeignEncoder(module, info.shape, path)

    # The space.

    def build(self, genotype: Any, inputs: InputInfos, dropout: float | None = None) -> MixerNetwork:
        """The network with fresh weights; `dropout` overrides the space's and the candidates' own."""
        check_genotype(genotype, self.options(inputs))
        return MixerNetwork(self, genotype, inputs, dropout)

    def options(self, inputs: InputInfos) -> Options:
        """The candidates for the inputs at hand.

        Raises:
            InputError: an input without a kind, of a kind without candidates, or not named as its modality.
        """
        encoders = {}
        for name, info in inputs.items():
            if name.startswith(PRESENT):
                continue
            if name != info.modality:
                raise InputError(
                    f"mixers read one input a modality, named as it; '{name}' is of modality "
                    f"'{info.modality}'; take a backbone that gives modalities as they are"
                )
            if not info.kind:
                raise InputError(
                    f"the kind of input '{name}' is not known; its backbone must say one of "
                    f"{', '.join(KINDS)}"
                )
            if info.kind not in self.encoders:
                raise InputError(
                    f"input '{name}' is of kind '{info.kind}', for which there are no encoders; add them as "
                    f"search_space.encoders.{info.kind}"
                )
            encoders[name] = tuple(self.encoders[info.kind])
        if not encoders:
            raise InputError("mixers need at least one modality, the backbone gives none")
        return Options(encoders, self.fusion_functions, tuple(self.fusion_networks))

    def choices(self, inputs: InputInfos) -> list[Choice]:
        """An encoder a modality, then the fusion of several: the order of a greedy search."""
        options = self.options(inputs)
        found = [Choice(f"encoder.{modality}", tuple(names)) for modality, names in options.encoders.items()]
        if len(found) > 1:
            found.append(Choice("fusion_function", tuple(options.fusion_functions)))
            found.append(Choice("fusion_network", tuple(options.fusion_networks)))
        return found

    def genotype_of(self, chosen: Mapping[str, str], inputs: InputInfos) -> MixerGenotype:
        """The genotype of one option a choice. Raises InputError where a choice is open or unknown."""
        choices = self.choices(inputs)
        for choice in choices:
            if choice.name not in chosen:
                raise InputError(f"no option is chosen for {choice.name}; take one of {choice.options}")
        encoders = tuple(
            (choice.name.removeprefix("encoder."), chosen[choice.name])
            for choice in choices
            if choice.name.startswith("encoder.")
        )
        genotype = MixerGenotype(encoders, chosen.get("fusion_function"), chosen.get("fusion_network"))
        check_genotype(genotype, self.options(inputs))
        return genotype

    def candidate(
        self, choice: str, option: str, chosen: Mapping[str, str], inputs: InputInfos
    ) -> MixerGenotype:
        """The network with which a greedy search scores an option of a choice.

        Args:
            choice: its name, as in `choices`.
            option: one of its options.
            chosen: the options of the choices before it.
            inputs: what is known of each input.

        Returns:
            For an encoder the network of its modality alone; for a fusion function that of the chosen
            encoders with the first fusion network; for a fusion network that of all that is chosen.

        Raises:
            InputError: no such choice or option.
        """
        names = [each.name for each in self.choices(inputs)]
        if choice not in names:
            raise InputError(f"mixers have no choice '{choice}'; {near(choice, names)}")
        if choice.startswith("encoder."):
            genotype = MixerGenotype(((choice.removeprefix("encoder."), option),))
            check_genotype(genotype, self.options(inputs))
            return genotype
        first = {"fusion_network": next(iter(self.fusion_networks))}
        return self.genotype_of({**first, **chosen, choice: option}, inputs)

    def recipe(self, genotype: MixerGenotype) -> dict[str, Any]:
        """All that decides a genotype's network besides the inputs; other candidates play no part in it."""
        network = genotype.fusion_network
        return {
            "encoders": dict(genotype.encoders),
            "nodes": {
                name: [nodes[name] for nodes in self.encoders.values() if name in nodes]
                for _, name in genotype.encoders
            },
            "fusion_function": genotype.fusion_function,
            "fusion_network": None if network is None else self.fusion_networks[network],
            "width": self.width,
            "fusion_width": self.fusion_width,
            "dropout": self.dropout,
            "protocol": self.protocol,
        }

    def sample(self, inputs: InputInfos, generator: torch.Generator) -> MixerGenotype:
        """A genotype drawn uniformly."""
        chosen = {
            choice.name: choice.options[int(torch.randint(len(choice.options), (), generator=generator))]
            for choice in self.choices(inputs)
        }
        return self.genotype_of(chosen, inputs)

    def parse(self, data: dict[str, Any], inputs: InputInfos) -> MixerGenotype:
        """A genotype from its JSON form, checked against the inputs. Raises InputError."""
        return parse_genotype(data, self.options(inputs))

    def fixed(self, name: str, inputs: InputInfos) -> MixerGenotype:
        """The fixed network of a baseline: a modality's name, or `m2_mixer`.

        A modality alone has its first candidate. M2-Mixer has MLP-Mixers wherever the vocabulary names one
        (`mlp_mixer`), else the first candidate, and concatenates.

        Raises:
            InputError: another name, or a vocabulary without concatenation or MLP-Mixer.
        """
        options = self.options(inputs)
        if name in options.encoders:
            return MixerGenotype(((name, options.encoders[name][0]),))
        if name != M2_MIXER:
            raise InputError(
                f"no baseline '{name}': mixers have the fixed networks {M2_MIXER}, "
                f"{', '.join(options.encoders)}"
            )
        genotype = MixerGenotype(
            tuple(
                (modality, "mlp_mixer" if "mlp_mixer" in names else names[0])
                for modality, names in options.encoders.items()
            ),
            "concat",
            "mlp_mixer",
        )
        check_genotype(genotype, options)
        return genotype


def _candidates(nodes: Mapping[str, Node | None], path: str) -> dict[str, Node]:
    """The candidates of a vocabulary, checked. Raises InputError where there is none, or one is no node."""
    kept = {name: node for name, node in nodes.items() if node is not None}
    if not kept:
        raise InputError(f"{path} is empty; name at least one candidate")
    for name, node in kept.items():
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise InputError(f"{path}.{name} must be a node with a _target_, got {node!r}")
        check_node(dict(node), f"{path}.{name}")
    return kept
