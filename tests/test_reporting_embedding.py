"""Embeddings: which maps and which pairs of groups are drawn where there are too many."""

import pytest
import report_folders

from saro_jax.analysis import results
from saro_jax.reporting import embedding


@pytest.fixture(scope="module")
def analysis(tmp_path_factory) -> results.Analysis:
    folder = tmp_path_factory.mktemp("analysis")
    report_folders.write_analysis(folder, layers=3)
    return results.read(folder)


def test_every_model_is_seen_before_a_second_seed(analysis):
    maps = [
        one.model_copy(update={"seed": seed, "method": "tsne", "layer": layer})
        for one in analysis.maps
        for layer in range(3)
        for seed in range(3)
    ]
    shown = embedding.chosen(maps)
    assert len(shown) == embedding.MOST_MAPS
    assert {(one.model, one.layer) for one in shown if one.seed == 0} == {
        (model, layer) for model in report_folders.MODELS for layer in range(3)
    }
    section = embedding.section(
        analysis.model_copy(update={"maps": tuple(maps)}), report_folders.MODELS.index
    )
    assert "15 more maps" in section.intro


def test_pairs_of_harmful_and_harmless_come_first(analysis):
    figures = embedding.section(analysis, report_folders.MODELS.index).figures
    apart = [one.title for one in figures if "apart" in one.title]
    assert apart == [
        "harmful and benign: apart by layer",
        "harmful and jailbreak: apart by layer",
    ]


def test_the_table_has_every_overlap(analysis):
    section = embedding.section(analysis, report_folders.MODELS.index)
    (table,) = section.tables
    assert len(table.rows) == len(analysis.overlap)
    first, row = analysis.overlap[0], table.rows[0]
    assert [cell.text for cell in row[:4]] == ["base", "0", "harmful / benign", "60 / 60"]
    assert row[4].text == f"{100 * first.c2st:.1f}\u202f%"
