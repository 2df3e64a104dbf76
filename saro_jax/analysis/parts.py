"""Parts: what an analysis computes of one model, and keeps in the journal, part by part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from saro_jax import records
from saro_jax.analysis import (
    depth,
    likelihood,
    linear,
    maps,
    margins,
    overlap,
    pool,
    probes,
    reflections,
    states,
)
from saro_jax.analysis.pool import GROUPS, Asked
from saro_jax.analysis.results import END, PROMPT, Map, Method, Point
from saro_jax.config import Config
from saro_jax.data.packing import round_up
from saro_jax.data.rows import PreferenceRow
from saro_jax.evaluation.results import Transcript
from saro_jax.generation.local import Local
from saro_jax.models import huggingface, peft
from saro_jax.records import Journal, Reject
from saro_jax.text import chat

T = TypeVar("T", Asked, reflections.Tampered)


@dataclass(frozen=True)
class Model:
    """A model by its name: its folder, adapters beside it, and the hash of its weights."""

    name: str
    folder: Path
    adapter: Path | None
    sha: str


def depths(text: str) -> list[int]:
    """The counts of tokens that analyse.depth names."""
    try:
        found = [int(part) for part in text.split(":")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"analyse.depth={text}: expected different counts >= 0 like 0:1:2:4:8")
    return found


def compute(
    config: Config,
    model: Model,
    asked: Sequence[Asked],
    preferred: Sequence[PreferenceRow],
    answered: Sequence[tuple[Transcript, str]],
    journal: Journal,
    progress: bool,
) -> dict[str, list[Any]]:
    """All results of a model; those that the journal holds are not computed again."""
    work: dict[str, Callable[..., dict[str, list[Any]]]] = {}
    usable = [one for one, reason in answered if not reason]
    tampered = reflections.tampered([one for one, _ in answered], config.seed)
    if asked:
        work["prompts"] = partial(of_prompts, config, model, asked, bool(usable))
    attacked = _drawn([one for one in asked if one.group == "harmful"], config, "depth")
    if attacked:
        work["depth"] = partial(of_depth, config, model, attacked)
    if preferred:
        work["pairs"] = partial(of_pairs, config, model, preferred)
    if usable:
        work["transcripts"] = partial(of_transcripts, config, model, usable)
    changed = [
        one
        for test in reflections.TESTS
        for one in _drawn([one for one in tampered if one.test == test], config, test)
    ]
    if changed:
        work["reflections"] = partial(of_reflections, config, model, changed)
    found: dict[str, list[Any]] = {}
    loaded: tuple[Any, Any, Any] | None = None
    for part, of_part in work.items():
        place = f"{model.name}:{part}"
        if place not in journal.values:
            loaded = loaded or _load(config, model)
            with tqdm(desc=f"{model.name}: {part}", unit="text", disable=not progress) as bar:
                done = of_part(*loaded, bar.update)
            journal.append(
                place,
                {name: [_plain(one) for one in made] for name, made in done.items()},
            )
        for name, made in journal.values[place].items():
            found.setdefault(name, []).extend(made)
    return found


def model_at(name: str, path: str) -> Model:
    """The model of a folder, adapter folder, .gguf file or Hub id."""
    folder, adapter = peft.resolve(path)
    sha = huggingface.weights_hash(folder)
    if adapter is not None:
        own = [records.file_sha256(adapter / one) for one in (peft.CONFIG, peft.WEIGHTS)]
        sha = records.sha256(" ".join([sha, *own]))
    return Model(name, folder, adapter, sha)


def _plain(one: Any) -> dict[str, Any]:
    return vars(one) if isinstance(one, Reject) else one.model_dump(mode="json")


def _load(config: Config, model: Model) -> tuple[Any, Any, Any]:
    arch = huggingface.load_architecture(model.folder)
    tokenizer = chat.load_tokenizer(model.folder, config.model.chat_template)
    return (
        arch,
        peft.load_params(model.folder, model.adapter, arch, jnp.dtype(config.model.dtype)),
        tokenizer,
    )


def of_prompts(
    config: Config,
    model: Model,
    asked: Sequence[Asked],
    has_transcripts: bool,
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """Overlap, maps and probes of states at the ends of the prompts."""
    settings = config.analyse
    texts = []
    for one in asked:
        try:
            texts.append(states.prompt_end(tokenizer, one.text))
        except ValueError as error:
            raise ValueError(f"--prompts: {one.id}: {error}") from None
    read = _read(config, arch, params, texts, tell)
    states_NLD = np.stack([one[:, 0] for one in read])
    groups = _rows([one.group for one in asked])
    bases = [one.base for one in asked]
    layers = _layers(arch.num_layers, settings.layer_step)
    tokens = np.array([len(text.ids) for text in texts])
    compared = overlap.compare(
        model.name,
        states_NLD,
        groups,
        bases,
        tokens,
        layers=layers,
        seed=config.seed,
        permutations=settings.permutations,
    )
    probed = []
    if not has_transcripts:  # else those of the transcripts, at all positions
        probed = probes.compare(
            model.name, PROMPT, states_NLD, groups, bases, layers=layers, seed=config.seed
        )
    pictures = []
    for layer in sorted({arch.num_layers // 2, arch.num_layers}):
        x_ND = linear.standardised(states_NLD[:, layer])
        drawn: list[tuple[Method, int, np.ndarray]] = [("pca", 0, maps.pca(x_ND)[0])]
        for seed in range(config.seed, config.seed + settings.tsne_seeds):
            drawn.append(("tsne", seed, maps.tsne(x_ND, seed)))
        for method, seed, y_N2 in drawn:
            points = tuple(
                Point(id=one.id, kind=one.group, x=round(float(x), 3), y=round(float(y), 3))
                for one, (x, y) in zip(asked, y_N2, strict=True)
            )
            pictures.append(
                Map(model=model.name, layer=layer, method=method, seed=seed, points=points)
            )
    return {"overlap": compared, "maps": pictures, "probes": probed}


def of_transcripts(
    config: Config,
    model: Model,
    answered: Sequence[Transcript],
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """Probes after each reasoning step of the model's own answers."""
    settings = config.analyse
    texts, kept, left_out = [], [], []
    for one in answered:
        steps = [step.text for step in one.steps if step.text.strip()]
        try:
            text = states.step_ends(tokenizer, one.prompt, one.response, steps)
        except ValueError as error:  # a model may write control tokens
            left_out.append(Reject(one.id, f"not rendered: {error}", model.name))
            continue
        if len(text.ids) <= settings.row_length:
            texts.append(text)
            kept.append(one)
        else:
            reason = f"too long: {len(text.ids)} tokens, analyse.row_length={settings.row_length}"
            left_out.append(Reject(one.id, reason, model.name))
    read = _read(config, arch, params, texts, tell)
    layers = _layers(arch.num_layers, settings.layer_step)
    found = []
    names = [PROMPT, *(f"step {i + 1}" for i in range(settings.steps)), END]
    for number, position in enumerate(names):
        at = -1 if position == END else number
        have = [i for i, one in enumerate(read) if position == END or one.shape[1] > number]
        if not have:
            continue
        states_NLD = np.stack([read[i][:, at] for i in have])
        groups = _rows([pool.group_of(kept[i].kind, kept[i].attack is not None) for i in have])
        found += probes.compare(
            model.name,
            position,
            states_NLD,
            groups,
            [kept[i].base_id for i in have],
            layers=layers,
            seed=config.seed,
        )
    return {"probes": found, "rejects": left_out}


