"""Owns how teachers are asked: the messages, replies by prompt, retries, refusals, the flip rate.

A teacher is a Generator. What refuses to reason about a prompt is replaced by the template teacher.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from saro_jax import records
from saro_jax.config import Config, SynthesizeConfig
from saro_jax.data.filters import Verdicts
from saro_jax.generation import contexts
from saro_jax.generation.contexts import Context, Example
from saro_jax.generation.requests import Generator, Request, Sample
from saro_jax.records import Journal, Prompt, Sampler
from saro_jax.text import reasoning, template
from saro_jax.text.policy import Policy
from saro_jax.text.refusal import refuses
from saro_jax.text.template_teacher import TemplateTeacher

Reply = dict[str, Any]  # {text, finish, cost, seed, attempt} and perhaps `fallback`
UNSAFE = 0.5  # probability from which a judge of answers calls one unsafe


class Function(Protocol):
    """A teacher that is a function: n replies {text, finish, cost: default 0}, or none.

    `sampler.seed` is new for each request. It is called from threads.
    """

    name: str
    origin: Any
    sha: str

    def generate(
        self, messages: Sequence[Mapping[str, str]], n: int, sampler: Sampler
    ) -> list[dict[str, Any]]: ...


class Called:
    """A Function as a Generator; at most `concurrency` calls run at a time."""

    def __init__(self, teacher: Function, concurrency: int):
        self.teacher, self.concurrency = teacher, concurrency
        self.name, self.sha = teacher.name, teacher.sha

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Each request with its samples; an error is raised after the calls that run have ended."""
        todo, failed = iter(requests), None
        running: dict[Future[list[Sample]], Request] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            while True:
                while failed is None and len(running) < self.concurrency:
                    if (request := next(todo, None)) is None:
                        break
                    running[pool.submit(self._call, request)] = request
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    request = running.pop(future)
                    if (error := future.exception()) is not None:
                        failed = failed or error
                    else:
                        yield request, future.result()
        if failed is not None:
            raise failed

    def _call(self, request: Request) -> list[Sample]:
        found = self.teacher.generate(request.messages, request.n, request.sampler)
        return [Sample(one["text"], one["finish"], cost=one.get("cost", 0.0)) for one in found]


def opened(config: Config) -> Generator:
    """The model that `synthesize.teacher` names: behind a server, or loaded here."""
    settings = config.synthesize
    if settings.teacher_url is not None:
        from saro_jax.generation.api import Api

        assert settings.teacher_model is not None  # the tree's check
        return Api(settings.teacher_url, settings.teacher_model, config.server)
    from saro_jax.generation import local  # JAX, which a server makes needless

    own = settings.teacher == "self" and settings.teacher_model is None
    return local.load(
        config.model.path if own else settings.teacher_model,
        revision=config.model.revision if own else None,
        slots=settings.concurrency,
    )


