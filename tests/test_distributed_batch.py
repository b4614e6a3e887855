"""A batch by several processes: the same images whatever they share, each prompt once, and nothing lost by a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import environment, free_port, returned, together
from test_batch import EMBEDDED, PROMPTS, SMALL, command, leftovers, lines, pictures, toy_command
from toy_batch import Forks, ToyPipeline, redness

from ses_fast import batch, embedded, folder
from ses_fast.folder import Folder, Result

MANY = [f"{colour} {thing}" for colour in ("red", "green") for thing in ("foxes", "cats", "hills")]
# Previews one at a time: a shared population's batches are smaller, and their scores then those of one process to
# rounding alone. The last prompts that a kill has left are shared so.
TO_THE_BIT = (*EMBEDDED, "--batch-size", 1)
NAMES = {"batch.json", "results.jsonl", "summary.json", "index.html", "images", "searches"}


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


def lines_of(record):
    return record.read_text().splitlines()


def check_whole(out, reference, ids):
    """Every prompt is done once, as one process does it, and nothing else is left."""
    done = {line["id"]: line for line in lines(out)}
    assert sorted(line["id"] for line in lines(out)) == sorted(ids) and len(done) == len(ids)
    assert {line["status"] for line in done.values()} == {"done"}
    assert pictures(out) == pictures(reference) and not leftovers(out)
    assert {line["id"]: line["scores"] for line in lines(reference)} == {id: done[id]["scores"] for id in done}
    assert json.loads((out / "summary.json").read_text())["done"] == len(ids)
    assert {path.name for path in out.iterdir() if not path.name.startswith(".lock")} == NAMES


def run(forks, size, *arguments, dies=None, die_at=0):
    """The exit codes of the ranks. dies: the rank that kills itself before its write of the number `die_at`."""
    port = free_port()
    pids = []
    for rank in range(size):
        at = die_at if rank == dies else 0
        pids.append(forks.start(*arguments, die_at=at, environment=environment(rank, size, port)))
    return [forks.wait(pid) for pid in pids]


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """(the file of prompts, the folder that one process has made of it, the ids)"""
    path = tmp_path_factory.mktemp("whole")
    (path / "p.txt").write_text("\n".join(MANY))
    assert forks.run(*toy_command(path / "p.txt", path / "out")) == 0
    return path / "p.txt", path / "out", [line["id"] for line in lines(path / "out")]


@pytest.mark.parametrize("shard", ["prompts", "population"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_command_makes_what_one_process_makes(shard, size, forks, whole, tmp_path):
    file, reference, ids = whole
    assert run(forks, size, *toy_command(file, tmp_path / "out", "--shard", shard)) == [0] * size
    check_whole(tmp_path / "out", reference, ids)
    when = (tmp_path / "out" / "index.html").stat().st_mtime_ns
    assert run(forks, 2, *toy_command(file, tmp_path / "out")) == [0, 0]  # however many go on
    assert (tmp_path / "out" / "index.html").stat().st_mtime_ns == when


# The rank that is killed, and before which of its writes: in the first prompt, and later. The first one's first writes
# are the settings'.
@pytest.mark.parametrize("shard, dies, die_at", [("prompts", 1, 3), ("prompts", 0, 12), ("population", 0, 9)])
def test_a_killed_rank_loses_nothing(shard, dies, die_at, forks, whole, tmp_path):
    file, reference, ids = whole
    codes = run(forks, 2, *toy_command(file, tmp_path / "out", "--shard", shard), dies=dies, die_at=die_at)
    assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == 1  # which says that the other is gone
    assert run(forks, 2, *toy_command(file, tmp_path / "out", "--shard", shard)) == [0, 0]
    check_whole(tmp_path / "out", reference, ids)


def test_bad_input_ends_all(forks, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,seed\na,x\n")
    assert run(forks, 2, *toy_command(tmp_path / "p.csv", tmp_path / "out")) == [2, 2]
    assert not list((tmp_path / "out").glob("*.j*"))


# ---------------------------------------------------------------- from Python


def of_batch(ranks, out, prompts, options, fault=""):
    """(what was yielded, the prompts that were rendered, what was warned of)"""
    import warnings

    def reward(images, prompt):
        assert judge is not None  # as a reward that has weights
        if fault == f"stop {ranks.rank}":
            raise KeyboardInterrupt
        if fault == "a prompt" and prompt == PROMPTS[1] and (ranks.rank == 1 or options.get("shard") == "prompts"):
            raise ValueError("no")
        return redness(images, prompt)

    if fault == "disk" and ranks.rank == 0:
        folder.write_whole = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    reward.__module__, reward.__qualname__ = redness.__module__, redness.__qualname__
    pipe, judge = ToyPipeline(), torch.nn.BatchNorm1d(1)
    pipe.vae = torch.nn.BatchNorm1d(1)
    of_rank_1 = {"weights": pipe.vae.weight, "buffers": pipe.vae.running_mean, "checkpoint": judge.bias}
    if fault in of_rank_1 and ranks.rank == 1:
        of_rank_1[fault].data += 1
    call = {"ses_reward_model": reward, "ses_eval_budget": 10, "ses_config": SMALL, "progress": False} | options
    if fault == "seed":
        call["seed"] = ranks.rank
    if fault == "argument" and ranks.rank == 1:
        call["ses_inference_steps"] = 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        results = list(batch.run(pipe, prompts, out, **call, process_group=ranks))
    said = [(each.prompt, each.status, each.error) for each in results]
    return said, [each["prompt"] for each in pipe.calls if each["ses"]], [str(each.message) for each in warned]


def test_ranks_share_prompts_or_where_there_are_few_the_population(tmp_path):
    first, other = returned(together(of_batch, 2, tmp_path / "a", PROMPTS, {}))
    assert sorted(each[0] for each in first[0]) == sorted(PROMPTS)  # the first says what all did
    assert sorted(first[1] + other[1]) == sorted(PROMPTS) and first[2] == other[2] == []
    first, other = returned(together(of_batch, 2, tmp_path / "b", PROMPTS[:1], {}))
    assert first[1] == other[1] == PROMPTS[:1] and other[2] == []
    assert first[2] == ["2 processes share generations of 4: 2 turns each, at most 2 times as fast as one"]
    first, other = returned(together(of_batch, 2, tmp_path / "c", PROMPTS, {"shard": "population"}))
    assert first[1] == other[1] == PROMPTS and 'There are 3 prompts: shard "prompts" is done sooner' in first[2][0]


@pytest.mark.parametrize(
    ("size", "prompts", "quicker"),
    [(8, 4, False), (8, 5, True), (8, 8, True), (2, 1, False), (2, 2, True), (64, 9, False), (64, 10, True)],
)
def test_prompts_are_shared_where_that_is_quicker(size, prompts, quicker):
    """In searches' times: one for so few prompts, against a share of each one's generations of 10."""
    assert batch._prompts_are_quicker(10, size, prompts) == quicker


def test_what_is_said_of_a_population_that_does_not_divide():
    assert batch._said_of_population(10, 4, 1) == (
        "4 processes share generations of 10: 3 turns each, at most 3.33 times as fast as one; popsize 12 would use "
        "all of them"
    )


@pytest.mark.parametrize("shard", ["prompts", "population"])
def test_a_prompt_that_fails_stops_nothing(shard, tmp_path):
    first, _ = returned(together(of_batch, 2, tmp_path, PROMPTS, {"shard": shard}, "a prompt"))
    error = "ValueError: no" if shard == "prompts" else "RankFailed: rank 1: ValueError: no"
    assert {each[0]: each[2] for each in first[0]} == dict.fromkeys(PROMPTS) | {PROMPTS[1]: error}
    assert sorted(each["status"] for each in lines(tmp_path)) == ["done", "done", "failed"]
    first, other = returned(together(of_batch, 2, tmp_path, PROMPTS, {"shard": shard}))
    assert {each[1] for each in first[0]} == {"done"} and {*first[1], *other[1]} == {PROMPTS[1]}


# What rank 1 has otherwise -> what is said on both.
OTHERS = {
    "seed": "rank 1 has seed 1, rank 0 0",
    "weights": "rank 1 has weights of pipe.vae 'sha256:",
    "buffers": "rank 1 has weights of pipe.vae 'sha256:",
    "checkpoint": "rank 1 has weights of ses_reward_model.judge 'sha256:",
}


@pytest.mark.parametrize("fault", OTHERS)
def test_other_settings_or_weights_on_a_rank_are_named(fault, tmp_path):
    for kind, name, text in together(of_batch, 2, tmp_path / "out", PROMPTS, {}, fault):
        assert (kind, name) == ("raised", "ValueError") and OTHERS[fault] in text
    assert not (tmp_path / "out").exists()


def test_a_bad_argument_of_one_rank_is_told_to_all(tmp_path):
    first, other = together(of_batch, 2, tmp_path / "out", PROMPTS, {}, "argument")
    assert first[:2] == ("raised", "RankFailed") and "rank 1: ValueError: ses_inference_steps" in first[2]
    assert other[:2] == ("raised", "ValueError") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["prompts", "population"])
def test_a_disk_that_is_full_for_one_ends_all(shard, tmp_path):
    returned(together(of_batch, 1, tmp_path, PROMPTS[:1], {}))  # the settings are there
    first, other = together(of_batch, 2, tmp_path, PROMPTS, {"shard": shard}, "disk")
    assert first[:2] == ("raised", "CannotWrite") and other[:2] == ("raised", "RankFailed")
    assert other[2].startswith("rank 0: CannotWrite: cannot write") and {r["status"] for r in lines(tmp_path)} == {
        "done"
    }


@pytest.mark.parametrize("who", [0, 1])
def test_others_stop_soon_where_one_has_stopped(who, tmp_path):
    """They do not work through all the prompts that are left first."""
    many = [f"prompt {i}" for i in range(200)]
    said = together(of_batch, 2, tmp_path, many, {"shard": "prompts"}, f"stop {who}")
    assert said[who] == ("raised", "KeyboardInterrupt", "") and said[1 - who][:2] == ("raised", "RankFailed")
    assert said[1 - who][2] == f"rank {who}: KeyboardInterrupt: "
    assert sum(map(len, map(lines_of, tmp_path.glob("results*.jsonl")))) < 150
    returned(together(of_batch, 2, tmp_path, many[:2], {"shard": "prompts"}))


def test_a_process_group_is_the_batchs_own():
    config = replace(SMALL, process_group="auto")
    with pytest.raises(ValueError, match="give process_group= to the batch itself"):
        batch.run(ToyPipeline(), PROMPTS, "nowhere", ses_config=config)
    with pytest.raises(ValueError, match="shard must be one of prompts, population, or None; got 'images'"):
        batch.run(ToyPipeline(), PROMPTS, "nowhere", shard="images")


# ---------------------------------------------------------------- the records of several processes


def result(id, status="failed", **others):
    return Result(id=id, prompt=f"prompt {id}", status=status, seed=0, error="ValueError: no", **others)


def test_records_are_taken_in_once_and_a_cut_line_is_dropped(tmp_path):
    with Folder(tmp_path, {}) as first, Folder(tmp_path, {}, rank=2) as third, Folder(tmp_path, {}, rank=10) as last:
        for each, id in ((first, "a"), (third, "b"), (third, "c"), (last, "d")):
            each.add(result(id))
        first.take_in()
        assert [line["id"] for line in lines(tmp_path)] == ["a", "b", "c", "d"] == list(first.results)
        assert not list(tmp_path.glob("results.*.jsonl"))
    record = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    # A kill between the two steps, and one in the middle of a line.
    (tmp_path / "results.2.jsonl").write_text("".join(record[1:3]))
    (tmp_path / "results.7.jsonl").write_text(record[0].replace('"a"', '"e"') + '{"id": "f", "pro')
    (tmp_path / "results.old.jsonl").write_text("mine")
    with Folder(tmp_path, {}) as first:
        assert [line["id"] for line in lines(tmp_path)] == ["a", "b", "c", "d", "e"] == list(first.results)
    assert [path.name for path in tmp_path.glob("results.*.jsonl")] == ["results.old.jsonl"]


def test_a_record_that_is_no_batchs_is_an_error(tmp_path):
    Folder(tmp_path, {}).close()
    (tmp_path / "results.1.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="results.1.jsonl, line 1, is no result of a batch"):
        Folder(tmp_path, {})
    Folder(tmp_path, {}, restart=True).close()
    assert not (tmp_path / "results.1.jsonl").exists()


def test_a_rank_that_has_outlived_its_run_keeps_the_folder(tmp_path):
    Folder(tmp_path, {}).close()
    with Folder(tmp_path, {}, rank=1):
        for _ in range(2):  # and the first rank's own lock was given back
            with pytest.raises(ValueError, match="another process works in"):
                Folder(tmp_path, {})
    (tmp_path / ".lock.swp").touch()  # an editor's, of no rank
    Folder(tmp_path, {}).close()


# ---------------------------------------------------------------- torchrun


COMMAND = ("-m", "ses_fast", "batch")  # what a user types after torchrun
TOYS = (Path(__file__).parent / "toy_batch.py",)  # the same with the toy


def torchrun(size, *program, meet=None, **options):
    """meet: what tells several launchers of each other; options: of Popen."""
    meet = meet or [f"--master-port={free_port()}"]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", *meet]
    alone = {name: value for name, value in os.environ.items() if name not in environment(0, 0, 0)}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen([*launch, *map(str, program)], env=alone | {"OMP_NUM_THREADS": "1"}, **options)


def ranks_of(launcher):
    """Its processes, by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        for each in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if each.startswith(b"RANK="):
                found[int(each[5:])] = int(pid)
    return found


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_two_nodes(whole, tmp_path):
    """Two launchers of one process each, which find each other by a rendezvous; the folder is on a disk of both."""
    file, reference, ids = whole
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"]
    nodes = [torchrun(1, *TOYS, *toy_command(file, tmp_path / "out"), meet=meet) for _ in range(2)]
    assert [node.wait(PATIENCE) for node in nodes] == [0, 0]
    assert (tmp_path / "out" / ".lock.1").exists()  # they were two processes of one batch
    check_whole(tmp_path / "out", reference, ids)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["prompts", "population"])
