"""The policy: the packaged one, its renderings, its version, and the errors of a user's own."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from saro_jax.data.sources import QUICKSTART
from saro_jax.records import MODES
from saro_jax.text import policy as policies
from saro_jax.text.policy import definitions, from_code, from_label, load, policy_path, render

SARO = load()


def test_the_packaged_policy_has_the_categories_of_the_specification():
    assert list(SARO.categories) == [f"P{i}" for i in range(13)]
    assert set(SARO.modes) == set(MODES)
    for category in SARO.categories.values():
        assert len(category.benign_lookalikes) >= 3
        kinds = [(rule.type, rule.mode) for rule in category.rules]
        if category.id == "P0":
            assert not kinds
            continue
        assert [rule.id for rule in category.rules[:3]] == [
            f"{category.id}.R{i}" for i in (1, 2, 3)
        ]
        assert kinds[0][0] == "hard" and kinds[1][0] == "soft" and kinds[2] == ("hard", "refuse")
        assert set(category.maps) == set(SARO.taxonomies)
    # Each name of each taxonomy belongs to a category.
    for taxonomy, names in SARO.taxonomies.items():
        for code in names:
            assert from_code(SARO, taxonomy, code), (taxonomy, code)
    assert len(SARO.taxonomies["llama_guard_2"]) == 11
    assert len(SARO.taxonomies["llama_guard_3"]) == 14
    assert len(SARO.taxonomies["alert"]) == 32


def test_codes_that_shift_between_versions_are_told_apart_by_name():
    assert from_code(SARO, "llama_guard_2", "S5") == ("P12",)
    assert from_code(SARO, "llama_guard_3", "S5") == ("P9",)
    assert from_code(SARO, "llama_guard_3", "S11") == ("P5",)
    with pytest.raises(ValueError, match="llama_guard_2 has no 'S14'"):
        from_code(SARO, "llama_guard_2", "S14")
    with pytest.raises(ValueError, match="did you mean 'llama_guard_3'"):
        from_code(SARO, "llama_guard3", "S1")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("P3", ("P3",)),
        ("Self-Harm", ("P5",)),
        ("self-harm ", ("P5",)),
        ("O4: Privacy", ("P10",)),
        ("hate_lgbtq+", ("P8",)),
        ("Cyber attacks", ("P4",)),
        ("Illicit / Criminal Behavior", ("P3", "P4", "P12", "P2", "P7")),
        ("Violence / Physical Harm", ("P1", "P2")),
        ("O6: Malicious use", ("P3", "P4", "P7", "P1")),
        ("crime_theft", ("P3",)),
        ("Other", ()),
        ("S5", ()),
    ],
)
def test_labels_of_data_sets_become_categories(label: str, expected: tuple):
    assert from_label(SARO, label) == expected


def test_the_packaged_rows_cite_rules_of_the_packaged_policy():
    for line in (QUICKSTART / "ritd.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert set(row["cats"]) <= set(SARO.categories)
        assert set(re.findall(r"P\d+\.R\d+", row["reasoning"])) <= SARO.rule_ids()


def test_rendered_whole_and_for_a_prompt():
    whole = render(SARO)
    for category in SARO.categories.values():
        assert category.name in whole and all(rule.text in whole for rule in category.rules)
    assert all(text in whole for text in SARO.global_rules.values())
    part = render(SARO, ["P4", "P10", "P4"])
    assert part.count("P4.R1") == 1 and "P10.R3" in part and "P1.R1" not in part
    assert part.index("P4.R1") < part.index("P10.R1") and "G5" in part
    assert len(part) < len(whole) / 3
    for nothing in ([], ["P0"]):
        assert render(SARO, nothing).endswith("No category of the policy concerns this request.")
    with pytest.raises(ValueError, match="unknown category 'P99'; "):
        render(SARO, ["P99"])
    assert definitions(SARO).count("\n") == 12


def test_the_version_follows_from_the_content_alone(tmp_path: Path):
    assert re.fullmatch(r"1\.0\.0\+[0-9a-f]{8}", SARO.version)
    text = policy_path("saro").read_text()
    same = tmp_path / "same.yaml"
    same.write_text("# another comment\n" + yaml.safe_dump(yaml.load(text, yaml.BaseLoader)))
    assert load(same).version == SARO.version
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("without accusation", "without any accusation"))
    assert load(other).version != SARO.version
    assert load(other).version.startswith("1.0.0+")


SMALL = """\
version: 0.1.0
modes: [comply, refuse]
global_rules:
  - {id: G1, text: Be kind.}
