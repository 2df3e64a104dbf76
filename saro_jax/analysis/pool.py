"""Pool: the prompts of an analysis by group, disguises among them, as many of each as wanted."""

from collections.abc import Sequence
from dataclasses import dataclass

from saro_jax.data import prompts as pool
from saro_jax.records import Prompt, Reject, sha256

GROUPS = ("harmful", "jailbreak", "benign", "borderline", "wrapped")


@dataclass(frozen=True)
class Asked:
    """A prompt with its group, and the request that it was made from."""

    id: str
    group: str
    base: str
    text: str


def group_of(kind: str, disguised: bool) -> str:
    """The group: the kind, or `wrapped` for harmless prompts in a disguise."""
    return "wrapped" if disguised and kind in ("benign", "borderline") else kind


def choose(
    prompts: Sequence[Prompt], per_group: int, jailbreaks: float, wrapped: float, seed: int
) -> tuple[list[Asked], list[Reject]]:
    """At most `per_group` prompts of each group, and the rest; disguises are those of chosen ones.

    Disguises are made with the wrappers that no training pool uses. A draw follows from the seed
    and the prompt alone.
    """
    held_out = [one.model_copy(update={"split": "test"}) for one in prompts]
    clean, rejects = _few(held_out, per_group, seed)
    shares = {"harmful": jailbreaks, "benign": wrapped, "borderline": wrapped}
    seen = {one.id for one in clean}
    made = {one.id: one for one in pool.wrapped(clean, shares, seed) if one.id not in seen}
    chosen, more = _few([*clean, *made.values()], per_group, seed)
    asked = [Asked(one.id, _group(one), pool.group(one), one.text) for one in chosen]
    return sorted(asked, key=lambda one: GROUPS.index(one.group)), rejects + more


def _few(prompts: Sequence[Prompt], per_group: int, seed: int) -> tuple[list[Prompt], list[Reject]]:
    keep: set[str] = set()
    for name in GROUPS:
        mine = [one.id for one in prompts if _group(one) == name]
        keep |= set(sorted(mine, key=lambda found: sha256(f"{seed}:{found}"))[:per_group])
    rest = [Reject(one.id, "not drawn") for one in prompts if one.id not in keep]
    return [one for one in prompts if one.id in keep], rest


def _group(prompt: Prompt) -> str:
    return group_of(prompt.kind, prompt.attack is not None)
