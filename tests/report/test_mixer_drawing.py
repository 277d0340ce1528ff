import xml.etree.ElementTree as ElementTree
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mmnas_lab.report.mixer_drawing import draw_mixers, mixers_figure
from mmnas_lab.search_space.mixers.genotype import MixerGenotype

ENCODERS = (("image", "ramlp"), ("text", "monarch_mixer"), ("vitals", "my_own_encoder"))
GENOTYPES = {
    count: MixerGenotype(ENCODERS[:count], *(("gated", "hyper_mixer") if count > 1 else ())).to_json()
    for count in (1, 2, 3)
}
MARGINS = {"encoder.image": 0.021, "encoder.text": 0.0, "fusion_function": 0.3, "fusion_network": 1e-5}


@pytest.mark.parametrize("margins", [{}, MARGINS])
@pytest.mark.parametrize("count", GENOTYPES)
def test_everything_is_named_and_nothing_overlaps(count, margins):
    figure = mixers_figure(GENOTYPES[count], margins)
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    words = {text.get_text() for text in texts}
    assert {"image", "RaMLP", "head"} <= words
    assert ({"gated", "HyperMixer", "Monarch Mixer"} <= words) == (count > 1)
    assert ("my_own_encoder" in words) == (count == 3)
    assert ("tie" in words) == (bool(margins) and count > 1)
    extents = [text.get_window_extent(renderer) for text in texts]
    assert not any(a.overlaps(b) for a, b in combinations(extents, 2))
    for extent in extents:
        assert figure.bbox.x0 <= extent.x0
        assert extent.x1 <= figure.bbox.x1


def test_the_same_genotype_gives_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg", "a.png"):
        draw_mixers(GENOTYPES[2], MARGINS, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    ElementTree.parse(tmp_path / "a.svg")


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(ValueError, match="draw_mixers needs a genotype of space 'mixers', got 'fusion'"):
        mixers_figure({"space": "fusion"}, {})
    with pytest.raises(ValueError, match="draw_mixers writes .svg or .png, got 'a.pdf'"):
        draw_mixers(GENOTYPES[1], {}, tmp_path / "a.pdf")