categories:
  - id: A1
    name: Locks
    severity: 2
    definition: Opening what is not one's own.
    rules:
      - {id: A1.R1, type: hard, mode: refuse, text: No picking.}
    benign_lookalikes: [a lock of hair]
    maps: {mine: [lock]}
taxonomies:
  mine: [lock, key]
"""


def test_a_policy_of_ones_own(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text(SMALL)
    own = load(str(file))
    assert own.rule_ids() == {"A1.R1", "G1"} and from_label(own, "LOCK") == ("A1",)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("version: 0.1.0", "version: one", ":1: the policy.version: expected a version like"),
        ("global_rules", "globals", ":3: the policy: unknown key 'globals'; did you mean 'global"),
        ("modes: [comply, refuse]", "modes: [help]", ":2: the policy.modes: expected comply or"),
        ("severity: 2", "severity: 5", ":8: the policy.categories.severity: expected 1 or 2 or"),
        ("    definition: Opening what is not one's own.\n", "", ":6: .*: lacks definition"),
        ("type: hard", "type: tough", ":11: .*type: expected hard or soft, got 'tough'"),
        ("mode: refuse", "mode: safe_complete", ":11: .*mode: expected comply or refuse, got"),
        ("id: A1.R1", "id: B1.R1", ":11: .*: a rule of A1 is called A1.R1 and so on, got 'B1.R1'"),
        ("id: A1.R1", "id: rule", ":11: .*: expected an id like P3.R1, got 'rule'"),
        ("text: No picking.", "text: ' '", ":11: .*text: expected text, got ' '"),
        ("maps: {mine: [lock]}", "maps: {mine: [lok]}", ":13: .*unknown name 'lok'; did you"),
        ("maps: {mine: [lock]}", "maps: {other: [lock]}", ":13: .*: unknown taxonomy; allowed"),
        ("benign_lookalikes: [a lock of hair]", "benign_lookalikes: no", ":12: .*expected a list"),
        ("    name: Locks", "    name: Locks\n    name: Keys", ":8: .*'name' is given twice"),
        ("G1, text: Be kind.}", "G1, text: Be kind.}\n  - {id: G1, text: x}", ":5: .*G1 is given"),
        ("severity: 2", "severity: [", r":10: not YAML: "),
    ],
)
def test_a_wrong_policy_is_refused_with_its_line(tmp_path: Path, old: str, new: str, error: str):
    file = tmp_path / "own.yaml"
    assert SMALL.count(old) == 1
    file.write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError) as found:
        load(file)
    assert re.match(f"{re.escape(str(file))}{error}", str(found.value)), found.value
    assert "\n" not in str(found.value)


def test_what_is_no_policy(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"empty\.yaml: an empty policy"):
        load(tmp_path / "empty.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"list\.yaml:1: the policy: expected keys, got a list"):
        load(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="nope: no such policy; the packaged ones are saro"):
        load("nope")


def test_a_wheels_policies_lie_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tmp_path / "site" / "saro_jax" / "text" / "policy.py"
    inside = module.parents[1] / "policies"
    for folder in (inside, tmp_path / "site" / "policies"):
        folder.mkdir(parents=True)
        (folder / "saro.yaml").write_text(SMALL)
    monkeypatch.setattr(policies, "__file__", str(module))
    assert policy_path("saro") == inside / "saro.yaml"


@pytest.mark.slow
def test_a_built_wheel_has_the_policy_and_the_text_files(tmp_path: Path):
    pytest.importorskip("hatchling")
    root = Path(policies.__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("needs a checkout")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "saro_jax/policies/saro.yaml" in names
    assert "saro_jax/configs/quickstart.yaml" in names
    assert "saro_jax/text/prompts/t1_reason_safe.txt" in names
