"""SESConfig in a file: settings, and never what belongs to one call."""

import json
from dataclasses import fields

import pytest

from ses_fast import Preview, SESConfig
from ses_fast.pipelines import config

SETTINGS = {"popsize": 20, "k_elites": 4, "wavelet_name": "db2", "dwt_level": 2, "batch_size": "auto"} | {
    "include_base": False,
    "seed": 7,
    "time_limit": 60.5,
    "backend": "torch",
    "progress": False,
    "strategy": "random",
}
PREVIEW = {"scale": 1, "race": [[0.8, 0.5], [0.6, 0.25]], "cfg": False, "refine": 2}


@pytest.fixture
def file(tmp_path):
    def file(content):
        path = tmp_path / "ses.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return file


def test_what_is_in_the_file(file):
    assert SESConfig.from_file(file(SETTINGS)) == SESConfig(**SETTINGS)
    assert SESConfig.from_file(str(file("{}"))) == SESConfig()
    assert SESConfig.from_file(file("\ufeff" + json.dumps({"popsize": 3}))).popsize == 3


def test_a_preview_is_an_object(file):
    given = SESConfig.from_file(file({"preview": PREVIEW}))
    assert given.preview == Preview(1, ((0.8, 0.5), (0.6, 0.25)), False, 2)
    assert SESConfig.from_file(file(json.dumps(given.settings()))) == given


@pytest.mark.parametrize("settings", [{}, SETTINGS])
def test_what_settings_gives_is_what_the_file_takes(settings, file):
    given = SESConfig(**settings)
    assert SESConfig.from_file(file(given.settings())) == given
    assert given.settings().keys() == {f.name for f in fields(SESConfig)} - set(config.CARRIED)


def test_arguments_of_the_call_stand_apart(file):
    path = file({"popsize": 3, "call": {"num_inference_steps": 8, "ses_inference_steps": 4}})
    assert SESConfig.from_file(path) == SESConfig(popsize=3)
    assert SESConfig.call_from_file(path) == {"num_inference_steps": 8, "ses_inference_steps": 4}
    assert SESConfig.call_from_file(file(SETTINGS)) == {}


BAD_CALLS = {
    "an unknown name": ({"call": {"steps": 4}}, "call has no steps; it has num_inference_steps, ses_inference_steps"),
    "a number": ({"call": 4}, "ses.json: call must be an object"),
    "no steps": ({"call": {"ses_inference_steps": 0}}, "ses.json: call: ses_inference_steps"),
    "half a step": ({"call": {"ses_inference_steps": 2.5}}, "ses.json: call: ses_inference_steps"),
    "no JSON": ("{", "ses.json: Expecting"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case, file):
    content, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        SESConfig.call_from_file(file(content))


# What is in the file, and what the error says.
BAD = {
    "an unknown name": ({"popsiez": 3}, "unknown settings popsiez; the known ones are popsize, k_elites"),
    "a callback": ({"on_preview": "print"}, "on_preview: of one call"),
    "a state": ({"state": None}, "state: of one call"),
    "held-out rewards": ({"report_rewards": ["pick"]}, "report_rewards: of one call"),
    "a list": ([1], "it is no JSON object"),
    "no JSON": ("{", "ses.json: Expecting"),
    "nested too deeply": ("[" * 100_000, "ses.json: "),
    "an empty file": ("", "ses.json: Expecting"),
    "popsize 0": ({"popsize": 0}, "ses.json: popsize"),
    "popsize a word": ({"popsize": "many"}, "ses.json: popsize"),
    "popsize an object": ({"popsize": {"n": 3}}, "ses.json: popsize"),
    "a level that is a word": ({"dwt_level": "deep"}, "ses.json: dwt_level"),
    "an unknown wavelet": ({"wavelet_name": "db999"}, "db999"),
    "a wavelet that is a number": ({"wavelet_name": 3}, "ses.json: "),
    "time as a word": ({"time_limit": "long"}, "ses.json: time_limit"),
    "an unknown backend": ({"backend": "jax"}, "ses.json: backend must be one of"),
    "an unknown strategy": ({"strategy": "luck"}, "ses.json: .*luck"),
    "a preview's unknown name": ({"preview": {"sclae": 2}}, "preview has no sclae; it has scale, race, cfg, refine"),
    "a preview's scale": ({"preview": {"scale": 3}}, "ses.json: .*scale"),
    "a preview's race": ({"preview": {"race": [[0.5, 0.5], [0.6, 0.4]]}}, "ses.json: .*race"),
    "a preview that is a number": ({"preview": 2}, "ses.json: preview must be"),
    "progress as a number": ({"progress": 1}, "ses.json: progress must be True or False"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, file):
    content, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        SESConfig.from_file(file(content))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        SESConfig.from_file(tmp_path / "none.json")
