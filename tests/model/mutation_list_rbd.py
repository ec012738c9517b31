# SPDX-License-Identifier: Apache-2.0
"""The seeded faults of disks of a Ceph cluster. Most of their tests start one."""

from __future__ import annotations

from tests.model.mutation import mutation as _m

_IMAGE = "vhostsync/storage/rbd_image.py"
_ACCESS = "network/test_rbd_access.py"
_FAILURES = "network/test_rbd_failures.py"
_STAYS_OUT = f"{_FAILURES}::test_a_lock_of_another_host_is_broken_on_demand_and_its_owner_stays_out"

RBD = [
    _m(
        "a-lock-that-is-not-taken",
        "a backend holds the exclusive lock for as long as it uses the image",
        "vhostsync/storage/rbd.py",
        "                if not read_only:\n                    image.lock(",
        "                if read_only:\n                    image.lock(",
        "network/test_rbd.py::test_one_that_somebody_has_is_refused",
    ),
    _m(
        "a-lock-broken-and-nobody-shut-out",
        "rule 8: whose lock is broken is shut out first",
        _IMAGE,
        "        self.pool.shut_out(address)\n",
        "",
        _STAYS_OUT,
    ),
    _m(
        "shut-out-for-an-hour",
        "rule 8: for years, because a client that was stopped goes on once the entry has expired",
        "vhostsync/storage/ceph_client.py",
        "SHUT_OUT_S: Final = 10 * 365 * 24 * 3600",
        "SHUT_OUT_S: Final = 3600",
        _STAYS_OUT,
    ),
    _m(
        "an-error-taken-for-an-answer",
        "rule 8: what a client that was shut out has asked for is not carried out",
        "rbd_disk.c",
        "        result = of_disk(found);\n    else if (io->kind == VS_DISK_READ",
        "        result = 0;\n    else if (io->kind == VS_DISK_READ",
        _STAYS_OUT,
    ),
    _m(
        "a-request-given-up",
        "rule 8: no timeout ends what librbd has under way, for it might still be carried out",
        "rbd_disk.c",
        '    rados_conf_set(cluster, "rados_osd_op_timeout", "0"); /* see above */\n',
        "",
        f"{_FAILURES}::test_a_guest_waits_for_its_cluster_longer_than_any_call_of_the_control_plane",
    ),
    _m(
        "an-owner-of-another-host-is-gone",
        "whoever cannot be looked for may be there: only the operator breaks that lock",
        "vhostsync/storage/rbd_owner.py",
        "or not self.machine or self.machine != _this_machine():\n            return False",
        "or not self.machine or self.machine != _this_machine():\n            return True",
        "unit/test_rbd_owner.py::test_whom_nobody_here_can_look_for_may_be_there",
    ),
    _m(
        "a-number-that-came-back",
        "a process that got the number of the owner is not the owner",
        "vhostsync/storage/rbd_owner.py",
        "if _began(self.pid) != self.began:",
        "if _began(self.pid) is None:",
        "unit/test_rbd_owner.py::test_a_number_that_another_process_has_by_now_is_no_owner",
    ),
    _m(
        "a-cache-of-librbds",
        "an image whose own settings turn librbd's cache on is refused: it would answer what no OSD has",
        _IMAGE,
        'if settings.get("rbd_cache") == "true":',
        'if settings.get("rbd_cache") == "never":',
        f"{_ACCESS}::test_an_image_that_breaks_a_promise_is_refused",
    ),
    _m(
        "a-hole-that-was-written",
        "a hole is one as long as the guest has not written there",
        "rbd_disk.c",
        "    if (io->kind == VS_DISK_WRITE)\n        rbd_holes_write(",
        "    if (io->kind == VS_DISK_ZERO)\n        rbd_holes_write(",
        f"{_ACCESS}::test_holes_are_not_copied",
    ),
    _m(
        "zeroed-in-part",
        "rule 9: a range that is zeroed reads as zeroes to its end",
        "rbd_disk.c",
        "        result = DISK_GO_ON;\n    core->complete_remote(io, result);",
        "        result = 0;\n    core->complete_remote(io, result);",
        f"{_ACCESS}::test_a_large_range_is_zeroed_to_its_end",
    ),
]
