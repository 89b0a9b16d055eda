"""Numbers of the authors' published code, reproduced through the public API: values and gradients."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from golden import FOLDER, HANDLERS, load

for path in Path(__file__).parent.glob("golden_*.py"):
    importlib.import_module(path.stem)  # registers its handlers

# Methods that are still to come; whoever lands one writes its handler and strikes its strata from here.
LATER: set[str] = set()

# Where the published code is not what its paper says, and this package follows the paper.
AS_PUBLISHED = {
    "svls_3d_k5_as_published": "element [1, 1, 1] is taken for the centre of a window of 5; the corrected cases are matched",
    "svls_2d_k5_as_published": "element [1, 1] is taken for the centre of a window of 5; the corrected cases are matched",
    "svls_2d_class_ksize_ignored": "the published class accepts ksize and builds the window of 3",
    "nacl_gaussian_k5_as_published": "the same wrong centre as in SVLS; the corrected case is matched",
    "nacl_ignored_pixels": "ignored pixels stay in the published penalty, and shares near them sum to less than 1",
    "mbls_l2": "the published relu comes after the square and does nothing: distances below the margin are penalised too",
    "mbls_ignore_not_used": "ignored pixels stay in the published penalty",
    "acls_ignore_not_used": "ignored pixels stay in the published penalty",
    "acls_ties": "every tied maximum counts as the largest in the published code; ties have measure zero, and one of them counts here",
    "crac_boundary_as_published": "the published boundary is what rounding leaves of a sum that is zero by algebra; the corrected cases are matched",
    "sce_jdt": "a class hit counts only where the prediction is right too; the corrected cases are matched",
    "ece_sce_jdt_on_edges": "bins are closed below in the published code and above here; only confidences on an edge tell",
    "tace_svls": "bins of equal mass, and the published value is divided by their number twice",
    "monai_dice_product_form": "the product form is not smallest at p = q for soft labels",
}


def cases() -> list[Any]:
    if FOLDER is None:
        return [pytest.param(None, marks=pytest.mark.skip(reason="no golden numbers; DENSECAL_GOLDEN names their folder"))]
    manifest = json.loads((Path(FOLDER) / "manifest.json").read_text())
    return [pytest.param(case, id=case["id"]) for case in manifest["cases"] if case["stratum"] not in LATER]


@pytest.mark.parametrize("case", cases())
def test_published_numbers_are_reproduced(case):
    stratum = case["stratum"]
    if stratum in AS_PUBLISHED:
        pytest.skip(AS_PUBLISHED[stratum])
    assert stratum in HANDLERS, f"No handler for the stratum {stratum!r}: write one, or say in LATER or AS_PUBLISHED why there is none."
    HANDLERS[stratum](case, load(case))


def test_each_stratum_is_in_one_place():
    assert not LATER & set(HANDLERS)
    assert not LATER & set(AS_PUBLISHED)
    assert not set(AS_PUBLISHED) & set(HANDLERS)
