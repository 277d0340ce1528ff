from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.dataset.movies import DRAWN, GENRES, PRIORS, WRITTEN, Movies
from mmnas_lab.types import InputError

SIZES = {"num_train": 7, "num_val": 5, "num_test": 3}
ATTRIBUTES = list(PRIORS)


def pixels(movies: Movies, split: str, rows) -> np.ndarray:
    return np.stack([np.asarray(poster) for poster in movies.read(split, "image", rows)])


def test_a_movie_depends_on_seed_split_and_number_only():
    small, large = Movies(**SIZES), Movies(num_train=400, num_val=50, num_test=60)
    for split in SPLITS:
        rows = range(len(small.ids(split)))
        assert small.ids(split) == large.ids(split)[: len(rows)]
        assert small.read(split, "text", rows) == large.read(split, "text", rows)
        assert np.array_equal(pixels(small, split, rows), pixels(large, split, rows))
        assert torch.equal(small.labels(split), large.labels(split)[: len(rows)])
    assert large.read("train", "text", [33, 2]) == [large.read("train", "text", [row])[0] for row in (33, 2)]

    other = Movies(**SIZES, seed=1)
    assert other.read("train", "text", range(7)) != small.read("train", "text", range(7))
    assert not np.array_equal(pixels(other, "train", range(7)), pixels(small, "train", range(7)))
    assert not torch.equal(other.labels("train"), small.labels("train"))
    assert small.read("train", "text", range(3)) != small.read("test", "text", range(3))


def test_rows_are_of_the_promised_kind():
    movies = Movies(**SIZES, poster_height=40, poster_width=36)
    assert [len(movies.ids(split)) for split in SPLITS] == [7, 5, 3]
    assert len({row for split in SPLITS for row in movies.ids(split)}) == 15
    poster = movies.read("val", "image", [4])[0]
    assert (poster.mode, poster.size) == ("RGB", (36, 40))
    assert movies.labels("val").shape == (5, 12)
    assert movies.labels("val").dtype == torch.uint8
    assert movies.unreadable("val") == {}


def test_plots_vary_and_have_the_length_of_short_plots():
    plots = Movies().read("train", "text", range(900))
    words = np.array([len(plot.split()) for plot in plots])
    assert len(set(plots)) > 890
    assert 25 <= words.mean() <= 40
    assert words.min() >= 20
    assert words.max() <= 65
    assert not any("{" in plot for plot in plots)


def test_genres_are_what_the_docstring_says():
    movies = Movies(num_train=4000)
    attributes = dict(zip(ATTRIBUTES, movies.attributes("train").T, strict=True))
    labels = dict(zip(movies.classes, movies.labels("train").T.bool(), strict=True))
    kinds = {"drawn": 0, "written": 0, "both": 0}
    for genre, needed in GENRES.items():
        expected = torch.stack([attributes[name] for name in needed]).all(dim=0)
        assert torch.equal(labels[genre], expected), genre
        modalities = {"drawn" if name in DRAWN else "written" for name in needed}
        kinds["both" if len(modalities) == 2 else modalities.pop()] += 1
        prevalence = float(np.prod([PRIORS[name] for name in needed]))
        assert labels[genre].double().mean().item() == pytest.approx(prevalence, abs=0.03), genre
    assert kinds == {"drawn": 4, "written": 4, "both": 4}
    correlation = np.corrcoef(movies.attributes("train").double().numpy().T) - np.eye(12)
    assert np.abs(correlation).max() < 0.07


def readable(movies: Movies, split: str) -> dict[str, np.ndarray]:
    """Coarse pixels and words: what any encoder sees at least."""
    n = len(movies.ids(split))
    coarse = pixels(movies, split, range(n)).reshape(n, 24, 4, 16, 4, 3).astype(float) / 255
    mean = coarse.mean(axis=(2, 4))
    spread = coarse.std(axis=(2, 4)).mean(axis=-1)
    contrast = np.abs(mean - np.median(mean, axis=(1, 2), keepdims=True)).mean(axis=-1)
    image = np.concatenate([mean.reshape(n, -1), spread.reshape(n, -1), contrast.reshape(n, -1)], axis=1)
    return {"image": image, "text": np.array(movies.read(split, "text", range(n)))}


def auc(train, test, y_train, y_test) -> float:
    model = LogisticRegression(C=0.1, max_iter=300).fit(train, y_train)
    return roc_auc_score(y_test, model.decision_function(test))


@pytest.fixture(scope="module")
def shown() -> tuple[Movies, dict[str, dict[str, np.ndarray]]]:
    movies = Movies(num_train=700, num_test=500)
    return movies, {split: readable(movies, split) for split in ("train", "test")}


