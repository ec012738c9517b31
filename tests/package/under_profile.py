# SPDX-License-Identifier: Apache-2.0
"""`under_profile.py PROFILE.json COMMAND…`: the command, under a container's seccomp profile. A call that is
not in it ends the process."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Final

from vhostsync.confine.seccomp import ACT_ALLOW, LIBRARY, _Comparison

KILL_PROCESS: Final = 0x80000000
NO_NEW_PRIVS: Final = 38
OPERATORS: Final = {"SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4}


def confine(profile: Path) -> None:
    library = ctypes.CDLL(LIBRARY, use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(KILL_PROCESS)))
    for rule in json.loads(profile.read_text())["syscalls"]:
        assert rule["action"] == "SCMP_ACT_ALLOW"
        comparisons = [
            _Comparison(each["index"], OPERATORS[each["op"]], each["value"], 0)
            for each in rule.get("args", ())
        ]
        for name in rule["names"]:
            call = library.seccomp_syscall_resolve_name(name.encode())
            if call == -1:  # newer than this libseccomp
                continue
            words = (_Comparison * len(comparisons))(*comparisons)
            library.seccomp_rule_add_array(context, ctypes.c_uint32(ACT_ALLOW), call, len(comparisons), words)
    if ctypes.CDLL(None).prctl(NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or library.seccomp_load(context) != 0:
        sys.exit("the profile cannot be loaded")


if __name__ == "__main__":
    confine(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
