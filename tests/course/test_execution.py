import asyncio
import time
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import zmq
import zmq.asyncio
from nbclient import NotebookClient

from hydra_lab.course.execution import Client


async def reply_while_a_widget_is_answered(kind: type[NotebookClient]) -> list[bytes]:
    """The kernel's reply, which comes just before the client answers an output widget over the same socket."""
    with zmq.asyncio.Context() as waiting, zmq.Context() as plain:
        kernel, client = plain.socket(zmq.DEALER), waiting.socket(zmq.DEALER)
        with kernel, client:
            client.connect(f"tcp://127.0.0.1:{kernel.bind_to_random_port('tcp://127.0.0.1')}")
            coming = asyncio.ensure_future(client.recv_multipart())
            await asyncio.sleep(0.2)  # connected, and waiting
            kernel.send(b"reply")
            time.sleep(0.2)  # not asyncio's: the loop must not see the reply before the answer goes out
            runner: Any = kind(nbformat.v4.new_notebook())
            runner.kc = SimpleNamespace(shell_channel=SimpleNamespace(socket=client))
            runner.comm_objects["widget"] = SimpleNamespace(
                handle_msg=lambda _message: zmq.Socket.shadow(client).send(b"state")
            )
            message = {"msg_type": "comm_msg", "content": {"comm_id": "widget", "data": {}}}
            runner.handle_comm_msg([], message, 0)
            return await asyncio.wait_for(coming, 2)


def test_the_end_of_a_cell_is_not_missed_behind_an_output_widget() -> None:
    assert asyncio.run(reply_while_a_widget_is_answered(Client)) == [b"reply"]


def test_nbclient_alone_still_misses_it() -> None:
    """Once this fails, `Client` has nothing left to do."""
    with pytest.raises(TimeoutError):
        asyncio.run(reply_while_a_widget_is_answered(NotebookClient))
