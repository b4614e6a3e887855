"""A pipeline of a few lines whose search is the real one, and batches of it in processes that may be killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import ses_fast


class ToyPipeline:
    """The image is the noise itself, squeezed into [-1, 1], and as red as the prompt is long."""

    ses_result = None

    def __init__(self):
        self.calls = []

    def __call__(
        self,
        prompt,
        *,
        seed,
        enable_ses=False,
        ses_reward_model=None,
        ses_eval_budget=50,
        ses_inference_steps=10,
        ses_config=None,
        height=8,
        width=8,
        negative_prompt="",
        num_inference_steps=8,
        progress_bar_cmd=None,
    ):
        self.calls.append({"prompt": prompt, "seed": seed, "ses": enable_ses, "size": (height, width)})
        latents = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
        latents[:, 0] += len(prompt) / 100 - len(negative_prompt) / 10
        if not enable_ses:
            return to_picture(latents.tanh()[0])
        config = ses_config
        self.ses_result = ses_fast.evolve(
            latents,
            lambda candidates: ses_reward_model(candidates.tanh(), prompt),
            ses_eval_budget,
            config.popsize,
            config.k_elites,
            config.wavelet_name,
            1 if config.dwt_level == "auto" else config.dwt_level,
            seed=None if config.state else seed,
            include_base=config.include_base,
            state=config.state,
            on_generation=config.on_generation,
            progress=config.progress,
            time_limit=config.time_limit,
            process_group=config.process_group,
        )
        return to_picture(self.ses_result.latents.tanh()[0])


def to_picture(image):  # [3, H, W] in [-1, 1]
    return Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy())


def redness(images, prompt):
    return images[:, 0].mean((1, 2)) * 100


# ---------------------------------------------------------------- batches that may be killed


class Forks:
    """Runs `ses-fast batch` in forks of one process that has loaded everything, the embedded model and the toy too.

    One thread, so that a fork may compute.
    """

    def __init__(self):
        command = [sys.executable, __file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()  # its own end would take a while
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def start(self, *arguments, die_at=0, environment=None):
        """The id of a process that runs `ses-fast batch` with them. die_at: it kills itself before the write of this
        number, counted from 1. environment: of that process, beside the usual."""
        return self._ask("\0".join([str(die_at), json.dumps(environment or {}), *map(str, arguments)]))

    def wait(self, pid=0):
        """The exit code of the process, or of the one that was started last; minus the signal's number where one has
        killed it. Until then its number is not another's."""
        return self._ask(str(pid))

    def _ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, *arguments, die_at=0):
        self.start(*arguments, die_at=die_at)
        return self.wait()


def serve():
    # All that a batch imports, before the forks.
    from ses_fast import batch, cli, embedded, job, models, pipelines  # noqa: F401
    from ses_fast.embedded import pipeline  # noqa: F401

    torch.set_num_threads(1)
    enable, trained, reward = pipelines.enable, embedded.load_pipeline(), embedded.load_reward()
    pipelines.enable = lambda pipe: pipe if isinstance(pipe, ToyPipeline) else enable(pipe)
    models.MODELS |= {"embedded": lambda: trained, "toy": ToyPipeline}
    job.load_reward = lambda name, weights: reward if name == "embedded" else redness
    print("ready", flush=True)
    child = 0
    for line in sys.stdin:
        die_at, *arguments = line.rstrip("\n").split("\0")
        if not arguments:
            print(os.waitstatus_to_exitcode(os.waitpid(int(die_at) or child, 0)[1]), flush=True)
            continue
        environment, *arguments = arguments
        child = os.fork()
        if child == 0:
            tqdm.set_lock(
                threading.RLock()
            )  # its own one is all forks': who is killed with it leaves none to the others
            os.environ |= json.loads(environment)
            die_before_write(int(die_at))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                cli.main(["batch", *arguments])
            except SystemExit as left:
                os._exit(left.code if isinstance(left.code, int) else int(left.code is not None))
            except BaseException:
                os._exit(70)
            os._exit(0)
        print(child, flush=True)


def die_before_write(number):
    """Has this process killed when it is about to do its `number`th step that the disk sees."""
    count = 0

    def watched(step):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        return call

    if number:
        os.fsync = watched(os.fsync)
        Path.replace = watched(Path.replace)
        Path.unlink = watched(Path.unlink)


def slow_redness(images, prompt):
    time.sleep(0.05)
    return redness(images, prompt)


def batch_of_toys(arguments):
    """`ses-fast batch` with the toy, whose reward takes its time."""
    from ses_fast import cli, job, models, pipelines

    slow_redness.__qualname__ = redness.__qualname__  # a folder knows a reward by its name
    pipelines.enable = lambda pipe: pipe
    models.MODELS |= {"toy": ToyPipeline}
    job.load_reward = lambda name, weights: slow_redness
    cli.main(["batch", *arguments])


if __name__ == "__main__":
    serve() if len(sys.argv) == 1 else batch_of_toys(sys.argv[1:])
