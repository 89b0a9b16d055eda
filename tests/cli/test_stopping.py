"""A worker's death is told from other errors, whoever has made an error of his own of it."""

import pytest

from densecal.cli.stopping import worker_death

DEATH = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def caught_by_another():
    try:
        raise DEATH
    except RuntimeError as error:
        raise TypeError("unsupported callable") from error


def test_a_death_is_found_behind_another_error():
    with pytest.raises(TypeError) as raised:
        caught_by_another()
    assert worker_death(raised.value) == worker_death(DEATH) == "worker (pid 7) is killed by signal: Killed"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError(str(DEATH)), TypeError("unsupported callable"), RuntimeError()])
def test_other_errors_are_none(error):
    assert worker_death(error) is None
