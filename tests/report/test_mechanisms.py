from mmnas_lab.report.mechanisms import NUM_OPS, SKIP, report_mechanisms, skip_weight, undecided_share
from mmnas_lab.study_rows import append

SOURCE = {"commit": "abc", "data": "d", "hardware": "a processor"}


def masking(seed, ratio, decoder, skips):
    weights = [0.1] * (2 * NUM_OPS)
    weights[SKIP], weights[NUM_OPS + SKIP] = 0.2, 0.4
    row = {"study": "a", "seed": seed, "mask_ratio": ratio, "decoder": decoder, "skips_normal": skips}
    return {**row, "mixing": {"alpha_normal": weights, "alpha_reduce": weights}, **SOURCE}


def long_tail(seed, relaxation, objective, accuracy, **more):
    test = {"accuracy": accuracy, "accuracy_long_tailed": 0.7}
    row = {"study": "c", "seed": seed, "relaxation": relaxation, "objective": objective, "test": test}
    return {**row, **more, **SOURCE}


def test_numbers_are_read_off_the_mixing_weights():
    assert abs(skip_weight(masking(0, 0.1, "plain", 1)) - 0.3) < 1e-12
    assert undecided_share({"mixing": {"a": [0.1, 0.5, 0.79], "b": [0.9]}}) == 0.5


def test_the_page_compares_within_seeds_and_says_what_is_missing(tmp_path):
    assert report_mechanisms(tmp_path) == []
    rows = [
        masking(seed, ratio, decoder, (3 if ratio < 0.5 else 0) + (decoder == "hierarchical"))
        for seed in (0, 1, 2)
        for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)
        for decoder in ("hierarchical", "plain")
    ]
    rows += [
        {"study": "b", "seed": s, "zero_one": on, "mixing": {"alpha": [0.99 if on else 0.5]}, **SOURCE}
        for s in (0, 1, 2)
        for on in (True, False)
    ]
    rows += [long_tail(0, "softmax", objective, 0.3) for objective in ("supervised", "barlow_twins")]
    rows += [long_tail(0, "random", "none", value, draw=k) for k, value in enumerate((0.2, 0.3))]
    rows += [long_tail(0, "softmax", "supervised", 0.9, overrides=["dataset.mu=0.1"])]
    for row in rows:
        append(tmp_path / "cell_mechanisms.jsonl", row)
    page, figure = report_mechanisms(tmp_path)
    text = page.read_text()
    assert "hierarchical decoder: -3.0 [-3.0, -3.0] effect" in text
    assert "hierarchical minus plain decoder, all ratios: +1.0 [+1.0, +1.0] effect" in text
    assert "-100.0 [-100.0, -100.0] effect" in text
    assert "softmax with cross-entropy minus random cells: +5.0 (one seed)" in text
    assert "(c) has 4 of 18 runs" in text
    assert "(a) has" not in text
    assert figure.stat().st_size > 1000