def test_ctrl_c_through_torchrun(shard, whole, tmp_path):
    """All processes end, each says so in one line, and the same command goes on."""
    file, reference, ids = whole
    out, program = tmp_path / "out", (*TOYS, *toy_command(file, tmp_path / "out", "--shard", shard))
    launcher = torchrun(2, *program, stderr=subprocess.PIPE, text=True)
    until(lambda: launcher.poll() is not None or (out / "results.jsonl").exists())
    pids = ranks_of(launcher)
    launcher.send_signal(signal.SIGINT)
    _, said = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode and said.count("\nstopped: the same command goes on from here\n") == len(pids) == 2
    until(lambda: all(map(is_gone, pids.values())))
    assert not (out / "summary.json").exists()
    assert torchrun(2, *program).wait(PATIENCE) == 0
    check_whole(out, reference, ids)


PATIENCE = 600  # seconds: two processes load a model on one slow core


def until(happens, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.02)


def kill_at_random(program, tmp_path, kills, seed):
    """Kills a rank or the launcher at random moments of the work, each followed by the same command. Whom it killed.

    program: what torchrun runs to fill a folder.
    """
    reference = tmp_path / "reference"
    alone = torchrun(1, *program(reference))
    until(lambda: alone.poll() is not None or (reference / "batch.json").exists())
    begin = time.monotonic()
    assert alone.wait(PATIENCE) == 0
    seconds = time.monotonic() - begin
    ids = [line["id"] for line in lines(reference)]
    rng, batches, whom = random.Random(seed), 0, []
    while True:
        out = tmp_path / f"out{batches}"
        for lock in out.glob(".lock*"):  # nobody's any more; made again when the work begins
            lock.unlink()
        done = (out / "summary.json").exists()  # a kill would no longer be of the work
        launcher = torchrun(2, *program(out))
        until(lambda: launcher.poll() is not None or (out / ".lock.1").exists())  # noqa: B023
        pids, killed = ranks_of(launcher) if launcher.poll() is None else {}, None
        if len(whom) < kills and len(pids) == 2 and not done:
            time.sleep(rng.uniform(0, 2 * seconds / kills))
            killed = ("launcher", 0, 1)[len(whom) % 3]
            with suppress(ProcessLookupError):
                os.kill(pids.get(killed, launcher.pid), signal.SIGKILL)
        code = launcher.wait(PATIENCE)
        if killed is not None and code:  # else its work had ended, and the next command's is killed
            whom.append(killed)
        until(lambda: all(map(is_gone, pids.values())))  # noqa: B023
        if code == 0:
            check_whole(out, reference, ids)
            batches += 1
            if len(whom) == kills:
                return whom
        else:
            assert killed is not None, "it ends by itself"


