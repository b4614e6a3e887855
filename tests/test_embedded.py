"""The embedded model: its world and oracle, its training script, and the parts that are shipped."""

import inspect
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ses_fast import embedded
from ses_fast.embedded import models, train, world

SMALL = {"height": 128, "width": 128}
SCENE = world.Scene(world.Group(2, "red", "square"), "left of", world.Group(3, "blue", "ring"))
CAPTION = "two red squares left of three blue rings"


def picture(scene: world.Scene, size: int = 128, seed: int = 0) -> Image.Image:
    return Image.fromarray(world.draw(scene, np.random.default_rng(seed), size))


# --- captions -------------------------------------------------------------------------------------------------


def test_captions_are_many_and_the_held_out_ones_are_never_trained_on():
    trained, held_out = embedded.captions(heldout=False), embedded.captions()
    assert len(set(trained)) == 16882 and len(set(held_out)) == 200
    assert not set(trained) & set(held_out)
    assert not set(trained) & {str(scene.mirrored) for scene in world.split_scenes()[1]}
    assert held_out == embedded.captions()


def test_a_scene_told_from_the_other_side_is_drawn_the_same():
    mirrored = SCENE.mirrored
    assert str(mirrored) == "three blue rings right of two red squares" and mirrored.mirrored == SCENE
    assert embedded.judge(picture(SCENE), str(mirrored))["all"]


def test_hard_negatives_are_other_captions_that_were_trained_on():
    scenes = world.split_scenes()[0]
    trained, rng = set(scenes), np.random.default_rng(0)
    kept = trained - {world.Scene(SCENE.first, "right of", SCENE.second)}
    for _ in range(500):
        negative = train._hard_negative(SCENE, kept, rng)
        assert negative in kept and negative != SCENE


def test_a_caption_is_read_back_as_its_scene():
    assert str(SCENE) == CAPTION
    assert all(world.parse(str(scene)) == scene for scene in world.all_scenes())


@pytest.mark.parametrize(
    "caption",
    [
        pytest.param("", id="empty"),
        pytest.param(None, id="no-string"),
        pytest.param("a cat on a mat", id="another-world"),
        pytest.param("two red square left of three blue rings", id="singular-of-two"),
        pytest.param("one red squares left of three blue rings", id="plural-of-one"),
        pytest.param("two red squares left of three red rings", id="one-colour"),
        pytest.param("five red squares left of three blue rings", id="unknown-number"),
        pytest.param("two pink squares left of three blue rings", id="unknown-colour"),
        pytest.param("two red circles left of three blue rings", id="unknown-shape"),
        pytest.param("two red squares beside three blue rings", id="unknown-relation"),
        pytest.param("two red squares  left of three blue rings", id="two-spaces"),
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption of the embedded world"):
        embedded.judge(picture(SCENE), caption)


# --- the oracle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(128, 300), (256, 60), (64, 100)])
def test_the_oracle_reads_drawn_scenes(size, count):
    scenes = world.split_scenes()[0][:count]
    right = [embedded.judge(picture(scene, size, seed), str(scene))["all"] for seed, scene in enumerate(scenes)]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        pytest.param(CAPTION, set(), id="right"),
        pytest.param("three red squares left of three blue rings", {"first count"}, id="first-count"),
        pytest.param("two red squares left of two blue rings", {"second count"}, id="second-count"),
        pytest.param("two red squares right of three blue rings", {"relation"}, id="opposite-side"),
        pytest.param("two red crosses left of three blue rings", {"shapes"}, id="first-shape"),
        pytest.param("two red squares left of three blue squares", {"shapes"}, id="second-shape"),
        pytest.param(
            "two green squares left of three blue rings",
            {"colours", "first count", "shapes", "relation", "nothing extra"},
            id="colour-that-is-not-there",
        ),
    ],
)
def test_the_oracle_names_the_fact_that_is_wrong(caption, wrong):
    facts = embedded.judge(picture(SCENE), caption)
    assert {fact for fact, holds in facts.items() if not holds} == (wrong | {"all"} if wrong else set())


def test_the_oracle_sees_an_extra_object():
    image = np.array(picture(SCENE))
    image[2:22, 2:22] = world.COLOURS["green"]
    facts = embedded.judge(Image.fromarray(image), CAPTION)
    assert not facts["nothing extra"] and not facts["all"] and facts["second count"]


