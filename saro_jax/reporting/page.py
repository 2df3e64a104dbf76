"""Owns the page: sections, transcripts and provenance in one HTML file that loads nothing."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from saro_jax.reporting import material
from saro_jax.reporting.material import Source
from saro_jax.reporting.tables import Section, markdown

HERE = Path(__file__).parent


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    transcripts: str,
    sources: Sequence[Source],
    made_by: dict[str, Any],
) -> str:
    """The page; every text is escaped, and only its own style and script may run (by their hash).

    Trusted Types are required as well: the script cannot turn a text into HTML even by mistake.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src 'sha256-{_hash(script)}'; "
        f"style-src 'sha256-{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(
        title=title,
        facts=facts,
        sections=sections,
        # Base64: no character of it means anything in HTML.
        transcripts=Markup(transcripts),
        sources=[shown(source) for source in sources],
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        version=made_by["saro_jax"],
        commit=(made_by["git_commit"] or "")[:10],
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def shown(source: Source) -> dict[str, Any]:
    """What the page says of a source: facts by name, its settings and its manifest as text."""
    manifest = source.manifest
    run = manifest.get("run", {})
    made_by = run.get("provenance", {})
    commit = made_by.get("git_commit")
    versions = ", ".join(
        f"{name} {made_by[name]}" for name in ("saro_jax", "jax", "python") if made_by.get(name)
    )
    facts = {
        "folder": source.place,
        "sha256 of the numbers": source.sha256,
        "began": run.get("started"),
        "seconds": run.get("wall_s"),
        "seed": manifest.get("seed"),
        "model": manifest.get("model"),
        "model's sha": manifest.get("model_sha"),
        "policy": manifest.get("policy_version"),
        "commit": f"{commit}{', with changes' * bool(made_by.get('git_dirty'))}"
        if commit
        else None,
        "versions": versions,
        "records in, out": f"{manifest['n_in']}, {manifest['n_out']}"
        if "n_in" in manifest
        else None,
        "dropped": ", ".join(f"{k}: {v}" for k, v in manifest.get("drop_reasons", {}).items()),
    }
    tree = material.settings(source)
    rest = {key: value for key, value in manifest.items() if key not in ("config",)}
    return {
        "what": source.what,
        "place": source.place,
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "")],
        "settings": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else "",
        "manifest": json.dumps(rest, indent=2, ensure_ascii=False) if rest else "",
    }


def as_markdown(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The tables of the report as Markdown; charts and transcripts are in the page alone."""
    from saro_jax.reporting.tables import escaped

    lines = [f"# {escaped(title)}", "", escaped(", ".join(f"{n} {word}" for n, word in facts)), ""]
    for section in sections:
        if not section.tables:
            continue
        lines += [f"## {escaped(section.title)}", ""]
        for table in section.tables:
            lines += [f"### {escaped(table.caption)}", "", markdown(table), ""]
            lines += [escaped(table.note), ""] if table.note else []
    return "\n".join(lines).rstrip() + "\n"