class Asking:
    """The requests of one run to its teacher, each journalled in OUT as soon as it is answered."""

    def __init__(
        self,
        teacher: Generator,
        policy: Policy,
        settings: SynthesizeConfig,
        seed: int,
        out: Path,
        progress: bool,
        examples: Sequence[Example] = (),
    ):
        self.teacher, self.policy, self.settings = teacher, policy, settings
        self.examples, self.context = examples, contexts.given(settings)
        self.seed, self.out, self.progress = seed, out, progress
        self.too_long: dict[str, str] = {}  # by request: why a teacher run here can not be asked
        self.costs: dict[str, float] = {}  # by request, those of earlier runs too
        self.sampler = Sampler(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
        )

    def key(self, spare: TemplateTeacher) -> dict[str, Any]:
        """All that a reply depends on beside the prompt.

        Filters are not among it, so that a change of theirs costs no new request.
        """
        names = ("t1_reason_safe", "t2_reason_general")
        files = [(template.FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in names]
        return {
            "teacher": self.teacher.name,
            "sha": self.teacher.sha,
            "spare": spare.sha,
            "sampler": self.sampler.model_dump(mode="json"),
            "n": self.settings.n,
            "retries": self.settings.retries,
            "context": vars(self.context),
            "search": self.settings.search,
            "examples": contexts.digest(self.examples),
            "policy_version": self.policy.version,
            "seed": self.seed,
            "templates": records.sha256("".join(files)),
        }

    def journal(self, spare: TemplateTeacher) -> Journal:
        """The journal of this work in OUT."""
        key = self.key(spare)
        name = f"replies-{records.sha256(records.to_json(key))[:12]}.jsonl"
        return Journal(self.out / "journal" / name, key)

    def replies(
        self, prompts: Sequence[Prompt], spare: TemplateTeacher, journal: Journal
    ) -> dict[str, list[Reply]]:
        """The teacher's replies by prompt; those that do not parse are among them.

        Of a prompt whose replies do not parse as many are asked for again, with another seed. A
        teacher that only refuses is replaced by `spare`, whose replies have a `fallback`.
        """
        # A prompt's categories and answer are part of what is asked.
        ids = {one.id: records.content_id(one.model_dump(mode="json")) for one in prompts}
        found: dict[str, list[Reply]] = {prompt.id: [] for prompt in prompts}
        wanted = dict.fromkeys(found, self.settings.n)
        for attempt in range(1 + self.settings.retries):
            todo = [one for one in prompts if wanted[one.id]]
            requests = [
                self._request(f"{ids[one.id]}:{attempt}", one, attempt, wanted[one.id])
                for one in todo
            ]
            made = self.answers(requests, journal, "teacher" if not attempt else "again")
            for prompt, request in zip(todo, requests, strict=True):
                replies = made.get(request.id, [])
                seed = request.sampler.seed
                found[prompt.id] += [one | {"seed": seed, "attempt": attempt} for one in replies]
                # What a server holds back once it holds back again.
                wanted[prompt.id] = sum(
                    not well_formed(one) and one["finish"] != "filter" for one in replies
                )
        for prompt in prompts:
            if refused(prompt, found[prompt.id]):
                own = self._seed(prompt, "spare")
                asked = self._asked(prompt, Context())
                sampler = self.sampler.model_copy(update={"seed": own})
                extra = spare.generate(asked, self.settings.n, sampler)
                found[prompt.id] += [
                    one | {"seed": own, "attempt": 0, "fallback": spare.name} for one in extra
                ]
        return found

    def flips(
        self,
        prompts: Sequence[Prompt],
        journal: Journal,
        risk: Verdicts | None,
        tried: Sequence[Context],
    ) -> list[dict[str, Any]]:
        """How often the policy in context makes a safe answer of an unsafe one (OPSA), by context.

        P(safe with it | unsafe without it) over prompts that are harmful, both greedy. Unsafe is
        what `risk` says, or, without it, an answer that does not refuse. `rate` is None where the
        model without policy gave no unsafe answer.
        """
        greedy = self.sampler.model_copy(update={"temperature": 0.0, "seed": 0})

        def requests(how: str, context: Context | None) -> list[Request]:
            return [
                Request(
                    f"{how}:{records.content_id(one.model_dump(mode='json'))}",
                    tuple(
                        [{"role": "user", "content": one.text}]
                        if context is None
                        else self._asked(one, context)
                    ),
                    greedy,
                )
                for one in prompts
            ]

        plain = requests("plain", None)
        told = [requests(f"told:{records.content_id(vars(context))}", context) for context in tried]
        every = [*plain, *(one for asked in told for one in asked)]
        made = self.answers(every, journal, "flip rate")

        def unsafe(requests: Sequence[Request]) -> list[bool]:
            texts = [(made.get(one.id) or [{"text": ""}])[0]["text"] for one in requests]
            answers = [reasoning.parse(text).answer for text in texts]
            if risk is None:
                return [bool(one.strip()) and not refuses(one) for one in answers]
            pairs = [(p.text, one) for p, one in zip(prompts, answers, strict=True)]
            # An invalid verdict is not a safe one.
            return [score is None or score >= UNSAFE for score in risk(pairs)]

        bare = unsafe(plain)
        found = []
        for context, asked in zip(tried, told, strict=True):
            after = unsafe(asked)
            flipped = [not now for before, now in zip(bare, after, strict=True) if before]
            found.append(
                {
                    **vars(context),
                    "prompts": len(prompts),
                    "unsafe_without_policy": sum(bare),
                    "safe_with_policy": sum(flipped),
                    "rate": round(sum(flipped) / len(flipped), 4) if flipped else None,
                    "judged_by": "refusal rules" if risk is None else "judge of answers",
                }
            )
        return found

    def answers(
        self, requests: Sequence[Request], journal: Journal, doing: str
    ) -> dict[str, list[Reply]]:
        """{text, finish, cost} of each request, from the journal where it is there."""
        requests = list({one.id: one for one in requests}.values())
        todo = self._fitting([one for one in requests if one.id not in journal.values])
        bar = tqdm(
            total=len(requests),
            initial=len(requests) - len(todo),
            unit="request",
            desc=doing,
            disable=not self.progress,
        )
        partial: dict[str, list[Reply]] = {name: [] for name in self.too_long}
        failures: Mapping[str, str] = getattr(self.teacher, "failures", {})
        with bar:
            for request, samples in self.teacher.generate(todo):
                bar.update(1)
                made = [{"text": s.text, "finish": s.finish, "cost": s.cost} for s in samples]
                if request.id in failures:  # the next run asks for what is missing
                    partial[request.id] = made
                else:
                    journal.append(request.id, made)
        why = {**failures, **self.too_long}
        if requests and all(one.id in why for one in requests) and not any(partial.values()):
            raise ValueError(f"{self.teacher.name}: no request succeeded: {why[requests[0].id]}")
        known = journal.values
        found = partial | {one.id: known[one.id] for one in requests if one.id in known}
        self.costs |= {name: sum(one["cost"] for one in made) for name, made in found.items()}
        return found

    def why_none(self, prompt: Prompt) -> str:
        """Why a prompt has no reply."""
        name = records.content_id(prompt.model_dump(mode="json"))
        failures: Mapping[str, str] = getattr(self.teacher, "failures", {})
        why = {**failures, **self.too_long}
        return why.get(f"{name}:0", "the teacher had none")

    def _fitting(self, requests: Sequence[Request]) -> list[Request]:
        """Those that a teacher run here has room for; the others go to `too_long` with why."""
        check = getattr(self.teacher, "job", None)
        if check is None:
            return list(requests)
        fitting = []
        for request in requests:
            try:
                check(request)
                fitting.append(request)
            except ValueError as error:
                self.too_long[request.id] = str(error).removeprefix(f"{request.id}: ")
        return fitting

    def _request(self, name: str, prompt: Prompt, attempt: int, n: int) -> Request:
        return Request(
            name,
            tuple(self._asked(prompt, self.context)),
            self.sampler.model_copy(update={"seed": self._seed(prompt, attempt)}),
            n,
        )

    def _asked(self, prompt: Prompt, context: Context) -> list[dict[str, str]]:
        return contexts.messages(prompt, self.policy, context, self.examples)

    def _seed(self, prompt: Prompt, attempt: int | str) -> int:
        return int(records.sha256(f"{self.seed}:{prompt.id}:{attempt}")[:8], 16)


def refused(prompt: Prompt, replies: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all that a teacher, or its server's filter, did with a prompt is to refuse it."""
    if not replies or prompt.kind == "benign" or any(well_formed(one) for one in replies):
        return False
    return all(
        one["finish"] == "filter" or refuses(reasoning.parse(one["text"]).answer) for one in replies
    )


def well_formed(reply: Mapping[str, Any]) -> bool:
    """Whether a reply ended by itself and parses."""
    return reply["finish"] in ("eos", "stop") and reasoning.parse(reply["text"]).status == "ok"
