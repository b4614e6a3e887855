"""What the README says of diffusers' pipelines: its table, which this file prints where it is run, and its example."""

import re
from pathlib import Path

import diffusers
import torch
from tiny_diffusers import MAKE, brightness, make

from ses_fast.pipelines.diffusers.family import FAMILIES, denoisers_of

README = Path(__file__).parents[1] / "README.md"
HEAD = ("diffusers' class", "previews", "race", "half size", "`Preview(cfg=False)` sets", "`compile=True`")


def lines() -> list[str]:
    pipes = {type(pipe).__name__: pipe for pipe in (make(name).pipe for name in MAKE)}
    rows = []
    for name, family in sorted(FAMILIES.items()):
        refused = ", ".join(f"`{argument}`" for argument in family.counts_steps)
        compiled = all(getattr(denoiser, "_repeated_blocks", None) for denoiser in denoisers_of(pipes[name]))
        row = (
            f"`{name}`",
            "together" if family.together else "one by one",
            f"not with {refused}" if refused else "yes",
            "yes",
            f"`{family.guidance}={family.unguided}`",
            "yes" if compiled else "no",
        )
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)]


def test_the_readme_has_a_row_for_every_class():
    assert "\n".join(lines()) in README.read_text(), "run this file, and put what it prints into README.md"


def test_the_example_runs_as_it_is_shown(monkeypatch, tmp_path):
    """With small weights in place of SDXL's, and fewer previews."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "import diffusers" in block]
    for shown, small in (("30", "3"), ("50", "3"), ("10)", "2)"), ('.to("cuda")', "")):
        assert shown in example
        example = example.replace(shown, small)
    asked = []

    def from_pretrained(source, torch_dtype):
        asked.append((source, torch_dtype))
        return make("SDXL").pipe

    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr("ses_fast.rewards.load_reward", lambda *names, **options: brightness)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), names := {})
    assert asked == [("stabilityai/stable-diffusion-xl-base-1.0", torch.float16)]
    assert names["pipe"].ses_result.evaluations == 3 and Path("fox.png").exists()


if __name__ == "__main__":
    print("\n".join(lines()))
