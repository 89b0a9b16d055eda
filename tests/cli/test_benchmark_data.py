"""``densecal-benchmark data``: a table, and an error where the loaders do not give the same."""

from __future__ import annotations

import pytest

from densecal.cli import benchmark, benchmark_data

SMALL = ["data", "--images", "5", "--size", "60,90", "--patch", "32,48", "--batch", "2", "--workers", "0", "--repeats", "2"]


def test_benchmark_prints_a_row_for_each_loader(capsys):
    benchmark.main(SMALL)
    rows = capsys.readouterr().out.splitlines()[-9:]
    assert rows[0].split()[-1] == "ratio"
    assert ["by hand" in row for row in rows[1:]] == [True, False] * 4
    assert all("1.00x" in row for row in rows[1::2])
    assert ["yes" in row for row in rows[1:]] == [False, False, True, True] * 2


@pytest.mark.parametrize("train", [True, False], ids=["patches", "whole"])
def test_benchmark_fails_where_loaders_differ(train, monkeypatch, capsys):
    made = benchmark_data.transform_by_hand

    def other(card, for_training):
        import albumentations as A

        transform = made(card, for_training)
        return A.Compose([A.InvertImg(p=1.0), *transform.transforms]) if for_training == train else transform

    monkeypatch.setattr(benchmark_data, "transform_by_hand", other)
    with pytest.raises(SystemExit) as error:
        benchmark.main(SMALL)
    assert error.value.code == 1
    assert "the loaders differ: image of" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--patch", "32"), ("--size", "a,b"), ("--batch", "0"), ("--workers", "-1")])
def test_benchmark_refuses_sizes_that_are_none(option, value, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main([*SMALL, option, value])
    assert error.value.code == 2
    assert "expected" in capsys.readouterr().err
