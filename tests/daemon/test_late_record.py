# SPDX-License-Identifier: Apache-2.0
"""The state directory is full when a disk is started that was stopped in order."""

from __future__ import annotations

from pathlib import Path

from tests.daemon.rig import Served, await_true, fill, flush, image, refused_start, tmpfs, write_block


def test_a_full_state_directory(work: Path) -> None:
    a, b = image(work / "a.img"), image(work / "b.img")
    with tmpfs(work, 256) as files:
        (work / "state").symlink_to(files.folder)
        with Served(work, a) as served:
            served.start_mirror(b)
            served.stop()
        fill(files.folder / "ballast")
        environment = {"STATE_DIRECTORY": str(work / "state")}
        code, said = refused_start("serve", "--blk-file", a, "--socket-path", work / "s", env=environment)
        assert code == 1 and f"what is there calls {b} up to date" in said and "No space left" in said
        (files.folder / "ballast").unlink()
        with Served(work, a) as served:
            served.await_resumed()
            served.qmp.execute("mirror-cancel")
            served.stop()
        fill(files.folder / "ballast")
        with Served(work, a) as served, served.guest() as guest:
            write_block(guest, 3, 1)
            flush(guest)
            assert "No space left" in served.mirror()["last-error"]
            record = served.record()
            assert record is not None and record.clean
            (files.folder / "ballast").unlink()

            def written() -> bool:
                record = served.record()
                return record is not None and not record.clean

            await_true(written, "the record is written")
            guest.close()
            served.stop()
        assert "the state record is written as soon as it can be" in (work / "vm.log").read_text()
