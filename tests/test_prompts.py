"""Prompt files, as the field writes them and as they go wrong."""

import codecs
import csv
import io
import json
import math
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ses_fast.prompts import FORMATS, Prompt, as_prompts, digest, file_stem, read_prompts, slug


@pytest.fixture
def read(tmp_path):
    def read(name, content, form=None):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompts(path, form)

    return read


# A file's name, what is in it, and (text, seed, width, id where it is the file's own, columns, line) of each prompt.
FILES = {
    "PartiPrompts": (
        "PartiPrompts.tsv",
        "Prompt\tCategory\tChallenge\tNote\r\n"
        'a sign that says "Hi"\tWorld Knowledge\tBasic\t\r\n'
        'the word "a, b"\tAbstract\tSimple Detail\tnote\r\n',
        [
            ('a sign that says "Hi"', None, None, None, {"Category": "World Knowledge", "Challenge": "Basic"}, 2),
            ('the word "a, b"', None, None, None, {"Category": "Abstract", "Challenge": "Simple Detail"}, 3),
        ],
    ),
    "GenEval's metadata": (
        "evaluation_metadata.jsonl",
        '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n',
        [
            (
                "a photo of a bench",
                None,
                None,
                None,
                {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
                1,
            )
        ],
    ),
    "every column, in any case and order": (
        "a.csv",
        "ID,Width,PROMPT,Seed,Height,negative_Prompt\n7,64,a fox,5,32,blurry\n",
        [("a fox", 5, 64, "7", {}, 2)],
    ),
    "a byte-order mark, quotes, newlines and tabs in cells": (
        "a.csv",
        b"\xef\xbb\xbfprompt,seed\r\n" + b'"a ""red"" fox,\nin\tthe snow",3\r\n\r\nnext,4\r\n',
        [('a "red" fox,\nin\tthe snow', 3, None, None, {}, 2), ("next", 4, None, None, {}, 5)],
    ),
    "tabs and newlines in cells of a TSV file": (
        "a.tsv",
        'prompt\tseed\n"a\tb\nc"\t1\nd\t2\n',
        [("a\tb\nc", 1, None, None, {}, 2), ("d", 2, None, None, {}, 4)],
    ),
    "UTF-16 with semicolons, as a spreadsheet saves it": (
        "a.csv",
        codecs.BOM_UTF16_LE + "prompt;seed\r\nein Füchslein;8\r\n".encode("utf-16-le"),
        [("ein Füchslein", 8, None, None, {}, 2)],
    ),
    "UTF-16, big-endian": (
        "a.txt",
        codecs.BOM_UTF16_BE + "狐\n".encode("utf-16-be"),
        [("狐", None, None, None, {}, 1)],
    ),
    "blank lines and cells": (
        "a.csv",
        "\n\nprompt,seed,style\n\n,,\na,,\n  ,\nb,2,\n",
        [("a", None, None, None, {"style": ""}, 6), ("b", 2, None, None, {"style": ""}, 8)],
    ),
    "a table as pandas writes it": (
        "a.csv",
        ",prompt,seed\n0,a,1.0\n1,b,\n",
        [("a", 1, None, None, {"column 1": "0"}, 2), ("b", None, None, None, {"column 1": "1"}, 3)],
    ),
    "empty columns at the end": ("a.csv", "prompt,seed,,\na,1,,\n", [("a", 1, None, None, {}, 2)]),
    "JSON lines with text": (
        "a.ndjson",
        '{"text": "a", "seed": 3}\r\n\r\n{"prompt": "b", "text": "kept", "id": 12}\n"c"',
        [
            ("a", 3, None, None, {}, 1),
            ("b", None, None, "12", {"text": "kept"}, 3),
            ("c", None, None, None, {}, 4),
        ],
    ),
    "a line separator inside JSON": ("a.jsonl", '{"prompt": "a\u2028b"}\n', [("a\u2028b", None, None, None, {}, 1)]),
    "a JSON list": (
        "a.json",
        '[\n "a",\n\n {"prompt": "b",\n  "seed": "4"}\n]\n',
        [("a", None, None, None, {}, 2), ("b", 4, None, None, {}, 4)],
    ),
    "a prompt a line": (
        "a.txt",
        b"\xef\xbb\xbfa fox, red\r\n\r\n  prompt,seed \n\x0bb\x1cc\rd",
        [
            ("a fox, red", None, None, None, {}, 1),
            ("prompt,seed", None, None, None, {}, 3),
            ("b\x1cc", None, None, None, {}, 4),
            ("d", None, None, None, {}, 5),
        ],
    ),
    "no suffix, JSON lines": ("a", '{"prompt": "a"}', [("a", None, None, None, {}, 1)]),
    "no suffix, a JSON list": ("a", ' ["a"]', [("a", None, None, None, {}, 1)]),
    "no suffix, TSV": ("a", "id\tprompt\n1\ta\n", [("a", None, None, "1", {}, 2)]),
    "no suffix, CSV": ("a", "prompt\na\n", [("a", None, None, None, {}, 2)]),
    "no suffix, text": (
        "a",
        "a prompt, a seed\nb\n",
        [(t, None, None, None, {}, i + 1) for i, t in enumerate(["a prompt, a seed", "b"])],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, read):
    name, content, expected = FILES[case]
    prompts = read(name, content)
    for prompt, (text, seed, width, id, columns, line) in zip(prompts, expected, strict=True):
        assert (prompt.text, prompt.seed, prompt.width, prompt.line) == (text, seed, width, line)
        assert {key: value for key, value in prompt.columns.items() if key != "Note"} == columns
        assert prompt.id == (id or digest(text, prompt.negative_prompt, seed, width, prompt.height))


def test_all_columns(read):
    (prompt,) = read("a.csv", FILES["every column, in any case and order"][1])
    assert prompt == Prompt("7", "a fox", 5, "blurry", 64, 32, {}, 2)


# A file's name, what is in it, and what the error says.
BAD = {
    "an empty file": ("a.csv", "", "a.csv: there is no prompt in it"),
    "a header alone": ("a.csv", "prompt,seed\n", "there is no prompt in it"),
    "blank lines alone": ("a.txt", "\n \n", "there is no prompt in it"),
    "an empty list": ("a.json", "[]", "there is no prompt in it"),
    "no prompt column": (
        "a.csv",
        "\ntext,seed\na,1\n",
        "line 2: no column is called prompt; the header is 'text,seed'",
    ),
    "two prompt columns": ("a.csv", "Prompt,prompt\na,b\n", "line 1: two columns are called 'prompt'"),
    "two columns of one name": ("a.csv", "prompt,x,x\na,b,c\n", "line 1: two columns are called 'x'"),
    "neither prompt nor text": ("a.jsonl", '{"prompt": "a"}\n{"caption": "b"}', 'line 2: it has neither "prompt" nor'),
    "an empty prompt": ("a.csv", "prompt,seed\na,1\n ,2\n", "line 3: the prompt is empty"),
    "a prompt that is null": ("a.jsonl", '{"prompt": null}', "line 1: the prompt is empty"),
    "a prompt that is a number": ("a.jsonl", '\n{"prompt": 3}', "line 2: the prompt is not a text, it is 3"),
    "half a surrogate": ("a.jsonl", '{"prompt": "\\ud800"}', "line 1: the prompt is not valid Unicode text"),
    "a seed that is a word": (
        "a.csv",
        'prompt,seed\n"a\nb",1\nc,x\n',
        "line 4: the seed must be a whole number, got 'x'",
    ),
    "a seed below 0": ("a.csv", "prompt,seed\na,-1\n", "line 2: the seed must be a whole number, got '-1'"),
    "a negative seed in JSON": ("a.jsonl", '{"prompt": "a", "seed": -1}', "line 1: the seed must be from 0 to"),
    "a seed with a fraction": ("a.csv", "prompt,seed\na,1.5\n", "line 2: the seed must be a whole number, got '1.5'"),
    "a seed of 2^63": ("a.csv", f"prompt,seed\na,{2**63}\n", f"line 2: the seed must be from 0 to {2**63 - 1}"),
    "a seed that is true": (
        "a.jsonl",
        '{"prompt": "a", "seed": true}',
        "line 1: the seed must be a whole number, got True",
    ),
    "other digits": ("a.csv", "prompt,seed\na,٣\n", "line 2: the seed must be a whole number"),
    "width 0": ("a.csv", "prompt,width\na,0\n", "line 2: the width must be from 1 to"),
    "a height that is a list": (
        "a.json",
        '["a",\n{"prompt": "b", "height": [1]}]',
        r"line 2: the height must be .*got \[1\]",
    ),
    "an id that is a list": ("a.jsonl", '{"prompt": "a", "id": [1]}', "line 1: the id is not a text"),
    "one id, two prompts": ("a.csv", "prompt,id\na,x\nb,x\n", "line 3: the id 'x' is that of line 2 too"),
    "a comma without quotes": ("a.csv", "prompt,seed\na, b,1\n", "line 2: 3 cells, and the header has 2"),
    "a quote that is never closed": ("a.csv", 'prompt,seed\na,1\n"b,2\nc,3\n', "line 3: unexpected end of data"),
    "a quote that ends early": ("a.tsv", 'prompt\tseed\n"Hi" sign\t1\n', "line 2: .*A cell that begins with a quote"),
    "a cell beyond the reader's limit": (
        "a.csv",
        "prompt\na\n" + "b" * 200_000,
        "line 3: field larger than field limit",
    ),
    "bytes that are no UTF-8": ("a.txt", b"a\nb\n\xff\n", "line 3: it is no UTF-8 text"),
    "half a UTF-16 letter": ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", "it is no UTF-16 text"),
    "a line that is no JSON": ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: it is no JSON"),
    "NaN in JSON": ("a.jsonl", '{"prompt": NaN}', "line 1: the prompt is empty"),
    "a line that is a number": ("a.jsonl", "5", "line 1: a prompt is a string or an object, not 5"),
    "a list in a list": ("a.json", '["a",\n ["b"]]', "line 2: a prompt is a string or an object"),
    "an object in place of a list": ("a.json", '\n{"prompt": "a"}', "line 2: it is no JSON list"),
    "a list without a comma": ("a.json", '["a"\n "b"]', "line 2: it is no JSON: a comma or ]"),
    "a list without an end": ("a.json", '["a",\n"b"', "line 2: it is no JSON: a comma or ]"),
    "a list with a comma too many": ("a.json", '["a",\n]', "line 2: it is no JSON"),
    "two lists": ("a.json", '["a"]\n["b"]', "line 2: there is more after the end"),
    "a list that is nested too deeply": ("a.json", "[" * 100_000, "line 1: it is no JSON: it is nested too deeply"),
    "a number of too many digits": ("a.jsonl", '{"prompt": "a", "x": ' + "9" * 5000 + "}", "line 1: it is no JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, read):
    name, content, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        read(name, content)
    assert len(str(error.value)) < 700 and name in str(error.value)


def test_a_format_by_name(read):
    assert [prompt.text for prompt in read("a.csv", "prompt\n\nx,y", "text")] == ["prompt", "x,y"]
    with pytest.raises(ValueError, match="unknown format 'xls'; the known ones are csv, tsv, jsonl, json, text"):
        read("a.csv", "prompt\na", "xls")


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.csv")


# ---------------------------------------------------------------- repeats and ids


def test_rows_that_say_the_same_stand_once(read):
    prompts = read("a.csv", "prompt,seed,note\na,1,x\nb,1,x\na,1,x\na,1,y\na,2,x\na,1,y\n")
    assert [(each.line, each.seed, each.columns["note"]) for each in prompts] == [
        (2, 1, "x"),
        (3, 1, "x"),
        (5, 1, "y"),
        (6, 2, "x"),
    ]
    assert prompts[2].id == f"{prompts[0].id}-2" and len({each.stem for each in prompts}) == 4


def test_an_id_does_not_depend_on_the_place():
    first, second = as_prompts(["a", "b"]), as_prompts(["c", {"prompt": "b", "note": 1}, "a"])
    assert {each.text: each.id for each in first}.items() <= {each.text: each.id for each in second}.items()


def test_what_decides_the_image_decides_the_id():
    rows = [{"prompt": "a"} | more for more in ({}, {"seed": 0}, {"width": 8}, {"height": 8}, {"negative_prompt": "b"})]
    assert len({each.id for each in as_prompts(rows)}) == 5


def test_the_same_from_memory():
    frame = [{"prompt": "a", "seed": math.nan, "n": np.int64(3)}, {"prompt": "b", "seed": 4.0, "x": np.float32(0.5)}]
    prompts = as_prompts(frame)
    assert [(each.text, each.seed, each.columns) for each in prompts] == [("a", None, {"n": 3}), ("b", 4, {"x": 0.5})]
    assert as_prompts(prompts) == prompts and as_prompts(iter(prompts)) == prompts
    assert as_prompts([*prompts, "c", prompts[0]])[:2] == prompts
    json.dumps([dict(each.columns) for each in prompts])


@pytest.mark.parametrize(
    "given", ["a red fox", {"prompt": "a"}, b"a", [3], [Prompt("a", "")], [Prompt("a", "b", seed=-1)]]
)
def test_what_is_no_list_of_prompts(given):
    with pytest.raises(ValueError, match="prompts must be|line 1: (a prompt is|the prompt is empty|the seed must)"):
        as_prompts(given)


# Ids and prompts as they may come, and the file name.
STEMS = {
    "plain": ("0001", "A red fox!", "0001-a-red-fox"),
    "accents": ("x_1", "Ein Füchslein — im Schnee", "x_1-ein-fuchslein-im-schnee"),
    "no letter that ASCII has": ("a", "狐", "a-prompt"),
    "a path": ("../../etc/passwd", "/etc/../x", f"etc-passwd-{digest('../../etc/passwd')}-etc-x"),
    "another case": ("A", "a", f"a-{digest('A')}-a"),
    "dots": ("..", "..", f"{digest('..')}-prompt"),
    "control characters": ("a\0b\n", "\x1b[2J\x07", f"a-b-{digest(chr(97) + chr(0) + 'b' + chr(10))}-2j"),
    "very long": ("i" * 100_000, "p" * 100_000, f"{'i' * 27}-{digest('i' * 100_000)}-{'p' * 40}"),
}


@pytest.mark.parametrize("case", STEMS)
def test_file_names_are_never_raw_text(case):
    id, text, stem = STEMS[case]
    assert file_stem(id, text) == stem


# ---------------------------------------------------------------- any text at all

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
SEEN = TEXT.filter(lambda text: text.strip())
ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": SEEN},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "width": st.integers(1, 9999),
            "negative_prompt": TEXT,
            "note": TEXT,
        },
    ),
    min_size=1,
    max_size=5,
)
COLUMNS = ("seed", "prompt", "negative_prompt", "note", "width")


def written(rows, form):
    """A file of the rows, by the standard library's own writers."""
    if form == "json":
        return json.dumps(rows, indent=1)
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    held = io.StringIO()
    writer = csv.DictWriter(held, COLUMNS, delimiter="\t" if form == "tsv" else ",", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return held.getvalue()


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, form=st.sampled_from(["json", "jsonl", "csv", "tsv"]), mark=st.booleans())
def test_what_is_written_is_read(rows, form, mark, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any.{form}"
    path.write_bytes((codecs.BOM_UTF8 if mark else b"") + written(rows, form).encode())
    prompts = read_prompts(path)
    expected = dict.fromkeys(
        (row["prompt"], row.get("seed"), row.get("width"), row.get("negative_prompt") or None) for row in rows
    )
    assert {(each.text, each.seed, each.width, each.negative_prompt): None for each in prompts} == expected
    assert {each.columns.get("note", "") for each in prompts} == {row.get("note", "") for row in rows}
    assert len({each.stem for each in prompts}) == len(prompts)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80) | TEXT.map(str.encode), form=st.sampled_from([*FORMATS, None]))
def test_any_bytes_are_prompts_or_one_clear_error(data, form, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(data)
    try:
        prompts = read_prompts(path, form)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and ("line " in str(error) or "no prompt" in str(error))
    else:
        allowed = set(string.ascii_lowercase + string.digits + "-_")
        assert prompts and all(set(each.stem) <= allowed and len(each.stem) < 90 for each in prompts)


@settings(max_examples=200, deadline=None)
@given(one=TEXT, other=TEXT, text=TEXT)
def test_two_ids_have_two_file_names(one, other, text):
    assert (file_stem(one, text).lower() == file_stem(other, text).lower()) == (one == other)
    assert len(slug(text)) <= 40