def test_each_attribute_is_read_off_its_own_modality_and_no_other(shown):
    movies, inputs = shown
    words = CountVectorizer(binary=True).fit(inputs["train"]["text"])
    views = {"text": {split: words.transform(inputs[split]["text"]).toarray() for split in inputs}}
    views["image"] = {split: inputs[split]["image"] for split in inputs}
    y = {split: movies.attributes(split).numpy() for split in inputs}
    for column, name in enumerate(ATTRIBUTES):
        own, other = ("image", "text") if name in DRAWN else ("text", "image")
        scores = {
            kind: auc(views[kind]["train"], views[kind]["test"], y["train"][:, column], y["test"][:, column])
            for kind in (own, other)
        }
        assert scores[own] > (0.85 if own == "image" else 0.97), (name, scores)
        assert abs(scores[other] - 0.5) < 0.12, (name, scores)


@pytest.mark.parametrize("genre", [genre for genre, needed in GENRES.items() if len(needed) == 2])
def test_a_conjunction_needs_both_modalities(genre):
    movies = Movies(num_train=2000)
    attributes = movies.attributes("train").numpy()
    label = movies.labels("train")[:, movies.classes.index(genre)].numpy()
    scores = {}
    for kind, names in {"image": DRAWN, "text": WRITTEN, "both": DRAWN + WRITTEN}.items():
        features = attributes[:, [ATTRIBUTES.index(name) for name in names]].astype(float)
        features = np.concatenate(
            [features, np.einsum("bi,bj->bij", features, features).reshape(2000, -1)], 1
        )
        scores[kind] = auc(features[:1000], features[1000:], label[:1000], label[1000:])
    assert scores["both"] > 0.99
    assert scores["image"] < 0.88
    assert scores["text"] < 0.88


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_replaces_what_is_shown_but_not_the_labels(noise):
    movies, clean = Movies(num_train=4000, noise=noise), Movies(num_train=4000)
    assert torch.equal(movies.labels("train"), clean.labels("train"))
    true = movies.attributes("train").double().numpy()
    seen = movies.attributes("train", shown=True).double().numpy()
    priors = np.array(list(PRIORS.values()))
    agreement = 1 - noise + noise * (priors**2 + (1 - priors) ** 2)
    assert (true == seen).mean(axis=0) == pytest.approx(agreement, abs=0.03)
    correlation = np.corrcoef(true.T, seen.T)[:12, 12:]
    assert np.diag(correlation) == pytest.approx(1 - noise, abs=0.06)
    assert np.abs(correlation - np.diag(np.diag(correlation))).max() < 0.07


def test_at_noise_one_inputs_carry_no_signal_of_the_labels():
    movies = Movies(num_train=600, num_test=500, noise=1.0)
    train, test = readable(movies, "train"), readable(movies, "test")
    words = CountVectorizer(binary=True).fit(train["text"])
    x = [np.concatenate([s["image"], words.transform(s["text"]).toarray()], axis=1) for s in (train, test)]
    y = [movies.labels(split).numpy() for split in ("train", "test")]
    scores = [auc(x[0], x[1], y[0][:, column], y[1][:, column]) for column in range(12)]
    assert np.mean(scores) == pytest.approx(0.5, abs=0.03)
    assert max(scores) < 0.62


def test_fingerprints_follow_what_they_cover():
    base = Movies(**SIZES)
    assert base.fingerprint() == Movies(**SIZES, noise=0).fingerprint()
    changes = [{"noise": 0.1}, {"seed": 1}, {"num_test": 4}, {"poster_width": 65}]
    prints = {Movies(**{**SIZES, **change}).fingerprint() for change in changes} | {base.fingerprint()}
    assert len(prints) == len(changes) + 1
    assert base.label_fingerprint() == Movies(**SIZES, noise=1).label_fingerprint()
    assert base.label_fingerprint() != Movies(**SIZES, seed=1).label_fingerprint()


def test_drop_moves_later_rows_up():
    movies, full = Movies(**SIZES), Movies(**SIZES)
    movies.drop({"train": [0, 3]})
    movies.drop({"train": [0]})
    left = [2, 4, 5, 6]
    assert movies.ids("train") == [full.ids("train")[row] for row in left]
    assert movies.read("train", "text", range(4)) == full.read("train", "text", left)
    assert np.array_equal(pixels(movies, "train", range(4)), pixels(full, "train", left))
    assert torch.equal(movies.labels("train"), full.labels("train")[left])
    assert movies.fingerprint() != full.fingerprint()
    assert movies.ids("val") == full.ids("val")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": 1.5}, r"noise in \[0, 1\], got 1.5; set dataset.noise"),
        ({"noise": float("nan")}, "noise"),
        ({"num_train": 0}, "num_train in \\[1, "),
        ({"num_test": -3}, "num_test"),
        ({"poster_height": 8}, r"poster_height in \[32, 1024\], got 8"),
        ({"poster_width": 5000}, "poster_width"),
        ({"seed": -1}, r"seed in \[0, "),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Movies(**settings)


def test_an_unknown_modality_is_refused():
    with pytest.raises(InputError, match=r"\['image', 'text'\], got 'audio'"):
        Movies(**SIZES).read("train", "audio", [0])
