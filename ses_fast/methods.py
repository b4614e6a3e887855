"""What `ses-fast compare` compares: a line each, to be added and deleted freely."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .pipelines import Preview, SESConfig
from .strategies import STRATEGIES


@dataclass(frozen=True)
class Method:
    """A way to find an image for a prompt."""

    name: str
    what: str
    strategy: str | None = "ses"  # None: without a search
    level: int | str = "auto"
    steps: float = 1.0  # of a preview, as a share of the image's
    preview: Preview = Preview()
    batch_size: int | str = "auto"
    popsize: int = 10
    k_elites: int = 5
    wavelet: str = "db1"
    documented: bool = False  # the installed ses_search in the documented flow
    scores_of: str | None = None  # the method whose answers it gives, up to rounding: only its time is its own

    def shows_its_image(self, budgets: Sequence[int]) -> bool:
        """Whether the best preview at each of the budgets is the final image already."""
        cheap = self.preview
        if self.steps != 1 or cheap.scale != 1 or not cheap.cfg or cheap.refine:
            return False
        # A race's generation that ends early is another race.
        return cheap.race is None or all(budget % self.popsize == 0 for budget in budgets)

    @staticmethod
    def of(config: SESConfig, steps: float, name: str, what: str) -> "Method":
        """A search with these settings; steps: as above. Raises ValueError for settings that no comparison has."""
        compared = {"popsize", "k_elites", "wavelet_name", "dwt_level", "strategy", "preview", "batch_size"}
        usual = SESConfig()
        others = [f.name for f in fields(SESConfig) if f.name not in compared | {"progress", "backend"}]
        if changed := [each for each in others if getattr(config, each) != getattr(usual, each)]:
            raise ValueError(f"a comparison has its own {', '.join(changed)}: leave it out of the settings")
        return Method(
            name,
            what,
            strategy=config.strategy,
            level=config.dwt_level,
            steps=steps,
            preview=config.preview,
            batch_size=config.batch_size,
            popsize=config.popsize,
            k_elites=config.k_elites,
            wavelet=config.wavelet_name,
        )


NOTHING = Method("no search", "the seed's own noise", strategy=None)
REFERENCE = Method(
    "reference", "the installed ses_search in the documented flow, one preview at a time", documented=True
)
SES = Method("ses", "the reference's search, batched")
RANDOM = Method("random", "best of N whole noises", strategy="random")
CONTROLS = (
    Method("cem whole noise", "the reference's search of all numbers", level=0),
    Method("cem high band", "the reference's search of as many high ones (a control)", strategy="high_band"),
    Method("zero-order", "neighbours of the best at one distance", strategy="zero_order"),
)

_KNOWN = {"ses", "random", "high_band", "zero_order"}
OTHERS = tuple(Method(name, f"strategy {name}", strategy=name) for name in STRATEGIES if name not in _KNOWN)

# Best of N with cheap drafts and refinement: the scheme of Flash-BoN (arXiv 2607.04461) with what is here.
DRAFTS = (
    Method("best of N raced", "whole noises in a race", strategy="random", preview=Preview(race="auto")),
    Method(
        "best of N drafts",
        "whole noises in half the steps, the best 3 in full",
        strategy="random",
        steps=0.5,
        preview=Preview(refine=3),
    ),
)
# The default's own search with cheaper previews: of one kind, of several, and of those with one left out.
CHEAP = (
    replace(SES, name="+ race", what="ses, raced", preview=Preview(race="auto")),
    replace(SES, name="+ scale", what="ses, half the size, the best 3 in full", preview=Preview(2, refine=3)),
    replace(SES, name="+ refine", what="ses, half the steps, the best 3 in full", steps=0.5, preview=Preview(refine=3)),
    replace(
        SES,
        name="+ race + refine",
        what="ses, half the steps, raced, the best 3 in full",
        steps=0.5,
        preview=Preview(race="auto", refine=3),
    ),
    replace(SES, name="+ no guidance", what="ses, previews without guidance", preview=Preview(cfg=False)),
)
MIX = replace(
    SES, name="mix", what="ses, half the size, raced, the best 3 in full", preview=Preview(2, "auto", refine=3)
)
PARTS = {
    "batches and linears": replace(MIX, name="mix - batches", what="one by one", batch_size=1, scores_of="mix"),
    "strategy": replace(MIX, name="mix - strategy", what="whole noises at random", strategy="random"),
    "race": replace(MIX, name="mix - race", what="no race", preview=Preview(2, refine=3)),
    "scale": replace(MIX, name="mix - scale", what="full size", preview=Preview(race="auto", refine=3)),
    "refine": replace(MIX, name="mix - refine", what="no refinement", preview=Preview(2, "auto")),
}

METHODS = {
    method.name: method
    for method in (NOTHING, REFERENCE, RANDOM, SES, *CONTROLS, *OTHERS, *DRAFTS, *CHEAP, MIX, *PARTS.values())
}
BASIS = (NOTHING, REFERENCE, RANDOM, SES)
# Names that stand for several.
GROUPS = {
    "usual": (*BASIS, *CONTROLS, *(METHODS[name] for name in ("two_stage", "best_both", "pcn")), *DRAFTS, *CHEAP, MIX),
    "strategies": (*BASIS, *CONTROLS, *OTHERS),
    "parts": (*BASIS, MIX, *PARTS.values()),
    "quick": (*BASIS, METHODS["two_stage"], METHODS["best of N raced"], MIX),
    "all": tuple(METHODS.values()),
}


def is_default(method: Mapping[str, Any]) -> bool:
    """Whether a method, a dict as `asdict` makes it, is the documented call without any setting, with full previews."""
    usual = asdict(Method.of(SESConfig(), 1.0, "", ""))
    return all(method[key] == value for key, value in usual.items() if key not in ("name", "what"))


def named(names: Sequence[str]) -> tuple[str, ...]:
    """The methods' names in the table's order, with those that a name of GROUPS stands for; unknown ones come last."""
    wanted = {each for name in names for each in ([m.name for m in GROUPS[name]] if name in GROUPS else [name])}
    return (*(name for name in METHODS if name in wanted), *sorted(wanted - METHODS.keys()))
