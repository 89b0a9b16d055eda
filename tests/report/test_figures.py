"""What the charts draw, and that names cannot break them."""

from xml.etree import ElementTree

import numpy as np
import pytest
from evaluations import blobs, full_evaluation
from matplotlib.figure import Figure

from densecal.labels import LabelSchema
from densecal.report.drawing import DARK_ON_LIGHT, IN_PAGE, Chart, Panel, Theme, inline_svg, plain_text
from densecal.report.figures import boundary_distance_chart, class_chart, classwise_errors, comparison_chart, risk_coverage_chart

SCHEMA = LabelSchema(("background", "$\\frac{1}{$", "_hidden"))


@pytest.fixture(scope="module")
def evaluation():
    return full_evaluation(SCHEMA, *blobs(SCHEMA, (12, 14), 3))


def draw(chart, panel=0):
    figure = Figure()
    chart.panels[panel].draw(figure, Theme())
    return figure.axes[0]


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_boundary_distance_chart_draws_both_sides_of_the_gap():
    curve = {
        "edges": [0, 1, 2, float("inf")],
        "unit": "mm",
        "count": [5, 0, 2],
        "accuracy": [0.5, float("nan"), 1.0],
        "mean_confidence": [0.75, float("nan"), 0.9],
    }
    axes = draw(boundary_distance_chart(curve))
    found = lines(axes)
    np.testing.assert_allclose(found["error rate"], [[0.5, 0.5], [2.5, 0.0]])  # the empty distance is left out, the open one as wide as the last
    np.testing.assert_allclose(found["1 − confidence"], [[0.5, 0.25], [2.5, 0.1]])
    assert "(mm)" in axes.get_xlabel()
    assert len(axes.collections) == 1


def test_risk_coverage_chart_has_a_panel_per_region_with_a_curve(evaluation):
    assert [panel.label for panel in risk_coverage_chart(evaluation).panels] == [
        "Risk-coverage curve, everywhere",
        "Risk-coverage curve, in and near the structure",
        "Risk-coverage curve, along boundaries",
    ]
    axes = draw(risk_coverage_chart(evaluation))
    curve = evaluation.curves["risk_coverage"]
    np.testing.assert_allclose(lines(axes)["least confident left out first"][:, 1], curve["risk"])
    assert axes.get_ylim()[0] == 0


def test_class_chart_says_which_class_is_not_there(evaluation):
    axes = draw(class_chart(evaluation))
    assert [text.get_text() for text in axes.texts] == ["not in the data"]
    assert axes.texts[0].get_position()[1] == 2
    bars = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(bars[:2], [evaluation.mean[f"dice/{name}"] for name in SCHEMA.names[:2]])
    assert axes.yaxis_inverted()


def test_classwise_errors_average_to_the_pooled_number(evaluation):
    assert np.mean(classwise_errors(evaluation, "all")) == pytest.approx(evaluation.pooled["all"]["ece_classwise"])


def test_comparison_chart_names_every_model_and_tells_lines_apart(evaluation):
    models = {"_a": evaluation, "$b$": evaluation, "c": evaluation}
    chart = comparison_chart(models, "all")
    for panel in range(2):
        axes = draw(chart, panel)
        assert len(axes.get_legend().get_texts()) == 3
        drawn = [line for line in axes.lines if line.get_marker() != "None"]
        assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == 3


@pytest.mark.parametrize("theme", [DARK_ON_LIGHT, IN_PAGE], ids=["file", "page"])
def test_theme_line_differs_without_colour(theme):
    looks = [theme.line(i) for i in range(20)]
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == 20


@pytest.mark.parametrize("label", ['"><script>x</script>', "a & b", "--> <!--", "$\\frac{1}{$", "_x", "\\1 \\g<0>"])
def test_inline_svg_takes_any_name(label):
    def panel(figure, theme):
        axes = figure.subplots()
        axes.plot([0, 1], color=theme.bar, label=plain_text(label))
        axes.set_title(plain_text(label))
        assert len(axes.legend().get_texts()) == 1

    svg = inline_svg(Chart("c", (Panel("p", panel),)).figure(theme=IN_PAGE), label=label, prefix="c")
    root = ElementTree.fromstring(svg)  # well-formed, one element
    assert root.attrib["aria-label"] == label
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert "var(--bar)" in svg
    assert "#040404" not in svg


def test_chart_saves_all_panels_and_inlines_each(tmp_path):
    chart = Chart("pair", tuple(Panel(name, lambda figure, theme: figure.subplots()) for name in ("left", "right")), width=2, height=2)
    chart.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.png", "pair.svg"]
    assert [ElementTree.fromstring(svg).attrib["aria-label"] for svg in chart.inline()] == ["left", "right"]
    assert len(chart.figure().axes) == 2
