"""The reward that asks a vision-language model, against a server in a thread that sees what the model would see."""

import base64
import copy
import functools
import io
import json
import pickle
import socket
import threading
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from test_rewards import make_images

import ses_fast
from ses_fast.pipelines.request import reward_name
from ses_fast.rewards import VLMReward, WeightedReward
from ses_fast.rewards.vlm import AGAIN, QUESTION, read_number

KEY = "sk-very-secret"
PROMPT = "two red squares, left of {high} rings"  # braces in a prompt are the prompt's own


def brightness(picture: Image.Image) -> float:
    return round(float(np.asarray(picture, dtype=np.float64).mean()) / 25.5, 6)


class Server:
    """Answers with the picture's brightness, 0 to 10, or with what the test puts into `answers`.

    An answer is a text, a status, a dict (the JSON as it is), bytes (no JSON), or a function of the request.
    """

    def __init__(self):
        self.answers, self.requests, self.keys = deque(), [], []
        self.busy, self.most, self.lock = 0, 0, threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.requests.append(body)
                    owner.keys.append(self.headers["Authorization"].removeprefix("Bearer "))
                    answer = owner.answers.popleft() if owner.answers else lambda body: str(brightness(sent(body)))
                    owner.busy += 1
                    owner.most = max(owner.most, owner.busy)
                answer = answer(body) if callable(answer) else answer
                with owner.lock:
                    owner.busy -= 1
                self.reply(answer)

            def reply(self, answer):
                status, kind, content = 200, "application/json", answer
                if isinstance(answer, int):
                    # As a bad server may, with the key that it was sent.
                    said = f"trouble with {self.headers['Authorization']}"
                    status, content = answer, {"error": {"message": said}}
                elif isinstance(answer, str):
                    content = completion(answer)
                if isinstance(content, bytes):
                    kind = "text/html"
                else:
                    content = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                try:
                    self.wfile.write(content)
                except ConnectionError:  # the client gave up
                    pass

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def completion(text, finish="stop"):
    message = {"role": "assistant", "content": text}
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }  # fmt: skip


