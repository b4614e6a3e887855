"""Trains the embedded model and its two rewards from nothing: `python -m ses_fast.embedded.train`.

The stages, in order (each can be named alone; a stage that is done is skipped, one that was interrupted goes on from
its last checkpoint): autoencoder, latents, reward, heldout, teacher, model, export. Every batch is a function of the
settings' seed and the step, so an interrupted run draws what an uninterrupted one would have drawn.
"""

import argparse
import copy
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from . import models, world

CHECKPOINT_SECONDS = 240
LOG_STEPS = 50
WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Run:
    """Where a training keeps its files, and how it computes."""

    folder: Path
    device: torch.device
    compile: bool = False  # the denoiser's blocks


@dataclass(frozen=True)
class Settings:
    """One stage's optimisation. `seed` decides its data and its initial weights."""

    steps: int
    batch: int
    lr: float
    seed: int
    weight_decay: float = 0.01
    warmup: int = 100
    final_lr: float = 0.02  # of lr, reached linearly; with 1 the rate is constant, and `steps` may be raised later
    ema: float = 0.0
    muon: bool = False  # for the matrices; AdamW for the rest
    margin: float = 0.0  # logits, by which a reward is to refuse a caption with another relation before its loss rests


SETTINGS = {
    "autoencoder": Settings(steps=1600, batch=48, lr=2e-3, seed=1, weight_decay=1e-4),
    "reward": Settings(steps=2000, batch=64, lr=1e-3, seed=10, weight_decay=0.02, warmup=200, margin=8.0),
    "heldout": Settings(steps=1000, batch=64, lr=1e-3, seed=20, weight_decay=0.02, warmup=200, margin=6.0),
    "teacher": Settings(steps=4500, batch=64, lr=2e-3, seed=3, final_lr=1.0, ema=0.998, muon=True),
    "model": Settings(steps=300, batch=64, lr=7e-4, seed=4, warmup=20, ema=0.98, muon=True),
}
MODEL_SIZES = {128: 16_000, 256: 16_000}  # pixels: how many encoded scenes
TEACHER_LARGE_FROM = 600  # its first step at the larger size; from here on all batches are but one of SMALL_EVERY
SMALL_EVERY = 2
GUIDANCE = 1.5  # the teacher's, that the model learns
REWARD_SCENES = 40_000
FACTS_COUNT = len(world.NUMBERS) + 1  # how many of a colour there can be: none, one, ...
LATENT_NOISE = 0.1  # on the latents while the autoencoder is trained: what the denoiser gets wrong is to do little
EQUIVARIANCE = 0.5  # weight of: encode(half the image) = half the latents. It makes the latents smooth (EQ-VAE)
# How many captions name a relation drawn at random: where the groups stand is then the noise's to decide. Fewer at the
# teacher's end, from this step on, and for the model: the right place is then drawn somewhat more often than not.
MISTOLD, MISTOLD_LATE, LATE_FROM = 0.8, 0.5, 3900
CAPTION_DROPOUT = 0.1  # so that classifier-free guidance has a meaning


# --- the loop that all stages share ---------------------------------------------------------------------------


