"""The project's own jailbreak wrappers: disguises around a request, some held out."""

import base64
import codecs
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).parent / "wrappers.yaml"
LEET = str.maketrans("aeiostAEIOST", "431057431057")
ENCODINGS = {
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "leet": lambda text: text.translate(LEET),
    "reversed": lambda text: " ".join(reversed(text.split())),
    "spaced": lambda text: "  ".join(" ".join(word) for word in text.split()),
}


@dataclass(frozen=True)
class Wrapper:
    """One disguise: `frame` is what reasoning calls it; held-out families never train a model."""

    id: str
    family: str
    frame: str
    text: str
    encode: str | None = None
    held_out: bool = False

    def around(self, request: str) -> str:
        """The request in its disguise."""
        if self.encode:
            return self.text.replace("{encoded}", ENCODINGS[self.encode](request))
        return self.text.replace("{request}", request)


@cache
def load() -> tuple[Wrapper, ...]:
    """The packaged wrappers, in the order of their file."""
    return tuple(Wrapper(**one) for one in yaml.safe_load(FILE.read_text(encoding="utf-8")))


def by_id(template_id: str) -> Wrapper | None:
    """The packaged wrapper of that id."""
    return next((one for one in load() if one.id == template_id), None)


def choose(count: int, *, held_out: bool, rng: random.Random) -> Sequence[Wrapper]:
    """`count` different wrappers, families before members; fewer where there are no more."""
    families: dict[str, list[Wrapper]] = {}
    for one in load():
        if one.held_out == held_out:
            families.setdefault(one.family, []).append(one)
    order = [members for _, members in sorted(families.items())]
    rng.shuffle(order)
    for members in order:
        rng.shuffle(members)
    rounds = range(max((len(members) for members in order), default=0))
    return [members[i] for i in rounds for members in order if i < len(members)][:count]
