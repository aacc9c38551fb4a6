"""addon.adapters: what a checkpoint's record says to a run that goes on."""

from __future__ import annotations

import json

from addon.adapters import ADAPTER_CONFIG, trained_revision


def test_a_run_that_goes_on_asks_the_hub_for_the_commit_of_its_training():
    record = {"base_model_name_or_path": "org/model", "base_revision": "c" * 40, "load_in": "none"}
    documents = {ADAPTER_CONFIG: json.dumps(record)}
    assert trained_revision(documents, "org/model") == "c" * 40
    assert trained_revision(documents, "org/other") is None, "another LLM has other commits"
    assert trained_revision({}, "org/model") is None, "a checkpoint of another system"