def test_merged_objects_are_not_two():
    image = np.empty((128, 128, 3), np.uint8)
    image[:] = world.BACKGROUND
    image[30:50, 20:58] = world.COLOURS["red"]  # two squares grown together
    image[90:110, 90:110] = world.COLOURS["blue"]
    facts = embedded.judge(Image.fromarray(image), "two red squares above one blue square")
    assert not facts["first count"] and not facts["shapes"] and facts["second count"] and facts["relation"]


def test_two_crosses_that_share_an_arm_are_no_cross():
    image = np.array(picture(world.parse("one red square above one blue cross"), 256))
    rows, columns = np.nonzero((image == world.COLOURS["blue"]).all(-1))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    cross = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].copy()
    image[:] = world.BACKGROUND
    for left in (60, 60 + width // 2):
        patch = image[100 : 100 + height, left : left + width]
        patch[(cross == world.COLOURS["blue"]).all(-1)] = world.COLOURS["blue"]
    facts = embedded.judge(Image.fromarray(image), "one red square above one blue cross")
    assert not facts["shapes"] and [each.shape for each in world.see(image)] == [None]


def test_the_oracle_takes_tensors_and_refuses_the_rest():
    image = picture(SCENE)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    assert embedded.judge(tensor, CAPTION) == embedded.judge(tensor[None] * 1.0, CAPTION)
    assert embedded.judge(tensor, CAPTION) == embedded.judge(image, CAPTION)
    for bad in (
        tensor[None].expand(2, -1, -1, -1),
        tensor[:2],
        (tensor * 127).to(torch.uint8),
        "picture.png",
        np.array(image),
    ):
        with pytest.raises(ValueError, match="image must be"):
            embedded.judge(bad, CAPTION)


# --- training -----------------------------------------------------------------------------------------------------


def _toy(monkeypatch, steps: int = 12, **more):
    """A linear fit through the real loop, and a record of the losses it saw."""
    settings = train.Settings(steps=steps, batch=4, lr=0.05, seed=5, ema=0.9, warmup=2, **more)
    monkeypatch.setitem(train.SETTINGS, "toy", settings)

    monkeypatch.setattr(train, "LOG_STEPS", 2)

    def fit(run, stop_after: int | None = None):
        torch.manual_seed(0)
        module, seen = torch.nn.Linear(3, 1), []

        def loss_of(step):
            if stop_after is not None and len(seen) == stop_after:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=train._torch_rng(5, step))
            loss = (module(x).float() - x.sum(1, keepdim=True)).square().mean()
            seen.append(loss.item())
            return loss, {}

        return train.fit("toy", module, loss_of, run), seen

    return fit


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    fit = _toy(monkeypatch)
    (tmp_path / "whole").mkdir()
    whole, losses = fit(tmp_path / "whole")
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)  # a checkpoint after every two steps
    (tmp_path / "parts").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", stop_after=5)
    resumed, rest = fit(tmp_path / "parts")
    assert rest == losses[4:]
    logs = [(tmp_path / run / "toy.jsonl").read_text().splitlines() for run in ("parts", "whole")]
    assert [json.loads(line) | {"seconds": 0} for line in logs[0]] == [
        json.loads(line) | {"seconds": 0} for line in logs[1]
    ]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert losses[-1] < losses[0]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, monkeypatch):
    _toy(monkeypatch, steps=2)(tmp_path)
    with pytest.raises(ValueError, match="was made with"):
        _toy(monkeypatch, steps=4)(tmp_path)


def test_a_training_at_a_constant_rate_can_be_made_longer(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, losses = _toy(monkeypatch, steps=8, final_lr=1.0)(tmp_path / "whole")
    _toy(monkeypatch, steps=4, final_lr=1.0)(tmp_path / "parts")
    longer, rest = _toy(monkeypatch, steps=8, final_lr=1.0)(tmp_path / "parts")
    assert rest == losses[4:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), longer.parameters(), strict=True))