@pytest.mark.slow
def test_two_processes_killed_ten_times(forks, tmp_path):
    """The embedded model and 20 prompts. One is killed at a random moment of the work; then the other one is ended, as
    torchrun does it."""
    file, reference = tmp_path / "prompts.txt", tmp_path / "reference"
    file.write_text("\n".join(embedded.captions()[:20]))
    begin = time.monotonic()
    assert forks.run(*command(file, reference, *TO_THE_BIT)) == 0
    seconds, ids = time.monotonic() - begin, [line["id"] for line in lines(reference)]
    assert len(ids) == 20 and json.loads((reference / "batch.json").read_text())["pipeline"] == "EmbeddedPipeline"
    rng, killed, batches = random.Random(0), 0, 0
    while True:
        out, port = tmp_path / f"out{batches}", free_port()
        arguments = command(file, out, *TO_THE_BIT)
        pids = [forks.start(*arguments, environment=environment(rank, 2, port)) for rank in range(2)]
        if killed < 10:
            time.sleep(rng.uniform(0, seconds / 5))
            os.kill(pids[rng.randrange(2)], signal.SIGKILL)
            for pid in pids:  # which are not waited for, and so no one else's
                os.kill(pid, signal.SIGTERM)
        codes = [forks.wait(pid) for pid in pids]
        killed += codes != [0, 0]
        if codes == [0, 0]:
            check_whole(out, reference, ids)
            batches += 1
            if killed == 10:
                break


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["prompts", "population"])
def test_torchrun_killed_ten_times(shard, tmp_path):
    """The embedded model and 20 prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(embedded.captions()[:20]))

    def program(out):
        return *COMMAND, *command(file, out, *TO_THE_BIT, "--shard", shard)

    assert set(kill_at_random(program, tmp_path, 10, shard)) == {"launcher", 0, 1}
    assert len(lines(tmp_path / "reference")) == 20