def of_pairs(
    config: Config,
    model: Model,
    preferred: Sequence[PreferenceRow],
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """Log-probs of the pairs, and likelihoods of their answers after different reasoning."""

    def score(rows: Sequence[PreferenceRow]) -> dict[str, likelihood.Scores]:
        return likelihood.score(
            arch,
            params,
            tokenizer,
            rows,
            row_length=round_up(config.analyse.row_length, 64),
            dtype=config.model.dtype,
            progress=tell,
        )

    scored = score(preferred)
    scores = [
        margins.Scored(
            model=model.name, id=row.id, kind=row.kind, chosen=mine.chosen, rejected=mine.rejected
        )
        for row in preferred
        if (mine := scored.get(row.id)) is not None
    ]
    left_out = [
        Reject(row.id, f"too long: of analyse.row_length={config.analyse.row_length}", model.name)
        for row in preferred
        if row.id not in scored
    ]
    found: dict[str, list[Any]] = {"scores": scores, "rejects": left_out}
    given = likelihood.cases(preferred)
    if not given:
        return found
    after = {
        name: score(likelihood.in_context(given, before))
        for name, before in likelihood.contexts(given, config.seed).items()
    }
    return found | {"likelihood": likelihood.gains(model.name, after, given, config.seed)}


def of_depth(
    config: Config,
    model: Model,
    asked: Sequence[Asked],
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """How often harmful prompts are answered after a prefilled opening."""
    curve = depth.curve(
        _generator(config, model, arch, params, tokenizer),
        tokenizer,
        asked,
        depths(config.analyse.depth),
        max_new_tokens=config.analyse.max_new_tokens,
        seed=config.seed,
        progress=tell,
    )
    return {"depth": curve}


def of_reflections(
    config: Config,
    model: Model,
    changed: Sequence[reflections.Tampered],
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """What becomes of answers after their reflections were changed."""
    left_out, asked = [], []
    for one in changed:
        try:
            chat.prompt_ids(tokenizer, (chat.Message("user", one.transcript.prompt),), one.prefix)
            asked.append(one)
        except ValueError as error:
            left_out.append(Reject(one.id, f"not rendered: {error}", model.name))
    responses = reflections.continued(
        _generator(config, model, arch, params, tokenizer),
        asked,
        max_new_tokens=config.analyse.max_new_tokens,
        tries=config.analyse.tries,
        seed=config.seed,
        progress=tell,
    )
    left_out += [
        Reject(one.id, f"a marker came again: in {config.analyse.tries} tries", model.name)
        for one in asked
        if one.id not in responses
    ]
    left_out += [
        Reject(name, f"no answer: within {config.analyse.max_new_tokens} tokens", model.name)
        for name, response in responses.items()
        if not reflections.answered(response)
    ]
    found = reflections.compare(model.name, asked, responses, config.seed)
    return {"authenticity": found, "rejects": left_out}


def _generator(config: Config, model: Model, arch: Any, params: Any, tokenizer: Any) -> Local:
    return Local(
        arch,
        params,
        tokenizer,
        name=model.name,
        sha=model.sha,
        dtype=config.model.dtype,
        slots=config.analyse.batch_size,
    )


def _drawn(given: Sequence[T], config: Config, test: str) -> list[T]:
    """As many as analyse.prompts says, drawn by the seed, in their order."""
    order = sorted(given, key=lambda one: records.sha256(f"{config.seed}:{test}:{one.id}"))
    keep = {one.id for one in order[: config.analyse.prompts]}
    return [one for one in given if one.id in keep]


def _read(config: Config, arch: Any, params: Any, texts: Any, tell: Any) -> list[np.ndarray]:
    return states.read(
        arch,
        params,
        texts,
        row_length=round_up(config.analyse.row_length, 64),
        dtype=config.model.dtype,
        progress=tell,
    )


def _rows(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Indices by group, in the order of GROUPS."""
    array = np.array(names)
    return {name: rows for name in GROUPS if len(rows := np.flatnonzero(array == name))}


def _layers(count: int, step: int) -> list[int]:
    """The embedding, every `step`-th layer, and the last."""
    return sorted({*range(0, count, step), count})
