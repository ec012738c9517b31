# SPDX-License-Identifier: Apache-2.0
"""Runs inside the guest, with nothing but Python: two SQLite databases, each on a file system and a disk of
its own, and transactions that change both (SQLite's super-journal makes them one).

    ledger_guest.py write STOP         until the file STOP is there; tells each transaction that was confirmed
    ledger_guest.py check SETS         what recovery makes of as many sets of both disks
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

PLACES = ("/mnt/a", "/mnt/b")  # always the same: the journals name each other by their paths
KEPT = 64


def mount(disks: list[str]) -> None:
    """The file system's own journal is replayed."""
    for disk, place in zip(disks, PLACES, strict=True):
        Path(place).mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "ext4", disk, place], check=True)


def connect() -> sqlite3.Connection:
    """The databases' own recovery is done by the first one who reads."""
    db = sqlite3.connect(f"{PLACES[0]}/one.db", isolation_level=None)
    db.execute("ATTACH ? AS two", (f"{PLACES[1]}/two.db",))
    for name in ("main", "two"):
        db.execute(f"PRAGMA {name}.journal_mode = DELETE")
        db.execute(f"PRAGMA {name}.synchronous = EXTRA")
    return db


def write(stop: str) -> None:
    mount(["/dev/vda", "/dev/vdb"])
    db = connect()
    for name in ("main", "two"):
        db.execute(f"CREATE TABLE IF NOT EXISTS {name}.entry (number INTEGER PRIMARY KEY, text BLOB)")
        db.execute(f"CREATE TABLE IF NOT EXISTS {name}.balance (sum INTEGER)")
        db.execute(f"INSERT INTO {name}.balance SELECT 0 WHERE NOT EXISTS (SELECT * FROM {name}.balance)")
    number = 0
    while not Path(stop).exists():
        number += 1
        db.execute("BEGIN IMMEDIATE")
        for name, sign in (("main", 1), ("two", -1)):
            db.execute(f"INSERT INTO {name}.entry VALUES (?, ?)", (number, os.urandom(2000)))
            db.execute(f"DELETE FROM {name}.entry WHERE number <= ?", (number - KEPT,))
            db.execute(f"UPDATE {name}.balance SET sum = sum + ?", (sign * number,))
        db.execute("COMMIT")
        print(f"confirmed {number} {db.total_changes}", flush=True)


def check_sets(sets: int) -> None:
    for at in range(sets):
        disks = [f"/dev/ubd{chr(ord('a') + 2 * at + which)}" for which in range(2)]
        mount(disks)
        hot = [name for place in PLACES for name in Path(place).glob("*journal*")]
        db = connect()
        rows = [db.execute(f"SELECT number FROM {name}.entry ORDER BY number").fetchall()
                for name in ("main", "two")]  # fmt: skip
        sums = [db.execute(f"SELECT sum FROM {name}.balance").fetchone()[0] for name in ("main", "two")]
        whole = [db.execute(f"PRAGMA {name}.integrity_check").fetchone()[0] for name in ("main", "two")]
        db.close()
        last = [numbers[-1][0] if numbers else 0 for numbers in rows]
        wrong = []
        for numbers, end in zip(rows, last, strict=True):
            if [number for (number,) in numbers] != list(range(max(1, end - KEPT + 1), end + 1)):
                wrong.append("rows are missing")
        if last[0] != last[1] or sums != [last[0] * (last[0] + 1) // 2, -last[1] * (last[1] + 1) // 2]:
            wrong.append(f"half a transaction: {last} {sums}")
        if whole != ["ok", "ok"]:
            wrong.append(f"integrity: {whole}")
        for disk, place in zip(disks, PLACES, strict=True):
            subprocess.run(["umount", place], check=True)
            checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
            if checked.returncode != 0:
                wrong.append(f"e2fsck: {checked.stdout[-300:]}")
        said = "; ".join(wrong).replace("\n", " ") or "-"
        print(f"set {at} last {last[0]} journals {len(hot)} wrong {said}")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2])
    else:
        check_sets(int(sys.argv[2]))
