# SPDX-License-Identifier: Apache-2.0
import errno
import inspect

import pytest

from vhostsync import errors


def test_every_error_is_caught_as_one() -> None:
    kinds = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__
    ]
    assert len(kinds) >= 9
    assert all(issubclass(kind, errors.VhostsyncError) for kind in kinds)


def test_a_refused_switch_is_a_refused_command() -> None:
    assert issubclass(errors.SwitchError, errors.MirrorError)
    assert issubclass(errors.UnreachableError, errors.ControlError)


@pytest.mark.parametrize("number", [errno.ENOSPC, -errno.ENOSPC])
def test_an_engine_error_says_what_its_number_means(number: int) -> None:
    error = errors.EngineError.from_errno("Writing to /disks/a.img failed", number)
    assert error.errno == errno.ENOSPC
    assert str(error) == "Writing to /disks/a.img failed: No space left on device (ENOSPC)"


def test_an_unknown_number_is_shown() -> None:
    assert "errno 9999" in str(errors.EngineError.from_errno("It failed", 9999))