def fit(name: str, module: Any, loss_of: Callable[[int], tuple[Tensor, dict]], run: Path) -> Any:
    """Trains `module` on `loss_of(step)` -> (loss, figures to log) and returns it (its average, where ema > 0).

    Writes run/<name>.pt (weights, average, optimisers, step, settings) every few minutes and at the end, and a line of
    figures to run/<name>.jsonl every LOG_STEPS steps. Raises ValueError for a checkpoint of other settings; where the
    rate is constant it may have been made for another number of steps.
    """
    settings = SETTINGS[name]
    device = next(module.parameters()).device
    optimisers: list[Any] = _optimisers(module, settings)
    schedules: list[Any] = [LambdaLR(optimiser, partial(_schedule, settings)) for optimiser in optimisers]

    def lerp(average: Tensor, now: Tensor, updates: Tensor | int) -> Tensor:
        decay = min(settings.ema, (1 + int(updates)) / (20 + int(updates)))
        return average.lerp_(now, 1 - decay)

    average = AveragedModel(module, avg_fn=lerp)
    path, log, first = run / f"{name}.pt", run / f"{name}.jsonl", 0
    if path.exists():
        kept = torch.load(path, map_location=device, weights_only=True)
        _check_same(path, _what_decides(kept["settings"]), _what_decides(asdict(settings)))
        module.load_state_dict(kept["module"])
        average.load_state_dict(kept["average"])
        for each, state in zip((*optimisers, *schedules), kept["optimisers"] + kept["schedules"], strict=True):
            each.load_state_dict(state)
        first = kept["step"]
    lines = log.read_text().splitlines() if log.exists() else []
    lines = [line for line in lines if json.loads(line)["step"] <= first]  # what came later is done again
    log.write_text("".join(line + "\n" for line in lines))
    begin = time.monotonic() - (json.loads(lines[-1])["seconds"] if lines else 0)
    saved, running = time.monotonic(), []
    for step in (
        bar := tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc=name, mininterval=5)
    ):
        with _precision(device):
            loss, figures = loss_of(step)
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        with _newton_schulz_precision(device):
            for each in (*optimisers, *schedules):
                each.step()
        average.update_parameters(module)
        running.append({"loss": loss.item(), **figures})
        last = step + 1 == settings.steps
        if (step + 1) % LOG_STEPS == 0 or last:
            means = {key: round(float(np.mean([each[key] for each in running])), 4) for key in running[0]}
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "seconds": round(time.monotonic() - begin), **means}) + "\n")
            bar.set_postfix(means)
            running = []
            if last or time.monotonic() - saved > CHECKPOINT_SECONDS:
                state = {"step": step + 1, "settings": asdict(settings), "module": module.state_dict()}
                state |= {"average": average.state_dict(), "optimisers": [each.state_dict() for each in optimisers]}
                state |= {"schedules": [each.state_dict() for each in schedules]}
                torch.save(state, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)  # a kill while writing leaves the last checkpoint whole
                saved = time.monotonic()
    if settings.ema:
        module.load_state_dict(average.module.state_dict())
    return module.eval()


def _multiplies_bf16(device: torch.device) -> bool:
    """A CPU without AVX512 only imitates it, and is eight times as slow."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def _precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=_multiplies_bf16(device))


def _newton_schulz_precision(device: torch.device) -> Any:
    """torch's Muon casts to bf16 whatever the device; where that is only imitated, it was most of a step."""
    return nullcontext() if _multiplies_bf16(device) else _Float32ForBFloat16()


class _Float32ForBFloat16(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)  # a copy, as the cast makes: Muon goes on in place
        return func(*args, **(kwargs or {}))


def _optimisers(module: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    betas = (0.9, 0.98)
    if not settings.muon:
        return [torch.optim.AdamW(module.parameters(), settings.lr, betas, weight_decay=settings.weight_decay)]
    matrices = [p for p in module.parameters() if p.ndim == 2]
    others = [p for p in module.parameters() if p.ndim != 2]
    return [
        torch.optim.Muon(matrices, settings.lr, settings.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, settings.lr, betas, weight_decay=0.0),
    ]


def _schedule(settings: Settings, step: int) -> float:
    decay = 1 - step / settings.steps
    return min(1.0, (step + 1) / settings.warmup) * (settings.final_lr + (1 - settings.final_lr) * decay)


def _what_decides(settings: dict) -> dict:
    """The settings, without the number of steps where no step depends on it: such a training can be made longer."""
    return {key: value for key, value in settings.items() if key != "steps" or settings["final_lr"] != 1}


def _check_same(path: Path, was: dict, now: dict) -> None:
    if was != now:
        raise ValueError(f"{path} was made with {was}, not {now}: remove it or name another --run")


def _is_kept(note: Path, inputs: dict) -> bool:
    """Whether data was made from `inputs` already; `note` is written when it is whole. ValueError for other inputs."""
    if note.exists():
        _check_same(note, json.loads(note.read_text()), inputs)
    return note.exists()


def _rng(seed: int, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, step])