def test_a_stage_is_made_after_those_that_it_needs(monkeypatch):
    order = []
    for name, stage in train.STAGES.items():
        make = lambda run, *needed, name=name: order.append((name, *needed)) or name  # noqa: E731
        monkeypatch.setitem(train.STAGES, name, train.Stage(make, stage.needs))
    train.train(["model"], None)
    assert order == [
        ("autoencoder",),
        ("latents", "autoencoder"),
        ("teacher", "latents"),
        ("model", "latents", "teacher"),
    ]
    order.clear()
    assert train.train(["reward"], None) == {"reward": "reward"} and order == [("reward",)]
    train.train(train.STAGES, None)
    assert order[-1] == ("export", "autoencoder", "model", "reward", "heldout")


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_a_cpu_that_only_imitates_bf16_trains_in_fp32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with train._precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_muon_is_the_same_optimiser_where_bf16_is_only_imitated(monkeypatch):
    cpu = torch.device("cpu")
    steps, dtypes = {}, {}
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        weight = torch.nn.Parameter(torch.zeros(48, 32))
        weight.grad = torch.randn(48, 32, generator=torch.Generator().manual_seed(5))
        gradient = weight.grad.clone()
        optimiser = torch.optim.Muon([weight], 1.0, 0.0, adjust_lr_fn="match_rms_adamw")
        with train._newton_schulz_precision(cpu):
            cast = weight.bfloat16()
            dtypes[capability] = cast.dtype
            assert cast.data_ptr() != weight.data_ptr(), "Muon writes into what it casts"
            optimiser.step()
        steps[capability] = weight.detach()
        assert torch.equal(weight.grad, gradient)
    assert dtypes == {"AVX2": torch.float32, "AVX512": torch.bfloat16}
    assert torch.ones(1).bfloat16().dtype == torch.bfloat16, "in the step alone"
    difference = (steps["AVX2"] - steps["AVX512"]).norm() / steps["AVX512"].norm()
    assert 0 < difference < 0.02


def test_data_of_other_inputs_is_refused(tmp_path):
    note = tmp_path / "latents128.json"
    assert not train._is_kept(note, {"seed": 3})
    note.write_text('{"seed": 3}')
    assert train._is_kept(note, {"seed": 3})
    with pytest.raises(ValueError, match="latents128.json was made with"):
        train._is_kept(note, {"seed": 4})


