# SPDX-License-Identifier: Apache-2.0
"""Every exception that vhostsync raises for a reason outside its own code.

The message of each is one clear sentence (what is wrong and what to do) because it is what a person reads:
on stderr of `serve`, in the reply on the control socket, in the log. The exception that led to it is kept
as its cause (`raise … from error`). Programmer errors are not here: they are asserts, ValueError and
TypeError.

The tree::

    VhostsyncError
      ConfigError         an option or a file named by an option; `serve` ends with exit code 1
      DiskError           a disk that cannot serve
      ReceiverError       what the receiver of a disk says no to
      StateRecordError    a disk that the state record does not let serve, or a record that cannot be used
        DamagedRecordError  its text is not whole
        UnsettledRecordError  a change of it that was perhaps made
        SupersededError     somebody else has changed it, so this process does not any more
      FrontendError       ends the connection of this frontend, and of no other
      EngineError         the data plane refused; has an errno
      MirrorError         a command that does not fit the state
        SwitchError       a switch that was aborted; the guest is still on the source
        FenceError        what a lost connection has left under way may not be over yet
      HandOverError       one process of `serve` does not go on for another
      ControlError        the control socket as a client sees it
        UnreachableError  nobody answers there
"""

import errno
import os
from typing import Any, Final


class VhostsyncError(Exception):
    """Base of all; never raised itself."""


class ConfigError(VhostsyncError):
    """A value or a file in the configuration is wrong."""


class DiskError(VhostsyncError):
    """A disk cannot serve: missing, too small, in use by somebody else, a block size that does not fit."""


class ReceiverError(VhostsyncError):
    """The receiver does not let this owner have the disk, or not do that with it."""


class StateRecordError(VhostsyncError):
    """The state record is damaged, or it names another disk as the current one."""


class DamagedRecordError(StateRecordError):
    """The state record's text is not whole, so it cannot be told which disk is the current one."""


class UnsettledRecordError(StateRecordError):
    """A change of the state record has perhaps been made, or will be yet."""


class SupersededError(StateRecordError):
    """The state record is not as this process has last seen it: somebody else decides by now."""


class BitmapError(VhostsyncError):
    """The file of the dirty bitmap cannot be used: in use, no room, no right."""


class FrontendError(VhostsyncError):
    """A frontend sent what it must not; its connection ends."""


_START_ADVICE: Final = {
    errno.EPERM: "a seccomp profile or kernel.io_uring_disabled forbids io_uring here; allow it",
    errno.ENOMEM: "the limit on locked memory is too small; raise it (LimitMEMLOCK=, ulimit -l)",
    errno.EAGAIN: "no more threads are allowed; raise the limit (TasksMax=, ulimit -u) or lower --threads",
    errno.EMFILE: "the limit on open files is too small; raise it (LimitNOFILE=, ulimit -n)",
    errno.ENOSYS: "this kernel has no io_uring that will do; Linux 5.11 or newer is needed",
    errno.EINVAL: "this kernel lacks a flag of io_uring that is needed, or the configuration is impossible",
}


class EngineError(VhostsyncError):
    """The engine (C) refused a call. `errno` is a positive error number of <errno.h>."""

    def __init__(self, message: str, error_number: int) -> None:
        super().__init__(message)
        self.errno = error_number

    @classmethod
    def from_errno(cls, doing: str, error_number: int) -> "EngineError":
        """An error whose sentence is `doing` followed by what the number means; the sign of the number does
        not matter."""
        number = abs(error_number)
        name = errno.errorcode.get(number, f"errno {number}")
        return cls(f"{doing}: {os.strerror(number)} ({name})", number)

    @classmethod
    def at_start(cls, doing: str, error_number: int) -> "EngineError":
        """The same of what starts threads or makes a ring, with what the operator can do."""
        advice = _START_ADVICE.get(abs(error_number))
        return cls.from_errno(f"{doing} ({advice})" if advice else doing, error_number)


class MirrorError(VhostsyncError):
    """The mirror cannot do that now; the reply on the control socket is this sentence."""


class SwitchError(MirrorError):
    """The switch was given up before the exchange: the guest is still on the source and the mirror is as it
    was."""


class FenceError(MirrorError):
    """A disk is not written to yet: what a lost connection has left under way there may not be over."""


class HandOverError(VhostsyncError):
    """A backend does not hand over to its successor, or the successor did not come to serve."""


class ControlError(VhostsyncError):
    """A client of the control socket got an error reply, or something that is no reply."""


class UnreachableError(ControlError):
    """The control socket cannot be reached, or the backend went away before it replied."""


def leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    """What has failed in a group of tasks, without the groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
