"""The encoders of all modalities as one backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mmnas_lab.backbone.base import Encoder
from mmnas_lab.backbone.weights import hash_settings
from mmnas_lab.types import InputError, InputInfos


class Backbone:
    """One encoder a modality, in the order of the configuration.

    Attributes:
        encoders: encoders by modality.
    """

    def __init__(self, **encoders: Encoder) -> None:
        if not encoders:
            raise InputError("a backbone needs at least one encoder, as `image: {_target_: ...}`")
        for name, encoder in encoders.items():
            if encoder.modality != name:
                raise InputError(
                    f"backbone entry '{name}' holds an encoder that reads modality '{encoder.modality}'; "
                    f"name the entry '{encoder.modality}', or set its modality to '{name}'"
                )
        self.encoders: dict[str, Encoder] = encoders

    @property
    def label_free(self) -> bool:
        """False if any encoder was trained with labels of this very dataset."""
        return all(encoder.label_free for encoder in self.encoders.values())

    def check(self, dataset_modalities: Iterable[str]) -> None:
        """Refuse a dataset whose modalities are not those that are encoded.

        Raises:
            InputError: names the modalities on both sides.
        """
        encoded, given = set(self.encoders), set(dataset_modalities)
        if encoded != given:
            raise InputError(
                f"the backbone reads {_listed(encoded)}, the dataset has {_listed(given)}; "
                + "; ".join(
                    [f"no data for encoder {_listed(encoded - given)}"] * bool(encoded - given)
                    + [f"no encoder for modality {_listed(given - encoded)}"] * bool(given - encoded)
                )
                + "; choose another backbone=..., or override its entries"
            )

    def fingerprint(self) -> str:
        """Hash of all encoders, their order included."""
        return hash_settings(encoders=[[name, e.fingerprint()] for name, e in self.encoders.items()])

    def infos(self, length: int) -> InputInfos:
        """Names and shapes of all features, modality after modality, early to late."""
        infos: InputInfos = {}
        for encoder in self.encoders.values():
            infos.update(encoder.infos(length))
        return infos

    def load(self) -> None:
        """Load the weights of all encoders."""
        for encoder in self.encoders.values():
            encoder.load()


def by_kind(
    modalities: Mapping[str, str],
    image: Callable[..., Encoder] | None = None,
    text: Callable[..., Encoder] | None = None,
    audio: Callable[..., Encoder] | None = None,
    series: Callable[..., Encoder] | None = None,
    skeleton: Callable[..., Encoder] | None = None,
    tabular: Callable[..., Encoder] | None = None,
    video: Callable[..., Encoder] | None = None,
) -> Backbone:
    """A backbone with an encoder for each modality of a dataset, chosen by its kind.

    Args:
        modalities: kinds of the dataset's modalities, by name.
        image: makes an encoder of pictures, given its `modality`; the others likewise of their kinds.
        text: of texts.
        audio: of spectrograms.
        series: of time series.
        skeleton: of skeletons in time.
        tabular: of tables' rows.
        video: of clips.

    Raises:
        InputError: a kind that has no encoder.
    """
    makers = {
        "image": image,
        "text": text,
        "audio": audio,
        "series": series,
        "skeleton": skeleton,
        "tabular": tabular,
        "video": video,
    }
    encoders: dict[str, Encoder] = {}
    for name, kind in modalities.items():
        if (make := makers.get(kind)) is None:
            raise InputError(
                f"the backbone has no encoder of kind '{kind}', which the dataset's modality '{name}' is of; "
                "add one, as conf/backbone/small.yaml does"
            )
        encoders[name] = make(modality=name)
    return Backbone(**encoders)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"
