"""The processes that work on one search or one batch: torch.distributed is their engine, torchrun starts them.

    ranks = distributed.start()  # in each process of torchrun
    result = ses_fast.evolve(base, objective, seed=0, process_group=ranks)

Every rank runs the same search, and by the seed's contract draws the same candidates. It scores its own share of them;
the scores of all are gathered, so that all ranks learn the same. Texts of JSON travel, nothing that runs code.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import differences

TIMEOUT = timedelta(hours=1)  # how long a rank waits for the others
STARTED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
MOST_CHARACTERS = 4_000  # of an error that travels
ENDED = 1 << 40  # numbers taken, when nobody shall take one any more


class RankFailed(RuntimeError):
    """Another rank has failed; the original error is raised there. `ses_result` is kept here too.

    kind: its class's name. stopped: whether it was stopped (Ctrl-C, an exit), and is no mere Exception.
    """

    ses_told = True  # all ranks know of it

    def __init__(self, rank: int, kind: str, message: str, stopped: bool) -> None:
        super().__init__(f"rank {rank}: {kind}: {message}")
        self.kind, self.stopped = kind, stopped


class LostRank(RuntimeError):
    """Another rank is gone, or has not answered in time: the group is of no more use."""

    ses_told = True  # nobody can be told any more


@runtime_checkable
class Ranks(Protocol):
    """The processes that work together. All of them make the same calls, in the same order.

    `rank` counts from 0, which alone shows progress and calls callbacks; `size` is how many there are.
    """

    rank: int
    size: int

    def share(self, n: int) -> slice:
        """This rank's of n rows: rank after rank they are all rows, and rank 0 has no fewer than another."""

    def gather(self, numbers: Tensor) -> Tensor:
        """[m] of this rank, m may be 0 -> [n] of all, rank after rank; fp64, on its device."""

    def agree(self, value: Any) -> Any:
        """Rank 0's value, as JSON."""

    def send(self, tensor: Tensor | None, device: torch.device | str) -> Tensor:
        """The tensor of the one rank that has it, bit for bit, to all."""

    def compare(self, facts: Mapping[str, Any], *, where_known: bool = False) -> None:
        """Raises ValueError on every rank where one has other facts (as JSON); it says which, and what.

        where_known: a fact that a rank does not have, or None, is no other one.
        """

    def take(self, n: int) -> Iterator[int]:
        """Numbers below n, each to one rank, in order, as the ranks ask for them; no more when one has failed."""

    def in_touch(self) -> None:
        """Raises LostRank where the store is gone: who started this process has died; and while numbers are taken,
        RankFailed where another rank has failed."""

    def joined(self) -> AbstractContextManager[None]:
        """What is raised inside on one rank leaves there as it is, and on every other as RankFailed.

        The others hear of it when they next gather, or are in touch, or at the end of this context.
        """


class Alone:
    """One process, which does everything itself."""

    rank: int = 0
    size: int = 1

    def share(self, n: int) -> slice:
        return slice(0, n)

    def gather(self, numbers: Tensor) -> Tensor:
        return numbers

    def agree(self, value: Any) -> Any:
        return value

    def send(self, tensor: Tensor | None, device: torch.device | str) -> Tensor:
        assert tensor is not None
        return tensor

    def compare(self, facts: Mapping[str, Any], *, where_known: bool = False) -> None:
        pass

    def take(self, n: int) -> Iterator[int]:
        return iter(range(n))

    def in_touch(self) -> None:
        pass

    def joined(self) -> AbstractContextManager[None]:
        return nullcontext()


ALONE: Ranks = Alone()