def sent(body) -> Image.Image:
    """The picture of a request."""
    kind, _, data = body["messages"][0]["content"][0]["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.close()


def expected(images):
    levels = ((images + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [brightness(Image.fromarray(each)) for each in levels]


# ---- right answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_sees_the_pipeline_s_own_pictures(server, dtype):
    base_pipeline = pytest.importorskip("diffsynth.diffusion.base_pipeline")
    images = make_images(20, 30, dtype)
    scores = VLMReward("m", server.url, concurrency=1)(images, PROMPT)
    assert scores.dtype == torch.float64 and scores.tolist() == expected(images)
    for image, body in zip(images, server.requests, strict=True):
        stock = base_pipeline.BasePipeline.vae_output_to_image(None, image[None])
        assert np.array_equal(np.asarray(sent(body)), np.asarray(stock))


def test_what_is_asked(server):
    images = make_images(8, 8)[:1]
    VLMReward("some/model", server.url, low=1, high=5.5)(images, PROMPT)
    (body,) = server.requests
    question = body["messages"][0]["content"][1]["text"]
    assert question == QUESTION.replace("{low}", "1").replace("{high}", "5.5").replace("{prompt}", PROMPT)
    assert {name: body[name] for name in body if name != "messages"} == {
        "model": "some/model", "temperature": 0, "seed": 0, "max_tokens": 256,
    }  # fmt: skip
    options = {"temperature": None, "max_tokens": None, "max_completion_tokens": 9, "top_k": 1}
    VLMReward("m", server.url, question="{prompt}?", options=options)(images, "x")
    assert server.requests[1]["messages"][0]["content"][1]["text"] == "x?"
    assert {name: server.requests[1][name] for name in body.keys() | options if name in server.requests[1]} == {
        "messages": server.requests[1]["messages"], "model": "m", "seed": 0, "max_completion_tokens": 9, "top_k": 1,
    }  # fmt: skip


def test_the_key_is_the_given_one_or_the_environment_s(server, monkeypatch):
    images = make_images(8, 8)[:1]
    VLMReward("m", server.url)(images, "")
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment")
    given = VLMReward("m", server.url, api_key=KEY)
    for reward in (VLMReward("m", server.url), given, replace(given, model="n"), pickle.loads(pickle.dumps(given))):
        reward(images, "")
    assert server.keys == ["none", "of-the-environment", KEY, KEY, KEY]


def test_a_batch_is_asked_about_at_once_and_scores_in_its_order(server):
    together = threading.Barrier(4)  # which no smaller number passes
    server.answers.extend([lambda body: together.wait(60) and "" or str(brightness(sent(body)))] * 8)
    levels = torch.linspace(-1, 1, 8)[:, None, None, None].expand(8, 3, 8, 8)
    scores = VLMReward("m", server.url, concurrency=4)(levels, PROMPT)
    assert scores.tolist() == expected(levels) and server.most == 4
    server.most = 0
    assert VLMReward("m", server.url, concurrency=1)(levels[:3], PROMPT).tolist() == expected(levels[:3])
    assert server.most == 1


# ---- the answers that are kept


def test_an_image_is_asked_about_once_for_a_prompt(server):
    reward, images = VLMReward("m", server.url), make_images(8, 8)
    first = reward(images[[0, 1, 0]], "a")
    assert reward.cache_info() == (1, 2, 2) and first[0] == first[2]
    assert torch.equal(reward(images[[0, 1, 0]], "a"), first)
    assert reward.cache_info() == (4, 2, 2) and len(server.requests) == 2
    reward(images[:2], "b")
    reward(images[:1].transpose(2, 3), "b")  # the same numbers in another order
    assert reward.cache_info() == (4, 5, 5) and len(server.requests) == 5


def test_shapes_are_told_apart(server):
    server.answers.extend(["1", "2"])
    reward, image = VLMReward("m", server.url), torch.zeros(1, 3, 4, 8)
    assert [reward(each, "").item() for each in (image, image.reshape(1, 3, 8, 4), image)] == [1, 2, 1]


def test_the_least_recently_used_answer_is_forgotten_first(server):
    reward, images = VLMReward("m", server.url, cache_size=2), make_images(8, 8)
    for i in (0, 1, 0, 2):  # forgets 1
        reward(images[i : i + 1], "")
    assert reward.cache_info() == (1, 3, 2)
    reward(images[:1], "")
    assert reward.cache_info() == (2, 3, 2)
    reward(images[1:2], "")
    assert reward.cache_info() == (2, 4, 2)
    nothing = VLMReward("m", server.url, cache_size=0)
    assert nothing(images[[0, 0]], "").tolist() == expected(images[[0, 0]])
    assert nothing.cache_info() == (1, 1, 0)


def test_what_was_answered_before_an_error_is_kept(server):
    reward, images = VLMReward("m", server.url, concurrency=1), make_images(8, 8)
    server.answers.extend(["4", 404])
    with pytest.raises(ValueError, match="404"):
        reward(images, "")
    assert len(server.requests) == 2  # the others are not asked about
    assert reward(images, "").tolist() == [4, *expected(images)[1:]] and len(server.requests) == 5


def test_a_copy_asks_for_itself(server):
    reward, images = VLMReward("m", server.url), make_images(8, 8)
    scores = reward(images, "")
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert twin.cache_info() == (0, 0, 0) and torch.equal(twin(images, ""), scores)
        assert twin.name == reward.name


def test_threads_share_a_reward(server):
    reward, images = VLMReward("m", server.url), make_images(8, 8)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda prompt: reward(images, prompt).tolist(), "abcabc"))
    assert found == [expected(images)] * 6
    info = reward.cache_info()
    assert info.hits + info.misses == 24 and info.size == 12


# ---- answers that are no rating


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("7", 7), (" 7.25\n", 7.25), ("**7**.", 7), ("7,5", 7.5), ("Score: 8/10", 8), ("I say 6 out of 10.", 6),
        ("10/10", 10), ("10", 10), ("0", 0), ('{"score": 3.5}', 3.5), ("Score (0-10): 4", 4), ("From 0 to 10: 4", 4),
        ("<think>3 rings, so 9?</think>\n2", 2), ("Objects: 3\nColours: 4\nOverall: 3.5", 3.5), ("$\\boxed{9}$", 9),
        ("GPT4 says 5", 5), ("**Score:** 7 / 10.0", 7), ("3 rings, 2 squares.\n\n**6.5**", 6.5),
    ],
)  # fmt: skip
def test_a_number_is_read(answer, number):
    assert read_number(answer, 0, 10) == number


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no number"), ("A fine image.", "no number"), ("ten", "no number"), ("5x", "no number"),
        ("1.2.3", "no number"), ("<think>7</think>", "no number"), ("7 or 8", "several"), ("4-7", "several"),
        ("7\nIt has 3 rings.", "several"), ("11", "11 is not between 0 and 10"), ("-1", "-1 is not"),
        ("\u22121", "-1 is not"), ("85/100", "several"), ("7 out of 10.5", "several"),
    ],
)  # fmt: skip
def test_no_number_is_made_up(answer, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        read_number(answer, 0, 10)
    assert repr(answer) in str(caught.value)


def test_a_range_of_its_own():
    assert read_number("-0.5", -1, 1) == -0.5
    assert read_number("0.25/1", 0, 1) == 0.25
    assert read_number("900000/1000000", 0, 1e6) == 900000


def test_the_model_is_reminded_and_asked_again(server):
    server.answers.extend(["A fine image of 3 rings and 2 squares.", "", "7"])
    images = make_images(8, 8)[:1]
    assert VLMReward("m", server.url)(images, PROMPT).tolist() == [7]
    first, second, third = (body["messages"] for body in server.requests)
    reminder = {"role": "user", "content": AGAIN.replace("{low}", "0").replace("{high}", "10")}
    assert second == [*first, {"role": "assistant", "content": "A fine image of 3 rings and 2 squares."}, reminder]
    assert third == [*second, reminder]  # an empty answer is not sent back


def test_a_model_that_gives_no_number_is_quoted(server):
    server.answers.extend(["I cannot see images.", "Sorry."])
    reward = VLMReward("m", server.url, attempts=2)
    with pytest.raises(ValueError, match=f"'m' at {server.url} gave no rating in 2 answers: no number.*'Sorry.'"):
        reward(make_images(8, 8)[:1], "")
    assert len(server.requests) == 2 and reward.cache_info().size == 0


def test_an_answer_that_was_cut_off_is_not_read(server):
    server.answers.append(completion("7", finish="length"))
    with pytest.raises(ValueError, match="did not end its answer: raise max_tokens"):
        VLMReward("m", server.url)(make_images(8, 8)[:1], "")


# ---- servers in trouble


def test_trouble_that_passes_is_waited_for(server):
    server.answers.extend([500, 503, 429, "7"])
    assert VLMReward("m", server.url, max_retries=3)(make_images(8, 8)[:1], "").tolist() == [7]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("status", "error", "requests"), [(500, ConnectionError, 2), (429, ConnectionError, 2), (401, ValueError, 1)]
)
def test_trouble_that_stays_is_said_without_the_key(server, status, error, requests):
    server.answers.extend([status] * 5)
    with pytest.raises(error, match=f"'m' at {server.url} answered {status}.*trouble with Bearer") as caught:
        VLMReward("m", server.url, api_key=KEY, max_retries=1)(make_images(8, 8)[:1], "")
    assert len(server.requests) == requests
    assert KEY not in "".join(shown(caught.value)) and "(the API key)" in str(caught.value)


