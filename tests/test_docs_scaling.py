"""The figures of docs/scaling.md follow from its formulas, and from the recipes it judges."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
BASE = ROOT / "configs" / "deepscaler_1.5b.yaml"
GPU_GB = 80
SIZES = ("1.5B", "7B")
RUN = {"N": 8, "T": 32768, "c": 1024, "tp": 1}
"""What the page says that its figures are for."""

PEAK = (
    "bf16 copies of the weights, except with FSDP2",
    "FSDP2's units in full: embedding, head, one layer",
    "inputs of the layers",
    "one layer, computed again",
    "logits and their gradients",
)


def tables() -> list[list[dict[str, str]]]:
    """Every table of the page: rows, by the names of the columns."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE, re.M):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
    return found


def table(*columns: str) -> list[dict[str, str]]:
    """All rows of the tables with these columns."""
    return [row for rows in tables() for row in rows if set(columns) <= set(rows[0])]


def architectures() -> dict[str, dict[str, int]]:
    rows = table("model", "P", "P_layer")
    return {
        row["model"].rpartition("-")[2]: {k: int(v) for k, v in row.items() if k != "model"}
        for row in rows
    }


def gigabytes(formula: str, **values: float) -> float:
    result: float = eval(formula.strip("`"), {"__builtins__": {}}, dict(values))
    return result / 1e9


FORMULAS = table("what", "bytes")


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_architecture(size: str) -> None:
    given = architectures()[size]
    config = Qwen2Config(
        hidden_size=given["D"],
        num_hidden_layers=given["L"],
        num_attention_heads=given["D"] // given["d"],
        num_key_value_heads=given["H"],
        intermediate_size=given["I"],
        vocab_size=given["V"],
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == given["P"]
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == given["P_layer"]


@pytest.mark.parametrize("row", FORMULAS, ids=[row["what"] for row in FORMULAS])
def test_figures_follow_from_their_formulas(row: dict[str, str]) -> None:
    for size in SIZES:
        expected = gigabytes(row["bytes"], **architectures()[size], **RUN)
        assert row[size] == f"{expected:.1f}", size


def merged(base: Any, overlay: Any) -> Any:
    """An overlay on top of a config, where a new class does not take over arguments."""
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    if overlay.get("class_path", base.get("class_path")) != base.get("class_path"):
        return overlay
    return {**base, **{k: merged(base.get(k), v) for k, v in overlay.items()}}


def memory(recipe: Path) -> dict[str, str]:
    """A row of the page's table of recipes, from the recipe itself."""
    config = merged(yaml.safe_load(BASE.read_text()), yaml.safe_load(recipe.read_text()))
    data, trainer = config["data"]["init_args"], config["trainer"]
    size = config["model"]["init_args"]["model"].rpartition("-")[2]
    ranks = trainer["devices"] * trainer.get("num_nodes", 1)
    trajectories = data["batch"]["groups"] * data["batch"]["group_size"]
    rows = math.ceil(trajectories / (ranks * trainer["accumulate_grad_batches"]))
    tokens = rows * (data["task"]["max_prompt_tokens"] + data["task"]["sampling"]["max_new_tokens"])
    values = {**architectures()[size], **RUN, "N": ranks, "T": tokens}
    formulas = {row["what"]: row["bytes"] for row in FORMULAS}
    resting = gigabytes("12 * P / N", **values)
    without = "except with FSDP2" if ranks > 1 else "FSDP2's units"
    peak = gigabytes("16 * P / N", **values) + sum(
        gigabytes(formulas[what], **values) for what in PEAK if without not in what
    )
    engine = data["engine"]["init_args"]
    sleeps, shares = engine.get("sleep_level") is not None, True
    if "urls" in engine:
        share = float(re.findall(r"--gpu-memory-utilization ([\d.]+)", recipe.read_text())[0])
        # Servers on a trainer's machine are one per rank.
        shares = len(engine["urls"]) == ranks and trainer.get("num_nodes", 1) > 1
    else:
        share = engine["engine_args"]["gpu_memory_utilization"]
    taken = share * GPU_GB
    figures = {
        "trainer, resting": resting,
        "trainer, peak": peak,
        "engine": taken,
        "rollout": resting + taken if shares else max(resting, taken),
        "training": peak + taken if shares and not sleeps else peak,
    }
    return {
        "recipe": f"`{recipe.name}`",
        "model": size,
        "N": str(ranks),
        "T": str(tokens),
        **{name: f"{figure:.1f}" for name, figure in figures.items()},
    }


def test_the_recipes_need_what_the_page_says() -> None:
    given = {row["recipe"]: row for row in table("recipe", "T")}
    assert given == {f"`{recipe.name}`": memory(recipe) for recipe in RECIPES}
    for row in given.values():
        assert max(float(row["rollout"]), float(row["training"])) <= 0.9 * GPU_GB


def test_every_recipe_is_in_the_table_to_choose_from() -> None:
    assert {row["`configs/recipes/`"] for row in table("strategy", "transport")} == {
        f"`{recipe.name}`" for recipe in RECIPES
    }
