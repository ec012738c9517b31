# SPDX-License-Identifier: Apache-2.0
"""Every attachment gives its place back, however it has ended."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.model.stage import Stage, play
from vhostsync._shim import lib
from vhostsync.engine.engine import ATTACHMENTS_MAX
from vhostsync.errors import EngineError


def test_a_renewal_that_ends_halfway_costs_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: Stage) -> None:
        command = it.engine.command

        async def out_of_memory(kind: int, doing: str, **fields: Any) -> int:
            if kind == lib.VS_CMD_ATTACH:
                raise EngineError.from_errno(doing, errno.ENOMEM)
            return await command(kind, doing, **fields)

        for _ in range(ATTACHMENTS_MAX):
            attachment = await it.engine.attach()
            attachment._command = lambda kind, doing, at=attachment, **fields: out_of_memory(
                kind, doing, attachment=at.index, **fields
            )
            with pytest.raises(EngineError, match="attaching the frontend anew"):
                await attachment.renew()
            await attachment.close()
        await (await it.engine.attach()).close()

    play(scene, tmp_path, monkeypatch)
