"""What a schema of classes or regions says, and refuses."""

import pytest

from densecal.labels import LabelSchema


def test_regions_all_count_and_have_colours_without_black():
    schema = LabelSchema(("whole", "core"), 255, None, activation="sigmoid", regions=([1, 2], [2]))
    assert (schema.num_classes, schema.num_outcomes, schema.foreground, schema.has_structure) == (2, 2, (0, 1), True)
    assert schema.regions == ((1, 2), (2,))
    assert len({*schema.palette, (0, 0, 0)}) == 3


def test_one_region_is_enough_and_one_class_is_not():
    assert LabelSchema(("car",), background=None, activation="sigmoid").num_classes == 1
    with pytest.raises(ValueError, match="at least two class names"):
        LabelSchema(("car",), background=None)


@pytest.mark.parametrize(("background", "structure"), [(0, True), (None, False)])
def test_classes_have_a_structure_before_a_background(background, structure):
    schema = LabelSchema(("a", "b", "c"), background=background)
    assert (schema.has_structure, schema.num_outcomes) == (structure, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ()}, "at least one region"),
        ({"ignore_index": 1}, "other than the 0 and 1 of a region"),
        ({"background": 0}, "no `background` with activation='sigmoid'"),
        ({"regions": ((1,), (2,))}, r"what each of \['car'\] is made of, but got 2"),
        ({"activation": "softmax", "names": ("a", "b"), "regions": ((1,), (2,))}, "`regions` with activation='sigmoid' alone"),
        ({"activation": "relu"}, "`activation` to be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_schema_of_regions_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LabelSchema(**({"names": ("car",), "background": None, "activation": "sigmoid"} | options))
