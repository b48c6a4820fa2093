"""Recipes fit the GPUs that their first line names; released models have as many parameters as they are said to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from primus_bridge.config import load_arguments
from primus_bridge.conversion.families import family_of
from primus_bridge.plan.device import Device
from primus_bridge.plan.parameters import whole_model
from primus_bridge.plan.plan import make_plan
from tests.plan.released import RELEASED

RECIPES = Path(__file__).parents[2] / "recipes"
FOR = re.compile(r"on (\d+) GPUs of (\d+) GB")
"""What a whole recipe says in its first line."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_model(name):
    parameters, config = RELEASED[name]
    family = family_of(config, name)
    assert whole_model(family, family.architecture(config)) == parameters


def test_recipes_fit_what_they_are_for(tmp_path):
    tried = 0
    for recipe in sorted(RECIPES.glob("*.yaml")):
        said = FOR.search(recipe.read_text().partition("\n")[0])
        if said is None:
            continue
        arguments = load_arguments(str(recipe), [])
        folder = tmp_path / recipe.stem
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(RELEASED[arguments.checkpoint.hf_model_name_or_path][1]))
        arguments.checkpoint.hf_model_name_or_path = str(folder)
        plan = make_plan(arguments, int(said[1]), Device.gpu(int(said[2]) * 10**9, "test"))
        assert plan.fits, (recipe.name, plan.peak.total / 1e9, [each.flags for each in plan.suggestions])
        tried += 1
    assert tried >= 40
