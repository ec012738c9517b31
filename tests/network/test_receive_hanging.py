# SPDX-License-Identifier: Apache-2.0
"""A server that does not die, because a request of it hangs in the disk: no generation begins over it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.daemon.rig import Mounted, ext4, image
from tests.network.receivers import HOST, Data, needs_programs
from vhostsync.errors import DiskError
from vhostsync.receive import nbd_server
from vhostsync.receive.ownership import OwnershipFile
from vhostsync.receive.receiver import Begun, Receiver

pytestmark = [*needs_programs, pytest.mark.anyio, pytest.mark.timeout(120)]


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Mounted]:
    with ext4(tmp_path) as there:
        yield there


def told(begun: Begun) -> dict[str, object]:
    return {
        "user": begun.user, "key": begun.key, "port": begun.port, "export": begun.export,
        "generation": begun.generation,
    }  # fmt: skip


async def test_no_generation_begins_as_long_as_the_former_server_is_not_dead(
    tmp_path: Path, there: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_server, "DEATH_S", 1.0)
    disk = image(there.folder / "d.img", 8, filled_mib=8)
    file = OwnershipFile(tmp_path / "d.receive")
    ownership = file.open()
    nbd_server.make_folder(file.key_folder)
    with socket.socket() as data:
        data.bind((HOST, 0))
        data.listen()
        data.setblocking(False)
        receiver = Receiver(disk, file, ownership, data, may_create=False)
        receiver.open()
        async with anyio.create_task_group() as tasks:
            await tasks.start(receiver.run)
            first = await receiver.begin(disk=None, token=None, instance="a", generation=None, owner="a")
            server = receiver.report()["server"]
            with await anyio.to_thread.run_sync(Data, tmp_path, told(first)) as client:
                await anyio.to_thread.run_sync(client.write, 0, 4096, 0x41)
                there.freeze()
                client.send("aio_write -q -P 66 1M 1M")
                with anyio.fail_after(30):
                    while "D" not in states(server):
                        await anyio.sleep(0.01)
                for _ in range(2):  # asked again, it is refused again
                    with pytest.raises(DiskError, match=f"pid {server}.* is not dead: a request of it hangs"):
                        await receiver.begin(disk=None, token=None, instance="a", generation=1, owner="a")
                assert receiver.report()["generation"] == 1
                there.thaw()
                second = await receiver.begin(disk=None, token=None, instance="a", generation=1, owner="a")
                assert second.generation == 2 and receiver.report()["server"] != server
            await receiver.close()
            tasks.cancel_scope.cancel()


def states(pid: int) -> set[str]:
    """Of its threads."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return found
