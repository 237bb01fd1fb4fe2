"""The Grafana dashboard shows what a daemon has, and can be imported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from infer_requests import models, serving
from prometheus_client.parser import text_string_to_metric_families
from serving_fakes import ask

from splitlearn_manager.client import RemoteTrunk

FILE = Path(__file__).parents[2] / "configs" / "grafana" / "splitlearn.json"

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
OF_PROMETHEUS = {"instance", "job", "le"}
ROWS = ["Health", "Models", "Sessions", "Batching", "Cache memory", "Infer", "Text", "Host"]

SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads(FILE.read_text("utf-8"))


@pytest.fixture(scope="module")
def exposed(tiny_checkpoint: Any) -> dict[str, set[str]]:
    """Return the metrics of a daemon that has worked, with the labels of those that have values."""
    with serving(models(tiny_checkpoint, "float32")[1:2]) as url:
        with RemoteTrunk(url, "trunk-float32") as trunk, torch.inference_mode():
            trunk(torch.ones(1, 3, 32))
        ask(url, "/v2/models/trunk-float32/infer", "POST", b"{}")
        text = ask(url, "/metrics").body.decode()
    return {
        family.name + suffix: {label for sample in family.samples for label in sample.labels}
        for family in text_string_to_metric_families(text)
        for suffix in SUFFIXES.get(family.type, ("",))
    }


def charts(dashboard: Any) -> list[Any]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: Any) -> list[str]:
    return [target["expr"] for panel in charts(dashboard) for target in panel["targets"]]


def plain(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


def test_every_metric_in_it_is_one_that_a_daemon_has(
    dashboard: Any, exposed: dict[str, set[str]]
) -> None:
    queries = [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    named = [found for text in expressions(dashboard) for found in SELECTOR.findall(text)]

    assert {name for name, _ in named} <= exposed.keys()
    for text in expressions(dashboard) + queries:
        mentioned = set(re.findall(r"\bsplitlearn_\w+", text))
        assert mentioned <= exposed.keys(), text


def test_every_selector_has_labels_that_its_metric_has(
    dashboard: Any, exposed: dict[str, set[str]]
) -> None:
    for text in expressions(dashboard):
        for name, matchers in SELECTOR.findall(text):
            labels = {label for label, _ in re.findall(r'(\w+)=~?"([^"]*)"', matchers)}
            assert "instance" in labels, text
            if exposed[name]:
                assert labels <= exposed[name] | OF_PROMETHEUS, text


def test_every_metric_of_ours_is_in_it(dashboard: Any, exposed: dict[str, set[str]]) -> None:
    shown = {plain(name) for text in expressions(dashboard) for name, _ in SELECTOR.findall(text)}

    ours = {plain(name) for name in exposed if name.startswith("splitlearn_")}
    assert {name for name in ours if not name.endswith("_created")} - shown == set()


def test_every_panel_has_an_expression_and_a_place(dashboard: Any) -> None:
    assert [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"] == ROWS
    places: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not taken & places, panel["title"]
        places |= taken
    for panel in charts(dashboard):
        assert panel["targets"], panel["title"]
        assert all(target["expr"].strip() for target in panel["targets"]), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_it_can_be_imported_with_any_data_source(dashboard: Any) -> None:
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    chosen = {"type": "prometheus", "uid": "${datasource}"}

    assert dashboard["schemaVersion"] >= 38  # Grafana 10
    assert dashboard["id"] is None
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    assert "label_values(" in variables["model"]["definition"]
    assert {json.dumps(panel["datasource"]) for panel in charts(dashboard)} == {json.dumps(chosen)}
    for panel in charts(dashboard):
        assert all(target["datasource"] == chosen for target in panel["targets"])
    for text in expressions(dashboard):
        assert set(re.findall(r"\$(\w+)", text)) <= {*variables, "__rate_interval"}
        for opening, closing in ("()", "{}", "[]"):
            assert text.count(opening) == text.count(closing), text