def _torch_rng(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def _to_unit(images: np.ndarray, device: torch.device) -> Tensor:  # [n, H, W, 3] uint8 -> [n, 3, H, W] in [-1, 1]
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


# --- autoencoder ----------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Encoder and decoder, trained together on 64x64 crops of scenes of both sizes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = models.Encoder(), models.Decoder()


def train_autoencoder(run: Run) -> Autoencoder:
    """Trains it and measures its latents' mean and deviation, which it then carries."""
    settings = SETTINGS["autoencoder"]
    torch.manual_seed(settings.seed)
    device, module = run.device, Autoencoder().to(run.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scenes, _ = world.split_scenes()

    def reconstruction(latents: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(latents.shape, generator=generator).to(device)
        error = module.decoder(latents + LATENT_NOISE * noise).float() - image
        return error.abs().mean() + error.square().mean()

    def loss_of(step: int) -> tuple[Tensor, dict]:
        rng, generator = _rng(settings.seed, step), _torch_rng(settings.seed, step)
        image = _to_unit(_crops(scenes, rng, settings.batch), device).contiguous(memory_format=torch.channels_last)
        latents = module.encoder(image).float()
        factor = 4 if rng.random() < 0.25 else 2
        small_image, small_latents = F.avg_pool2d(image, factor), F.avg_pool2d(latents, factor)
        equivariance = (module.encoder(small_image).float() - small_latents).square().mean()
        loss = reconstruction(latents, image, generator) + reconstruction(small_latents, small_image, generator)
        loss = loss + EQUIVARIANCE * equivariance + 1e-3 * latents.square().mean()
        return loss, {"equivariance": equivariance.item(), "latent_std": latents.std().item()}

    fit("autoencoder", module, loss_of, run.folder)
    rng = _rng(settings.seed, settings.steps)
    drawn = np.stack([world.draw(scenes[rng.integers(len(scenes))], rng) for _ in range(512)])
    with torch.no_grad():
        latents = module.encoder(_to_unit(drawn, device))
    for part in (module.encoder, module.decoder):
        part.mean.copy_(latents.mean((0, 2, 3), keepdim=True))
        part.std.copy_(latents.std((0, 2, 3), keepdim=True))
    return module


def _crops(scenes: list, rng: np.random.Generator, count: int, side: int = 64) -> np.ndarray:
    """`count` crops, a third of them from scenes drawn at twice the size; four from each scene drawn."""
    out = np.empty((count, side, side, 3), np.uint8)
    for start in range(0, count, 4):
        size = 256 if start % 12 == 0 else 128
        image = world.draw(scenes[rng.integers(len(scenes))], rng, size)
        for index in range(start, min(start + 4, count)):
            y, x = rng.integers(0, size - side + 1, 2)
            out[index] = image[y : y + side, x : x + side]
    return out


# --- latents: the scenes that the model is trained on, encoded once ---------------------------------------------


def encode_scenes(run: Run, autoencoder: Autoencoder) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{pixels: (latents [n, 16, h, w] fp16, scene index [n])}, kept in `run` as .npy."""
    scenes, _ = world.split_scenes()
    data = {}
    for size, count in MODEL_SIZES.items():
        latents_path, scenes_path = run.folder / f"latents{size}.npy", run.folder / f"scenes{size}.npy"
        note, seed = run.folder / f"latents{size}.json", SETTINGS["teacher"].seed
        inputs = {"autoencoder": asdict(SETTINGS["autoencoder"]), "seed": seed, "scenes": count}
        if not _is_kept(note, inputs):
            side = size // models.DOWNSCALE
            shape = (count, models.LATENT_CHANNELS, side, side)
            latents = np.lib.format.open_memmap(latents_path, "w+", np.float16, shape)
            rng = _rng(seed, size)
            index = rng.integers(0, len(scenes), count)
            for start in tqdm(range(0, count, 64), desc=f"latents {size}", mininterval=5):
                chosen = index[start : start + 64]
                drawn = np.stack([world.draw(scenes[i], rng, size) for i in chosen])
                image = _to_unit(drawn, run.device).contiguous(memory_format=torch.channels_last)
                with torch.no_grad(), _precision(run.device):
                    encoded = autoencoder.encoder(image)
                latents[start : start + 64] = encoded.float().cpu().numpy()
            latents.flush()
            np.save(scenes_path, index)
            note.write_text(json.dumps(inputs))
        data[size] = (np.load(latents_path, mmap_mode="r"), np.load(scenes_path))
    return data


# --- the model --------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Text encoder and denoiser, trained together."""

    dit: Any  # for the type checker: a Module's parts are not known to it

    def __init__(self):
        super().__init__()
        self.text_encoder, self.dit = models.TextEncoder(), models.build_dit()
        self.block: Callable[..., Tensor] = _block  # or what torch.compile made of it

    def forward(
        self,
        latents: Tensor,  # [B, 16, h, w]
        sigma: Tensor,  # [B], 1 is noise
        ids: Tensor,  # [B, 32], the captions' tokens
        mask: Tensor,  # [B, 32], 1 where a token is
    ) -> Tensor:  # [B, 16, h, w]
        """The velocity, noise - image.

        What `ZImagePipeline` computes for one image, for a batch of images each with its own caption (its own
        forward takes a batch for the frames of one sequence). h and w are such that no image token is padding.
        """
        dit, batch, (height, width) = self.dit, len(latents), latents.shape[-2:]
        time = dit.t_embedder(1000 * (1 - sigma))
        rope_text, rope_image = self._rope(height // 2, width // 2, latents.device)

        image = (
            latents.view(batch, -1, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )
        image = dit.all_x_embedder["2-1"](image)  # [B, h*w/4, D]
        for layer in dit.noise_refiner:
            image = self.block(layer, image, rope_image, time)

        text = dit.cap_embedder(self.text_encoder(ids, mask).hidden_states[-2])  # [B, 32, D]
        text = torch.where(mask.bool()[..., None], text, dit.cap_pad_token.to(text.dtype))
        for layer in dit.context_refiner:
            text = self.block(layer, text, rope_text, None)

        both, rope = torch.cat([image, text], 1), torch.cat([rope_image, rope_text], 2)
        for layer in dit.layers:
            both = self.block(layer, both, rope, time)
        patches = dit.all_final_layer["2-1"](both[:, : image.shape[1]], time)
        patches = patches.view(batch, height // 2, width // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
        return -patches.reshape(latents.shape)

    def _rope(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """Rotary factors, [cosines and sines, 1, L, 1, head / 2], of the caption's tokens, at (1..32, 0, 0), and of
        the image's, at (33, y, x).
        """
        text = torch.zeros(models.CAPTION_LENGTH, 3, dtype=torch.int64)
        text[:, 0] = torch.arange(1, models.CAPTION_LENGTH + 1)
        axes = (torch.tensor([models.CAPTION_LENGTH + 1]), torch.arange(rows), torch.arange(columns))
        turns = (self.dit.rope_embedder(ids.to(device)) for ids in (text, torch.cartesian_prod(*axes)))
        return tuple(torch.stack([turn.real, turn.imag])[:, None, :, None] for turn in turns)


def _block(
    layer: Any,
    x: Tensor,  # [B, L, D]
    rope: Tensor,  # [2, 1, L, 1, head / 2]
    time: Tensor | None,  # [B, E]; None where the layer has no modulation
) -> Tensor:  # [B, L, D]
    """What a ZImageTransformerBlock computes, written so that a compiler can fuse it: on a CPU three times as fast.

    Its own rotary factors are complex numbers in pairs of neighbours, which no vectoriser likes. Here the rows of the
    query's and the key's weights are taken in another order, the pairs' first halves and then their second ones: the
    products of queries and keys stay what they were.
    """
    attention, mlp = layer.attention, layer.feed_forward
    heads, head = attention.num_heads, attention.head_dim
    scale1 = gate1 = scale2 = gate2 = torch.ones((), device=x.device)
    if time is not None:
        scale1, gate1, scale2, gate2 = layer.adaLN_modulation(time)[:, None].float().chunk(4, -1)
        scale1, gate1, scale2, gate2 = 1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()

    normed = _rms(x, layer.attention_norm1) * scale1
    cosine, sine = rope.unbind(0)

    def rotated(projection: nn.Linear, norm: Any) -> Tensor:  # [B, heads, L, head]
        weight = projection.weight.unflatten(0, (heads, head // 2, 2)).transpose(1, 2).flatten(0, 2)
        features = F.linear(normed, weight).unflatten(-1, (heads, head))
        even, odd = _rms(features, norm, norm.weight.view(-1, 2).t().flatten()).chunk(2, -1)
        turned = torch.cat([even * cosine - odd * sine, even * sine + odd * cosine], -1)
        return turned.to(features.dtype).transpose(1, 2)

    query, key = rotated(attention.to_q, attention.norm_q), rotated(attention.to_k, attention.norm_k)
    value = attention.to_v(normed).unflatten(-1, (heads, head)).transpose(1, 2)
    # Not the fused attention: for heads this small it is slower on a CPU, above all backwards.
    weights = ((query @ key.transpose(-1, -2)).float() * head**-0.5).softmax(-1).to(value.dtype)
    mixed = attention.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
    x = x + gate1 * _rms(mixed, layer.attention_norm2)

    normed = _rms(x, layer.ffn_norm1) * scale2
    mixed = mlp.w2(F.silu(mlp.w1(normed)) * mlp.w3(normed))
    return x + gate2 * _rms(mixed, layer.ffn_norm2)


def _rms(x: Tensor, norm: Any, weight: Tensor | None = None) -> Tensor:
    """`norm(x)` in fp32; `weight` in place of the norm's own."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (norm.weight if weight is None else weight)


class Batches:
    """What the denoiser is trained on: noised latents of either size and their captions, by the step."""

    def __init__(self, data: dict[int, tuple[np.ndarray, np.ndarray]], settings: Settings, device: torch.device):
        self.data, self.settings, self.device = data, settings, device
        scenes, _ = world.split_scenes()
        captions = [str(scene) for scene in scenes] + [""]
        self.tokens = models.build_tokenizer()(captions, padding="max_length", return_tensors="pt")
        self.empty = len(scenes)  # the number of the empty prompt
        number = {scene: index for index, scene in enumerate(scenes)}
        # [scenes, 4]: the captions of the same groups with each relation; its own where that one is not to be seen.
        self.retold = torch.tensor(
            [
                [number.get(world.Scene(s.first, relation, s.second), index) for relation in world.RELATIONS]
                for index, s in enumerate(scenes)
            ]
        )

    def draw(self, step: int, size: int, mistold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(noised latents [B, 16, h, w], sigma [B], their velocity, captions [B]), of `size` pixels.

        Times are logit-normal at the size's own shift, as `EmbeddedPipeline` samples; the larger has a smaller batch.
        """
        generator = _torch_rng(self.settings.seed, step)
        batch = self.settings.batch * min(MODEL_SIZES) // size
        shift = models.sigma_shift(size, size)
        latents, index = self.data[size]
        chosen = torch.randint(len(index), (batch,), generator=generator).sort().values.numpy()
        image = torch.from_numpy(latents[chosen]).to(self.device).float()
        caption = torch.from_numpy(index[chosen])
        relation = torch.randint(len(world.RELATIONS), (batch,), generator=generator)
        told_wrong = torch.rand(batch, generator=generator) < mistold
        caption = torch.where(told_wrong, self.retold[caption, relation], caption)
        caption[torch.rand(batch, generator=generator) < CAPTION_DROPOUT] = self.empty
        uniform = torch.sigmoid(torch.randn(batch, generator=generator))
        sigma = (shift * uniform / (1 + (shift - 1) * uniform)).to(self.device)
        noise = torch.randn(image.shape, generator=generator).to(self.device)
        mix = sigma[:, None, None, None]
        return (1 - mix) * image + mix * noise, sigma, noise - image, caption

    def text(self, caption: Tensor) -> tuple[Tensor, Tensor]:  # [B] -> ids, mask, [B, 32] both
        """The captions' tokens."""
        return tuple(self.tokens[name][caption].to(self.device) for name in ("input_ids", "attention_mask"))


def _fit_model(name: str, module: Model, loss_of: Callable, run: Run) -> Model:
    if run.compile:
        module.block = torch.compile(_block, dynamic=False)
    return fit(name, module, loss_of, run.folder)


def train_teacher(run: Run, data: dict) -> Model:
    """Flow matching at a constant rate, so that it can be made longer; the larger size joins late.

    What a falling rate would bring, the average and the next stage bring.
    """
    settings = SETTINGS["teacher"]
    torch.manual_seed(settings.seed)
    module, batches = Model().to(run.device), Batches(data, settings, run.device)
    small, large = sorted(MODEL_SIZES)

    def loss_of(step: int) -> tuple[Tensor, dict]:
        size = large if step >= TEACHER_LARGE_FROM and step % SMALL_EVERY else small
        mistold = MISTOLD if step < LATE_FROM else MISTOLD_LATE
        noised, sigma, velocity, caption = batches.draw(step, size, mistold)
        return F.mse_loss(module(noised, sigma, *batches.text(caption)).float(), velocity), {}

    return _fit_model("teacher", module, loss_of, run)


def train_model(run: Run, data: dict, teacher: Model) -> Model:
    """Learns to predict alone what the teacher predicts with classifier-free guidance, at both sizes by turns.

    So the shipped model needs one forward a step where the teacher needs two, as distilled models do.
    """
    settings = SETTINGS["model"]
    teacher = teacher.requires_grad_(False)
    module, batches = copy.deepcopy(teacher).requires_grad_(True).train(), Batches(data, settings, run.device)
    small, large = sorted(MODEL_SIZES)

    def loss_of(step: int) -> tuple[Tensor, dict]:
        noised, sigma, _, caption = batches.draw(step, large if step % 2 else small, MISTOLD_LATE)
        with torch.no_grad():
            right = teacher(noised, sigma, *batches.text(caption)).float()
            empty = teacher(noised, sigma, *batches.text(torch.full_like(caption, batches.empty))).float()
        guided = empty + GUIDANCE * (right - empty)
        return F.mse_loss(module(noised, sigma, *batches.text(caption)).float(), guided), {}

    return _fit_model("model", module, loss_of, run)


# --- the rewards --------------------------------------------------------------------------------------------------


class Reward(nn.Module):
    """A CLIPModel and, for training alone, a linear head that reads the scene's facts off both embeddings.

    Without that head the contrastive loss stands still for a long time: the captions differ in single words.
    """

    clip: Any

    def __init__(self):
        super().__init__()
        self.clip = models.build_clip()
        self.facts = nn.Linear(self.clip.config.projection_dim, len(world.COLOURS) * (FACTS_COUNT + 7))

    def image(self, pixels: Tensor) -> Tensor:  # [B, 3, 96, 96] -> [B, E], of length 1
        return F.normalize(self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output).float(), dim=-1)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:  # [B, L] both -> [B, E], of length 1
        pooled = self.clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def fact_loss(self, embedding: Tensor, labels: Tensor) -> Tensor:  # labels: [B, 6, 3]
        logits = self.facts(10 * embedding).float().view(-1, FACTS_COUNT + 7)
        count, shape, side = labels.view(-1, 3).unbind(-1)
        return (
            2 * F.cross_entropy(logits[:, :FACTS_COUNT], count)
            + F.cross_entropy(logits[:, FACTS_COUNT:-4], shape, ignore_index=-1)
            + F.cross_entropy(logits[:, -4:], side, ignore_index=-1)
        )


def train_reward(name: str, run: Run, hard: int = 3) -> nn.Module:
    """Contrastive, each image against the batch's captions and `hard` captions of its own with one fact changed."""
    settings = SETTINGS[name]
    torch.manual_seed(settings.seed)
    device, module = run.device, Reward().to(run.device)
    scenes, _ = world.split_scenes()
    pictures, index = _small_pictures(run.folder, name, settings.seed)
    tokenizer = models.build_tokenizer()
    labels, trained = torch.tensor([_fact_labels(scene) for scene in scenes]), set(scenes)

    def loss_of(step: int) -> tuple[Tensor, dict]:
        rng, generator = _rng(settings.seed, step), _torch_rng(settings.seed, step)
        chosen = np.sort(rng.integers(0, len(index), settings.batch))
        batch = [scenes[i] for i in index[chosen]]
        image = _to_unit(pictures[chosen], device)
        if rng.random() < 0.5:  # generated pictures are softer than drawn ones, and noisier
            image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
        strength = 0.15 * torch.rand(settings.batch, 1, 1, 1, generator=generator)
        image = image + (strength * torch.randn(image.shape, generator=generator)).to(device)
        negatives = [[_hard_negative(s, trained, rng) for _ in range(hard)] for s in batch]
        captions = [str(s) for s in (*batch, *itertools.chain(*negatives))]
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        seen, said = (
            module.image(image / _PIXEL_STD),
            module.text(tokens["input_ids"], tokens["attention_mask"]),
        )
        right, wrong = said[: settings.batch], said[settings.batch :].view(settings.batch, hard, -1)
        scale = module.clip.logit_scale.exp().clamp(max=100)
        among_batch = scale * seen @ right.T
        among_hard = scale * torch.einsum("nd,nkd->nk", seen, wrong)
        refused = (among_hard.amax(1) < among_batch.diagonal()).float().mean().item()
        elsewhere = [[each.relation != s.relation for each in row] for s, row in zip(batch, negatives, strict=True)]
        among_hard = among_hard + settings.margin * torch.tensor(elsewhere, device=device)
        target = torch.arange(settings.batch, device=device)
        contrast = 0.7 * F.cross_entropy(torch.cat([among_batch, among_hard], 1), target)
        contrast = contrast + 0.3 * F.cross_entropy(among_batch.T, target)
        truth = labels[index[chosen]].to(device)
        loss = contrast + module.fact_loss(seen, truth) + module.fact_loss(right, truth)
        return loss, {"contrast": contrast.item(), "hard_refused": refused}

    return fit(name, module, loss_of, run.folder).clip


_PIXEL_STD = 0.5  # preprocessing is (pixel / 255 - 0.5) / 0.25: [-2, 2]


def _small_pictures(run: Path, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes drawn at one of the two sizes and resized to the reward's by PIL's bicubic, as a preview will be."""
    from PIL import Image

    pictures_path, index_path = run / f"{name}_pictures.npy", run / f"{name}_scenes.npy"
    side = models.REWARD_PIXELS
    note, inputs = run / f"{name}_pictures.json", {"seed": seed, "scenes": REWARD_SCENES, "side": side}
    if not _is_kept(note, inputs):
        scenes, _ = world.split_scenes()
        rng = _rng(seed, -1 % 2**32)
        index = rng.integers(0, len(scenes), REWARD_SCENES)
        pictures = np.lib.format.open_memmap(pictures_path, "w+", np.uint8, (REWARD_SCENES, side, side, 3))
        for row in tqdm(range(REWARD_SCENES), desc=f"{name} pictures", mininterval=5):
            scene = scenes[index[row]]
            told = scene if rng.random() < 0.5 else scene.mirrored  # on either ground: the ground is not to be the sign
            drawn = Image.fromarray(world.draw(told, rng, 256 if row % 3 == 0 else 128))
            pictures[row] = np.asarray(drawn.resize((side, side), Image.Resampling.BICUBIC))
        pictures.flush()
        np.save(index_path, index)
        note.write_text(json.dumps(inputs))
    return np.load(pictures_path, mmap_mode="r"), np.load(index_path)


def _hard_negative(scene: world.Scene, trained: set[world.Scene], rng: np.random.Generator) -> world.Scene:
    """A scene of `trained` (so that no held-out caption is ever seen) that differs from `scene` in one fact."""
    while True:
        changed = _change_one_fact(scene, rng)
        if changed in trained:
            return changed


def _change_one_fact(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """Another caption that differs in one fact: most often a count, which is what the model gets wrong."""

    def other(value, values):
        rest = [v for v in values if v != value]
        return rest[rng.integers(len(rest))]

    first, relation, second = scene.first, scene.relation, scene.second
    kind = rng.choice(["count", "relation", "shape", "colour"], p=[0.4, 0.4, 0.15, 0.05])
    if kind == "relation":
        relation = world.OPPOSITES[relation] if rng.random() < 0.6 else other(relation, world.RELATIONS)
        return world.Scene(first, relation, second)
    group = first if rng.random() < 0.5 else second
    if kind == "count":
        changed = world.Group(other(group.count, range(1, len(world.NUMBERS) + 1)), group.colour, group.shape)
    elif kind == "shape":
        changed = world.Group(group.count, group.colour, other(group.shape, world.SHAPES))
    else:
        unused = [c for c in world.COLOURS if c not in (first.colour, second.colour)]
        changed = world.Group(group.count, unused[rng.integers(len(unused))], group.shape)
    return world.Scene(changed, relation, second) if group is first else world.Scene(first, relation, changed)


def _fact_labels(scene: world.Scene) -> list[tuple[int, int, int]]:
    """(count, shape, side) for each colour; shape and side are -1 where the scene has none of that colour."""
    labels = [(0, -1, -1)] * len(world.COLOURS)
    for group, before in ((scene.first, scene.first_is_before), (scene.second, not scene.first_is_before)):
        side = 2 * scene.axis + (0 if before else 1)
        labels[list(world.COLOURS).index(group.colour)] = (group.count, world.SHAPES.index(group.shape), side)
    return labels


# --- export -------------------------------------------------------------------------------------------------------


def export(run: Run, autoencoder: Autoencoder, model: Model, reward: Any, heldout: Any, out: Path = WEIGHTS) -> None:
    """fp16 safetensors: one for each part of the pipeline, and a folder in transformers' layout for each reward; the
    settings they were trained with, and the logs.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {
        "vae_encoder": autoencoder.encoder,
        "vae_decoder": autoencoder.decoder,
        "text_encoder": model.text_encoder,
        "dit": model.dit,
    }
    for name, part in parts.items():
        save_file(
            {k: v.half().contiguous().cpu() for k, v in part.state_dict().items()},
            out / f"{name}.safetensors",
        )
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": models.REWARD_PIXELS},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": models.REWARD_PIXELS, "width": models.REWARD_PIXELS},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [_PIXEL_STD / 2] * 3,
    }
    tokenizer = models.build_tokenizer()
    tokenizer.chat_template = None
    for name, clip in (("reward", reward), ("heldout", heldout)):
        clip.half().save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        (out / name / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them for the owner alone
    settings = {name: asdict(stage) for name, stage in SETTINGS.items()}
    (out / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "logs").mkdir(exist_ok=True)
    for name in SETTINGS:
        shutil.copy(run.folder / f"{name}.jsonl", out / "logs")


@dataclass(frozen=True)
class Stage:
    """`make(run, *needed)`: what a stage makes, from what the stages that it needs made."""

    make: Callable[..., Any]
    needs: tuple[str, ...] = ()


STAGES = {
    "autoencoder": Stage(train_autoencoder),
    "latents": Stage(encode_scenes, ("autoencoder",)),
    "reward": Stage(partial(train_reward, "reward")),
    "heldout": Stage(partial(train_reward, "heldout")),
    "teacher": Stage(train_teacher, ("latents",)),
    "model": Stage(train_model, ("latents", "teacher")),
    "export": Stage(export, ("autoencoder", "model", "reward", "heldout")),
}


def train(names: Iterable[str], run: Run) -> dict[str, Any]:
    """Runs the named stages and those that they need, in order; what is done already is read."""
    wanted = set(names)
    for name in reversed(STAGES):
        if name in wanted:
            wanted |= set(STAGES[name].needs)
    made: dict[str, Any] = {}
    for name, stage in STAGES.items():
        if name in wanted:
            made[name] = stage.make(run, *(made[needed] for needed in stage.needs))
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all of them when none is named")
    parser.add_argument("--run", type=Path, default=Path("runs/embedded"), help="where checkpoints, data and logs are")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser's blocks (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default when not given)")
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.run.mkdir(parents=True, exist_ok=True)
    train(
        arguments.stages or STAGES,
        Run(arguments.run, torch.device(arguments.device), arguments.compile),
    )


if __name__ == "__main__":
    main()