def test_a_training_batch_equals_the_pipeline_s_own_forward():
    """`Model.forward` trains many captions at once; the pipeline's model_fn must compute the same for each."""
    torch.manual_seed(1)
    model = train.Model().eval()  # mends torchvision, which the next line needs
    from diffsynth.pipelines.z_image import model_fn_z_image

    for parameter in model.parameters():
        if not parameter.any():  # zero at the start of a training: would hide everything before it
            torch.nn.init.normal_(parameter, std=0.1)
    tokens = models.build_tokenizer()([CAPTION, ""], padding="max_length", return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    latents, sigma = torch.randn(2, 16, 16, 16), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        batch = model(latents, sigma, ids, mask)
        for i in range(2):
            features = model.text_encoder(ids[i : i + 1], mask[i : i + 1]).hidden_states[-2][0][mask[i].bool()]
            one = model_fn_z_image(
                model.dit,
                latents=latents[i : i + 1],
                timestep=1000 * sigma[i : i + 1],
                prompt_embeds=[features],
            )
            torch.testing.assert_close(batch[i : i + 1], one, atol=1e-5, rtol=0)


def test_the_denoiser_s_captions_mistell_the_relation_and_nothing_else():
    scenes = world.split_scenes()[0]
    index = np.arange(0, len(scenes), 8)
    latents = np.zeros((len(index), 1, 1, 1), np.float16)
    settings = replace(train.SETTINGS["teacher"], batch=2000)
    batches = train.Batches({128: (latents, index)}, settings, torch.device("cpu"))
    caption = batches.draw(0, 128, train.MISTOLD)[-1]
    generator = train._torch_rng(settings.seed, 0)  # the scenes are the first numbers that a step draws
    shown = index[torch.randint(len(index), (2000,), generator=generator).sort().values.numpy()]
    told = [(scenes[a], scenes[b]) for a, b in zip(shown, caption.tolist(), strict=True) if b != batches.empty]
    assert all((a.first, a.second) == (b.first, b.second) for a, b in told)
    wrong = np.mean([a.relation != b.relation for a, b in told])
    assert wrong == pytest.approx(train.MISTOLD * 3 / 4, abs=0.04)
    assert len(told) / 2000 == pytest.approx(1 - train.CAPTION_DROPOUT, abs=0.03)


def test_captions_are_right_more_often_at_the_end(monkeypatch):
    told = []

    class Batches:
        def __init__(self, *arguments):
            pass

        def draw(self, step, size, mistold):
            told.append(mistold)
            raise StopIteration

    def fit(name, module, loss_of, run):
        for step in (0, train.LATE_FROM - 1, train.LATE_FROM):
            with pytest.raises(StopIteration):
                loss_of(step)
        return module

    monkeypatch.setattr(train, "Batches", Batches)
    monkeypatch.setattr(train, "_fit_model", fit)
    run = train.Run(None, torch.device("cpu"))
    teacher = train.train_teacher(run, {})
    assert told == [train.MISTOLD, train.MISTOLD, train.MISTOLD_LATE]
    train.train_model(run, {}, teacher)
    assert told[3:] == 3 * [train.MISTOLD_LATE]


def test_no_mistold_caption_is_a_held_out_one():
    """A relation that would make it one is left as it was."""
    scenes, held_out = world.split_scenes()
    data = {128: (np.zeros((1, 1, 1, 1), np.float16), np.zeros(1, np.int64))}
    retold = train.Batches(data, train.SETTINGS["teacher"], torch.device("cpu")).retold
    assert retold.shape == (len(scenes), 4) and retold.max() < len(scenes)  # an index of a scene that is trained on
    beside = [scene for scene in scenes if world.Scene(scene.first, "above", scene.second) in set(held_out)]
    number = scenes.index(beside[0])
    assert retold[number, world.RELATIONS.index("above")] == number


def test_hard_negatives_differ_in_one_fact():
    rng = np.random.default_rng(0)
    for scene in itertools.islice(itertools.cycle(world.all_scenes()[::97]), 300):
        changed = train._change_one_fact(scene, rng)
        fields = [scene.relation != changed.relation]
        for a, b in ((scene.first, changed.first), (scene.second, changed.second)):
            fields += [a.count != b.count, a.colour != b.colour, a.shape != b.shape]
        assert sum(fields) == 1 and changed.first.colour != changed.second.colour


def test_another_relation_is_to_be_refused_by_a_margin(tmp_path, monkeypatch):
    """And no other fact: with negatives of one kind alone the loss rises by the margin, or not at all."""
    losses = {}
    monkeypatch.setattr(train, "REWARD_SCENES", 64)
    monkeypatch.setattr(train, "_hard_negative", lambda scene, trained, rng: negative_of(scene))
    for kind in ("relation", "shape"):
        for margin in (0.0, 6.0):

            def negative_of(scene, kind=kind):
                if kind == "relation":
                    return replace(scene, relation=world.OPPOSITES[scene.relation])
                shape = world.SHAPES[world.SHAPES.index(scene.first.shape) - 1]
                return replace(scene, first=replace(scene.first, shape=shape))

            def fit(name, module, loss_of, run, key=(kind, margin)):
                losses[key] = loss_of(0)[1]["contrast"]
                return module

            settings = replace(train.SETTINGS["reward"], batch=8, margin=margin)
            monkeypatch.setitem(train.SETTINGS, "reward", settings)
            monkeypatch.setattr(train, "fit", fit)
            train.train_reward("reward", train.Run(tmp_path, torch.device("cpu")))
    assert losses["shape", 6.0] == losses["shape", 0.0]
    # An untrained reward holds 8 + 3 captions for alike, and three are a margin above: log((8 + 3 e^6) / 11).
    assert losses["relation", 6.0] - losses["relation", 0.0] == pytest.approx(0.7 * 4.71, abs=0.5)


# --- what is shipped --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return embedded.load_pipeline()


def test_the_weights_are_small_and_fp16_and_their_settings_are_those_of_the_script():
    from safetensors.torch import load_file

    files = [path for path in embedded.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl"}
    for path in files:
        if path.suffix == ".safetensors":
            assert all(
                t.dtype in (torch.float16, torch.int64) and t.float().isfinite().all() for t in load_file(path).values()
            )
    recorded = json.loads((embedded.WEIGHTS / "training.json").read_text())
    assert recorded == {name: train.asdict(settings) for name, settings in train.SETTINGS.items()}


@pytest.mark.parametrize(("size", "count"), [(128, 128), (256, 48)])
def test_the_autoencoder_keeps_what_the_oracle_reads(pipe, size, count):
    scenes = embedded.captions()[:count]
    right = []
    for seed, caption in enumerate(scenes):
        image = torch.from_numpy(np.array(picture(world.parse(caption), size, seed))).permute(2, 0, 1)[None]
        with torch.no_grad():
            right.append(embedded.judge(pipe.vae_decoder(pipe.vae_encoder(image / 127.5 - 1)), caption)["all"])
    assert np.mean(right) >= 0.98


def test_the_pipeline_draws_a_trained_size_unless_told_otherwise(pipe):
    from diffsynth.pipelines.z_image import ZImagePipeline

    assert isinstance(pipe, ZImagePipeline)
    silent = {"num_inference_steps": 2, "progress_bar_cmd": lambda steps: steps, "seed": 0}
    assert pipe(CAPTION, **silent).size == (256, 256)
    assert pipe(CAPTION, height=96, width=160, **silent).size == (160, 96)


def test_the_schedule_s_shift_grows_with_the_size(pipe):
    """Half the size at half the shift follows the same noise; a shift that is given stays."""
    silent = {"num_inference_steps": 3, "progress_bar_cmd": lambda steps: steps, "seed": 0}
    shifts = {}
    for size in (128, 256):
        pipe(CAPTION, height=size, width=size, **silent)
        second = pipe.scheduler.sigmas[1].item()
        shifts[size] = second / (1 - second) / 2  # of two thirds: sigma / (1 - sigma) = shift * 2
    assert shifts[256] == pytest.approx(2 * shifts[128], rel=1e-4) and shifts[256] == pytest.approx(5, rel=1e-4)
    pipe(CAPTION, **SMALL, sigma_shift=3.0, **silent)
    second = pipe.scheduler.sigmas[1].item()
    assert second / (1 - second) / 2 == pytest.approx(3, rel=1e-4)


def test_half_the_image_has_half_the_latents(pipe):
    """So a preview of half the size, from the low band of the noise, draws the same image."""
    caption = embedded.captions()[0]
    image = torch.from_numpy(np.array(picture(world.parse(caption), 256))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae_encoder(image)
        half = torch.nn.functional.avg_pool2d(latents, 2)
        encoded = pipe.vae_encoder(torch.nn.functional.avg_pool2d(image, 2))
        assert (encoded - half).square().mean() < 0.15 * half.square().mean()
        assert embedded.judge(pipe.vae_decoder(half), caption)["all"]


def test_a_size_beyond_its_positions_is_refused(pipe):
    with pytest.raises(ValueError, match="draws up to 1024x1024"):
        pipe(CAPTION, height=1040, seed=0)


def test_more_words_than_it_has_positions_for_are_refused(pipe):
    silent = {"num_inference_steps": 1, "progress_bar_cmd": lambda steps: steps, "seed": 0}
    most = " ".join(["red"] * 200)
    assert pipe(most, **SMALL, **silent).size == (128, 128)
    with pytest.raises(ValueError, match="reads up to 200 words, got 201"):
        pipe(f"{most} red", **silent)
    with pytest.raises(ValueError, match="reads up to 200 words, got 201"):
        pipe("red", negative_prompt=f"{most} red", **silent)


def test_arguments_by_position_go_where_the_stock_call_has_them():
    import ses_fast

    pipe = ses_fast.enable(embedded.load_pipeline())
    names = list(inspect.signature(type(pipe).__mro__[3].__call__).parameters)
    assert names[1:4] == ["prompt", "negative_prompt", "cfg_scale"]
    silent = SMALL | {"num_inference_steps": 2, "progress_bar_cmd": lambda steps: steps, "seed": 3, "enable_ses": True}
    silent |= {"ses_reward_model": lambda images, prompt: images.mean((1, 2, 3)), "ses_eval_budget": 2}
    silent |= {"ses_inference_steps": 2, "ses_config": ses_fast.SESConfig(progress=False)}
    by_name = pipe(CAPTION, negative_prompt="", cfg_scale=2.0, **silent)
    assert np.array_equal(pipe(CAPTION, "", 2.0, **silent), by_name)


def test_words_it_never_saw_are_warned_of(pipe, recwarn):
    silent = {"num_inference_steps": 1, "progress_bar_cmd": lambda steps: steps, "seed": 0}
    with pytest.warns(UserWarning, match="reads nothing in 'a', 'cat'"):
        pipe("a red cat", **silent)
    recwarn.clear()
    pipe(CAPTION, **silent)
    assert not [w for w in recwarn if "reads nothing" in str(w.message)]


def test_guidance_and_an_empty_prompt_work(pipe):
    silent = SMALL | {"num_inference_steps": 2, "progress_bar_cmd": lambda steps: steps, "seed": 0}
    plain, guided = pipe(CAPTION, **silent), pipe(CAPTION, cfg_scale=2.0, **silent)
    assert np.abs(np.array(plain, int) - np.array(guided, int)).max() > 10
    empty = pipe("", **silent)
    assert empty.size == (128, 128) and np.abs(np.array(plain, int) - np.array(empty, int)).max() > 10


@pytest.mark.parametrize("heldout", [False, True])
def test_the_rewards_prefer_the_right_caption(heldout):
    reward = embedded.load_reward(heldout=heldout)
    rng, right = np.random.default_rng(0), []
    for seed, caption in enumerate(embedded.captions()[:60]):
        scene = world.parse(caption)
        image = torch.from_numpy(np.array(picture(scene, 128, seed))).permute(2, 0, 1)[None] / 127.5 - 1
        true, false = (reward(image, str(s)).item() for s in (scene, train._change_one_fact(scene, rng)))
        right.append(true > false)
    assert np.mean(right) >= 0.9


def test_the_two_rewards_are_two():
    image = torch.from_numpy(np.array(picture(SCENE))).permute(2, 0, 1)[None] / 127.5 - 1
    one, other = (embedded.load_reward(heldout=h)(image, CAPTION).item() for h in (False, True))
    assert one != other


# --- the reward without a ceiling ---------------------------------------------------------------------------------


def test_the_jpeg_reward_is_the_size_of_pillow_s_file(tmp_path):
    images = torch.stack([torch.from_numpy(np.array(picture(SCENE, 128, seed))).permute(2, 0, 1) for seed in (0, 1)])
    images = torch.cat([(images + 0.5) / 127.5 - 1, 1.5 * torch.randn(1, 3, 128, 128).sign()])
    scores = embedded.load_reward("jpeg")(images, CAPTION)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    for image, score in zip(images, scores, strict=True):
        Image.fromarray(world._to_uint8(image)).save(tmp_path / "image.jpg", quality=95)
        assert score.item() == pytest.approx(-(tmp_path / "image.jpg").stat().st_size / 1000, abs=1e-6)
    assert scores[2] < scores[:2].min()  # noise is large


def test_a_search_for_small_files_returns_the_image_it_scored():
    import ses_fast

    pipe = ses_fast.enable(embedded.load_pipeline())
    reward = embedded.load_reward("jpeg")
    call = SMALL | {"num_inference_steps": 2, "ses_inference_steps": 2, "progress_bar_cmd": lambda steps: steps}
    image = pipe(
        CAPTION,
        seed=3,
        enable_ses=True,
        ses_reward_model=reward,
        ses_eval_budget=3,
        ses_config=ses_fast.SESConfig(progress=False),
        **call,
    )
    levels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] + 0.5) / 127.5 - 1
    assert reward(levels).item() == pytest.approx(pipe.ses_result.score, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param({"name": "png"}, "'clip' and 'jpeg'", id="unknown"),
        pytest.param({"name": "jpeg", "heldout": True}, "no held-out one", id="heldout"),
    ],
)
def test_other_rewards_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        embedded.load_reward(**arguments)


def test_the_jpeg_reward_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"must be \(n, 3, H, W\)"):
        embedded.load_reward("jpeg")(torch.zeros(3, 8, 8))
