"""Several ranks in processes of their own, forked from one that has loaded everything."""

import multiprocessing
import os
import socket
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType

from ses_fast import distributed


def together(work, size, *arguments, timeout=60, patience=120):
    """What `work(ranks, *arguments)` returns on each of `size` ranks: ("returned", value), ("raised", class, text), or
    ("died", exit code). work: a function of a module. timeout: of the group, in seconds; patience: the test's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # and all that it imports; counts until the first process starts
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parent, os.environ.get("PYTHONPATH", ""))))
    port = free_port()
    children = []
    with without_main():
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            child = context.Process(target=serve, args=(theirs, work, rank, size, port, timeout, arguments))
            child.start()
            theirs.close()
            children.append((child, mine))
    said = []
    try:
        for child, mine in children:
            assert mine.poll(patience), "a rank hangs"
            try:
                said.append(mine.recv())
            except EOFError:
                child.join(patience)
                said.append(("died", child.exitcode))
    finally:
        for child, _ in children:
            child.kill()
            child.join()
    return said


@contextmanager
def without_main():
    """A new process would run the main module again, which here is pytest."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def returned(said):
    """The values; fails where a rank raised."""
    assert [each[0] for each in said] == ["returned"] * len(said), said
    return [each[1] for each in said]


def serve(connection, work, rank, size, port, timeout, arguments):
    import torch

    torch.set_num_threads(1)
    os.environ |= environment(rank, size, port)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what torch says of a connection that is lost
    try:
        ranks = distributed.start(timedelta(seconds=timeout)) if size > 1 else distributed.ALONE
        said = ("returned", work(ranks, *arguments))
    except BaseException as error:
        said = ("raised", type(error).__name__, str(error))
    connection.send(said)
    connection.close()
    sys.stdout.flush()
    os._exit(0)


def environment(rank, size, port):
    """As torchrun sets it."""
    return {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]
