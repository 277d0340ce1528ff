import pytest

from mmnas_lab.build import build, check_node, near, parameter_names, target
from mmnas_lab.types import InputError

MOVIES = "mmnas_lab.dataset.movies.Movies"
BACKBONE = "mmnas_lab.backbone.frozen.Backbone"
TFIDF = "mmnas_lab.backbone.tfidf.TfidfSvd"


def test_near_names_come_before_a_list_of_all():
    assert near("moveis", ["movies", "mmimdb"]) == "did you mean movies?"
    assert near("xyz", ["movies", "mmimdb"]) == "valid are: mmimdb, movies"


def test_a_node_becomes_an_object_and_facts_are_handed_forward():
    assert build({"_target_": MOVIES, "num_train": 5}, "dataset").settings["num_train"] == 5
    assert build({"_target_": MOVIES}, "dataset", num_train=6).settings["num_train"] == 6


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": MOVIES, "nois": 1}, r"unknown key 'x\.nois'; did you mean noise\?"),
        ({"_target_": MOVIES, "noise": "much"}, r"x\.noise=much: .*number"),
        ({"_target_": MOVIES, "num_train": 2.5}, r"x\.num_train=2\.5: .*integer"),
        ({"_target_": BACKBONE, "text": 3}, r"x\.text needs a _target_, got 3"),
        (
            {"_target_": BACKBONE, "text": {"_target_": TFIDF, "dimension": 3}},
            r"x\.text\.dimension.*dimensions",
        ),
        ({"_target_": "mmnas_lab.dataset.movies.Films"}, r"x\._target_=.*Films cannot be imported"),
        ({"noise": 1}, r"x has no _target_; choose one with x=<name>"),
    ],
)
def test_what_does_not_fit_a_constructor_is_named(node, message):
    with pytest.raises(InputError, match=message):
        check_node(node, "x")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": MOVIES, "noise": 5.0}, "noise"),
        ({"_target_": BACKBONE, "text": {"_target_": TFIDF, "dimensions": 0}}, "dimensions"),
        ({"_target_": "mmnas_lab.dataset.mmimdb.MMIMDB"}, "x cannot be built: .*path"),
    ],
)
def test_what_a_constructor_refuses_keeps_its_message(node, message):
    with pytest.raises(InputError, match=message) as refused:
        build(node, "x")
    assert "full_key" not in str(refused.value)


def test_names_are_read_without_an_import():
    assert "noise" in (parameter_names(MOVIES) or [])
    assert parameter_names(BACKBONE) is None, "it takes any encoder"
    assert parameter_names("mmnas_lab.dataset.movies.Films") is None
    assert parameter_names("mmnas_lab.nowhere.Films") is None


def test_a_target_is_imported_by_its_path():
    assert target({"_target_": MOVIES}, "dataset").__name__ == "Movies"