def shown(error):
    """All that a traceback shows of an error."""
    return traceback.format_exception(error)


def test_a_server_that_is_down(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ConnectionError, match=f"{url} cannot be reached, in 1 tries.*base_url") as caught:
        VLMReward("m", url, api_key=KEY, max_retries=0)(make_images(8, 8)[:1], "")
    assert KEY not in "".join(shown(caught.value))


def test_a_server_that_is_silent(server):
    over = threading.Event()
    server.answers.append(lambda body: over.wait(60) and "7")
    with pytest.raises(TimeoutError, match=f"{server.url} did not answer within 0.1 s, in 1 tries"):
        VLMReward("m", server.url, timeout=0.1, max_retries=0)(make_images(8, 8)[:1], "")
    over.set()
    assert VLMReward("m", server.url, timeout=30)(make_images(8, 8)[:1], "").tolist() == expected(make_images(8, 8)[:1])


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"<html>Welcome</html>", id="a-web-page"),
        pytest.param({"detail": "hello"}, id="another-program"),
        pytest.param({"choices": []}, id="no-choice"),
    ],
)
def test_what_is_no_such_server(server, answer):
    server.answers.append(answer)
    with pytest.raises(ValueError, match=f"{server.url}: what answers there is no OpenAI-compatible server.*/v1"):
        VLMReward("m", server.url)(make_images(8, 8)[:1], "")


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": " "}, "model must be the name"), ({"model": None}, "model must be the name"),
        ({"base_url": "localhost:8000"}, "base_url must be.*http://localhost:8000/v1.*got 'localhost:8000'"),
        ({"base_url": None}, "base_url must be"), ({"base_url": "http://host:port/v1"}, "base_url must be"),
        ({"base_url": "ftp://host/v1"}, "base_url must be"), ({"base_url": "http://"}, "base_url must be"),
        ({"question": "How good?"}, "question must hold {prompt}"), ({"question": None}, "question must hold"),
        ({"low": 5, "high": 5}, "low must be a number below high"), ({"high": float("inf")}, "low must be a number"),
        ({"low": True}, "low must be"), ({"timeout": 0}, "timeout must be"), ({"timeout": None}, "timeout must be"),
        ({"attempts": 0}, "attempts must be at least 1"), ({"max_retries": -1}, "max_retries must be at least 0"),
        ({"concurrency": 1.5}, "concurrency must be a whole number"), ({"cache_size": -1}, "cache_size must be"),
        ({"options": {"n": 2}}, "without model, messages, stream, n"), ({"options": [1]}, "options are a request's"),
        ({"options": {"stop": {1}}}, "options are sent as JSON"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_clear_error(settings, message):
    pytest.importorskip("openai")
    with pytest.raises(ValueError, match=message):
        VLMReward(**{"model": "m", "base_url": "http://localhost:8000/v1"} | settings)


@pytest.mark.parametrize("secret", ["sk-1\n", "sk 1", "sk-\u00e4", 7])
def test_a_key_that_cannot_be_sent_is_refused_unseen(secret):
    pytest.importorskip("openai")
    with pytest.raises(ValueError, match="API key must be") as caught:
        VLMReward("m", "http://localhost:8000/v1", api_key=secret)
    assert "sk" not in str(caught.value)


def test_a_password_in_the_address_is_refused_unseen():
    with pytest.raises(ValueError, match="no user or password") as caught:
        VLMReward("m", "http://me:hunter2@localhost/v1")
    assert "hunter2" not in str(caught.value)


def test_settings_cannot_be_changed_under_the_kept_answers():
    pytest.importorskip("openai")
    options = {"top_k": 1}
    reward = VLMReward("m", "http://localhost:8000/v1", options=options)
    options["top_k"] = 2
    assert reward.options == {"top_k": 1}
    with pytest.raises(AttributeError):
        reward.question = "{prompt}"


@pytest.mark.parametrize("package", ["openai", "pillow"])
def test_a_missing_package_names_the_extra(monkeypatch, package):
    module = {"pillow": "PIL"}.get(package, package)
    monkeypatch.setattr("ses_fast.rewards.vlm.find_spec", lambda name: None if name == module else True)
    with pytest.raises(ImportError, match=rf"{package}.*ses-fast\[vlm\]"):
        VLMReward("m", "http://localhost:8000/v1")


def test_images_that_no_reward_takes_are_not_sent(server):
    with pytest.raises(ValueError, match=r"shape \(n, 3, H, W\)"):
        VLMReward("m", server.url)(torch.zeros(3, 8, 8), "")
    assert not server.requests


# ---- in a search


def test_a_state_says_model_and_question_and_not_the_key():
    pytest.importorskip("openai")
    url = "http://localhost:8000/v1"
    reward = VLMReward("some/model", url, question="Is it {prompt}?", api_key=KEY)
    name = reward_name(reward)
    assert "some/model" in name and "Is it {prompt}?" in name
    others = [{"model": "n"}, {"question": "{prompt}"}, {"high": 5}, {"options": {"seed": 1}}]
    assert len({name, *(reward_name(replace(reward, **other)) for other in others)}) == 5
    moved = replace(reward, base_url="http://elsewhere/v1", timeout=1, api_key="other")
    assert reward_name(moved) == name
    mixed = WeightedReward({"pick": len, "judge": reward}, {"pick": 1.0, "judge": 0.5})
    assert reward_name(mixed) == {"pick": 1.0, f"judge: {name}": 0.5}
    for shown_of in (reward, mixed, functools.partial(max, reward), functools.partial(max, key=[reward])):
        assert KEY not in repr(shown_of) and KEY not in json.dumps(reward_name(shown_of))


def test_searches_with_it_alone_and_in_a_sum(server):
    tiny = pytest.importorskip("tiny")
    pipe = ses_fast.enable(tiny.tiny_z_image())
    judge = VLMReward("m", server.url, api_key=KEY)
    _, result, seen = tiny.search(pipe, 6, {"ses_reward_model": judge}, batch_size=4)
    assert seen.scores == expected(torch.stack(seen.images)) and result.score == max(seen.scores)
    assert result.state.fingerprint["reward"] == reward_name(judge) and judge.cache_info().misses == 6
    _, again, _ = tiny.search(pipe, 6, {"ses_reward_model": judge}, batch_size=4)
    assert again.score == result.score and judge.cache_info() == (6, 6, 6)  # nothing is asked twice
    mixed = WeightedReward({"judge": judge, "bright": tiny.brightness}, {"judge": 1.0, "bright": -0.5})
    _, result, _ = tiny.search(pipe, 6, {"ses_reward_model": mixed}, batch_size=4)
    assert result.trace[0].members["judge"] == pytest.approx(seen.scores[0])
    assert KEY not in json.dumps(result.state.fingerprint)


def test_a_search_whose_server_goes_down_keeps_what_it_found(server):
    tiny = pytest.importorskip("tiny")
    pipe = ses_fast.enable(tiny.tiny_z_image())
    server.answers.extend(["5", "6", 500])
    with pytest.raises(ConnectionError, match="answered 500") as caught:
        tiny.search(pipe, 6, {"ses_reward_model": VLMReward("m", server.url, max_retries=0)})
    assert caught.value.ses_result.score == 6