class Group:
    """The ranks of a process group of torch.distributed."""

    def __init__(self, group: Any) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the process group that it was given")
        self.group, self.store = group, group.get_group_store()
        # What travels is the host's. By gloo, where the group has it, because it says at once that a process has died.
        self.device = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
        self.queue: str | None = None  # the store's key of `take`, while numbers are taken

    def share(self, n: int) -> slice:
        each, more = divmod(n, self.size)
        first = self.rank * each + min(self.rank, more)
        return slice(first, first + each + (self.rank < more))

    def gather(self, numbers: Tensor) -> Tensor:
        every = self._exchange(numbers.detach().to("cpu", torch.float64).tolist())
        joined = [number for each in every for number in each]
        return torch.tensor(joined, dtype=torch.float64, device=numbers.device)

    def agree(self, value: Any) -> Any:
        return self._exchange(value if self.rank == 0 else None)[0]

    def send(self, tensor: Tensor | None, device: torch.device | str) -> Tensor:
        mine = None if tensor is None else [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        source, (dtype, shape) = next((rank, each) for rank, each in enumerate(self._exchange(mine)) if each)
        sent = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        if tensor is not None:
            sent.copy_(tensor.detach())
        with _in_touch():
            dist.broadcast(sent.view(-1).view(torch.uint8), group=self.group, group_src=source)
        return sent.to(device)

    def compare(self, facts: Mapping[str, Any], *, where_known: bool = False) -> None:
        every = self._exchange(facts)
        others = [
            f"rank {rank} has {name} {theirs!r:.200}, rank 0 {first!r:.200}"
            for rank, each in enumerate(every)
            for name, first, theirs in differences(every[0], each)
            if not (where_known and None in (first, theirs))
        ]
        if others:
            raise ValueError(
                f"the {self.size} processes do not work on the same: {'; '.join(others[:5])}. Give each the same "
                "arguments, the same weights and a seed"
            )

    def take(self, n: int) -> Iterator[int]:
        self.queue = self.agree(f"ses_fast/{uuid.uuid4().hex}")
        return self._taken(n)

    def _taken(self, n: int) -> Iterator[int]:
        while (number := self._add(1) - 1) < n:
            yield number
        self.queue = None

    def in_touch(self) -> None:
        if self._add(0) >= ENDED:
            self._exchange(None)  # the one that has failed waits there, to say how

    def _add(self, count: int) -> int:
        with _in_touch():
            return self.store.add(self.queue or "ses_fast", count)

    @contextmanager
    def joined(self) -> Iterator[None]:
        try:
            yield
            self._exchange(None)  # another may have failed since
        except BaseException as error:
            if not _is_told(error):
                try:
                    if self.queue is not None:  # the others gather nothing before the last number is taken
                        self._add(ENDED)
                    self._exchange(None, error)
                except LostRank as lost:
                    error.add_note(f"the other processes could not be told: {lost}")
                # An exception may be a frozen dataclass, which refuses error.ses_told = ...
                object.__setattr__(error, "ses_told", True)
            self.queue = None
            raise

    def _exchange(self, value: Any, error: BaseException | None = None) -> list[Any]:
        """Each rank's value. Raises RankFailed where another one has an error; with one here the others are told."""
        failed = error is not None
        text = json.dumps(value if error is None else _in_words(error)).encode()
        try:
            heads = [each.tolist() for each in self._gathered(torch.tensor([failed, len(text)]))]
            longest = max(length for _, length in heads)
            rows = self._gathered(torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8))
        except BaseException as stopped:  # Ctrl-C half-way: another exchange would meet the rest of this one
            object.__setattr__(stopped, "ses_told", True)
            raise
        texts = [bytes(row[:length].tolist()) for row, (_, length) in zip(rows, heads, strict=True)]
        values = [json.loads(text) for text in texts]
        if not failed:
            for rank, (has_failed, _) in enumerate(heads):
                if has_failed:
                    raise RankFailed(rank, *values[rank])
        return values

    def _gathered(self, mine: Tensor) -> list[Tensor]:  # [m], of one length on all ranks
        mine = mine.to(self.device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with _in_touch():
            dist.all_gather(every, mine, group=self.group)
            return [each.cpu() for each in every]


@contextmanager
def _in_touch() -> Iterator[None]:
    """Every error of torch.distributed is a RuntimeError, a timeout too; nothing but it happens inside."""
    try:
        yield
    except RuntimeError as error:
        _lost(error)


def _lost(error: RuntimeError) -> NoReturn:
    reason = " ".join(str(error).split("Exception raised from")[0].split())
    raise LostRank(f"another process is gone, or did not answer in time: {reason:.300}") from error


def _is_told(error: BaseException | None) -> bool:
    """Whether all ranks know of the error, or of the one that it came from."""
    while error is not None:
        if getattr(error, "ses_told", False):
            return True
        error = error.__cause__
    return False


def _in_words(error: BaseException) -> tuple[str, str, bool]:
    """The arguments of RankFailed after the first."""
    message = str(error)[:MOST_CHARACTERS].encode("utf-8", "replace").decode()
    return type(error).__name__, message, not isinstance(error, Exception)


def start(timeout: timedelta = TIMEOUT) -> Ranks:
    """The ranks of the processes that torchrun has started, this one among them; alone without torchrun.

    Each takes the GPU of its LOCAL_RANK, where there are any. timeout: how long one waits for the others. A process
    group that exists already is taken as it is. Raises ValueError for more processes on a machine than it has GPUs, and
    for what is no time.
    """
    if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
        raise ValueError(f"timeout must be a datetime.timedelta above 0, got {timeout!r:.200}")
    if not any(name in os.environ for name in STARTED_BY[:2]) or not dist.is_available():
        return ALONE
    if missing := [name for name in STARTED_BY if name not in os.environ]:
        raise ValueError(f"{', '.join(missing)}: torchrun sets these, and they are not in the environment")
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpu:
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"process {local} of this machine has no GPU: --nproc-per-node={count} is the most")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    return ranks_of("auto")


def stop() -> None:
    """Ends the process group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ranks_of(process_group: Any) -> Ranks:
    """The ranks that a `process_group` argument names.

    process_group: None: this process alone; "auto": the default group of torch.distributed, where that is initialised;
    a group of it; or what `start` returned. Raises ValueError for another, and for a group without this process.
    """
    check_process_group(process_group)
    if isinstance(process_group, str):
        initialised = dist.is_available() and dist.is_initialized()
        process_group = dist.group.WORLD if initialised else None
    if process_group is None:
        return ALONE
    ranks: Ranks = process_group if isinstance(process_group, Ranks) else Group(process_group)
    return ranks if ranks.size > 1 else ALONE


def check_process_group(given: Any) -> None:
    """Raises ValueError for what is no `process_group`."""
    good = given is None or isinstance(given, Ranks) or (isinstance(given, str) and given == "auto")
    if not good and not (dist.is_available() and isinstance(given, dist.ProcessGroup)):
        raise ValueError(f'process_group must be None, "auto" or a group of torch.distributed, got {given!r}')
