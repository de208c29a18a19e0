"""The look at all prompts before anything boots: every fault at once, by place, column and id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from copris_lightning import Columns, DatasetPrompts, Template
from copris_lightning.__main__ import main
from copris_lightning.datamodules.prompts.inspection import usable_prompts
from copris_lightning.datamodules.prompts.stream import PromptEncoder
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.errors import ConfigurationError
from copris_lightning.quickstart.warm_start import character_tokenizer
from copris_lightning.rollout.rewards import Prompt

KEY = "task.prompts"
SIMULATED = Path(__file__).parents[3] / "configs" / "simulated.yaml"


class Listed:
    """A source of the user's: gives what it was given, or raises it."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def look(*items, skip_long=False, limit=20, template=None):
    encode = PromptEncoder(
        character_tokenizer(), max_prompt_tokens=limit, key=KEY, template=template
    )
    return usable_prompts(Listed(*items), encode, skip_long=skip_long)


def refused(*items, **settings):
    with pytest.raises(ConfigurationError) as caught:
        look(*items, **settings)
    return str(caught.value)


def test_prompts_that_can_be_used_are_all_used():
    messages = ({"role": "user", "content": "b"},)
    assert look(Prompt("a", text="a"), Prompt("b", messages=messages)) == [0, 1]


def test_all_faults_are_named_at_once_and_counted():
    message = refused(
        Prompt("a", text="a"),
        Prompt("b", text=""),
        Prompt("c", text="\xe9"),
        Prompt("d", text="x" * 21),
        Prompt("e"),
        Prompt("f", text=3),
        Prompt("g", messages=()),
        Prompt(8, text="x"),
        Prompt("", text="x"),
        None,
        KeyError("no such row"),
        ConfigurationError("row 11 is odd"),
        Prompt("m", text=""),
    )
    lines = message.splitlines()
    assert lines[0] == f"{KEY}: 12 of 13 prompts cannot be used"
    assert lines[1] == "  index 1: prompt 'b' is empty"
    assert lines[2].startswith("  index 2: prompt 'c' cannot be tokenized: ")
    assert lines[3].startswith("  index 3: prompt 'd' has 21 tokens, more than task.max")
    assert lines[4] == "  index 4: prompt 'e' needs either text or messages"
    assert lines[5] == "  index 5: prompt 'f' is the number 3; it must be text"
    assert lines[6] == "  index 6: prompt 'g' is a list without messages"
    assert lines[7] == "  index 7: the prompt has an id that is the number 8; it must be text"
    assert lines[8] == "  index 8: the prompt has an id that is empty; it must be text"
    assert lines[9] == "  index 9: the prompt is null, not a copris_lightning.Prompt"
    assert lines[10] == ("  index 10: the prompt cannot be read: it raised KeyError('no such row')")
    assert lines[11:] == ["  and 2 more"]


def test_an_error_of_the_sources_own_is_passed_on_with_the_index():
    assert "index 1: the prompt row 1 is odd" in refused(
        Prompt("a", text="a"), ConfigurationError("row 1 is odd")
    )


def test_long_prompts_are_left_out_if_told_so():
    prompts = [Prompt("a", text="x" * 21), Prompt("b", text="x")]
    assert look(*prompts, skip_long=True) == [1]
    message = refused(prompts[0], skip_long=True)
    assert "prompt set is empty, since each of the 1 prompts is longer than" in message


def test_leaving_out_long_prompts_leaves_out_no_faults():
    assert "index 0: prompt 'a' is empty" in refused(Prompt("a", text=""), skip_long=True)


def test_a_source_without_a_length_is_named():
    class Endless:
        def __getitem__(self, index):
            return Prompt("a", text="a")

    encode = PromptEncoder(character_tokenizer(), max_prompt_tokens=20, key=KEY)
    with pytest.raises(ConfigurationError, match=f"{KEY}: its length cannot be asked for"):
        usable_prompts(Endless(), encode, skip_long=False)


@pytest.mark.parametrize("setting", [{"system": "s"}, {"tools": [{"name": "f"}]}])
def test_a_template_that_text_prompts_would_ignore_is_refused(setting):
    chat = Prompt("b", messages=({"role": "user", "content": "b"},))
    message = refused(Prompt("a", text="a"), template=Template(**setting))
    assert f"task.template.{next(iter(setting))} cannot apply to {KEY}" in message
    assert "1 of 1 prompts are text" in message
    if "system" in setting:
        assert look(chat, template=Template(**setting)) == [0]
        assert "1 of 2 prompts" in refused(
            Prompt("a", text="a"), chat, template=Template(**setting)
        )


def test_settings_that_do_not_shape_a_prompt_go_with_text():
    assert look(Prompt("a", text="a"), template=Template(special_tokens="strip")) == [0]


def test_rows_of_a_file_are_named_by_line_column_and_id(tmp_path):
    rows = [
        {"q": "1+1=", "a": 2, "uid": "one"},
        {"q": None, "a": 2, "uid": "two"},
        {"q": "x" * 30, "a": 2, "uid": "three"},
        {"q": [{"role": "user", "content": None}], "a": 2, "uid": "four"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\nnonsense")
    source = DatasetPrompts("json", Columns(prompt="q", answer="a", id="uid"), data_files=str(path))
    encode = PromptEncoder(character_tokenizer(), max_prompt_tokens=20, key=KEY)
    with pytest.raises(ConfigurationError) as caught:
        usable_prompts(source, encode, skip_long=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{KEY}: 4 of 5 prompts cannot be used"
    for line, parts in zip(
        lines[1:],
        [
            ("rows.jsonl, line 2, column 'q' (id 'two'): is null",),
            ("rows.jsonl, line 3, column 'q': prompt 'three' has 30 tokens",),
            ("rows.jsonl, line 4, column 'q' (id 'four'): has message 1 of 1 whose content",),
            ("rows.jsonl, line 5: is no JSON",),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_command_line_ends_with_status_2_before_the_engine_starts(
    command, tmp_path, tiny_checkpoint, monkeypatch, capsys
):
    async def start(self: SimulatedEngine, spec: EngineSpec) -> None:
        pytest.fail("the engine was started")

    monkeypatch.setattr(SimulatedEngine, "start", start)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"q": null}\n{"q": "1+1="}\n{"q": 3}\n')
    prompts = {
        "class_path": "copris_lightning.DatasetPrompts",
        "init_args": {
            "path": "json",
            "data_files": "rows.jsonl",
            "columns": {"prompt": "q", "answer": None},
        },
    }
    holder: dict[str, object] = {"task": {"prompts": prompts}}
    if command == "validate":
        holder = {"evaluations": {"some": {"prompts": prompts}}}
    overlay = json.dumps({"data": {"init_args": holder}})
    args = [command, "--config", str(SIMULATED), "--model.init_args.model", str(tiny_checkpoint)]
    status = main([*args, "--config", overlay])
    complaint = capsys.readouterr().err
    key = "task.prompts" if command == "fit" else "evaluations.some.prompts"
    assert status == 2
    assert f"copris: data.init_args.{key}: 2 of 3 prompts cannot be used" in complaint
    assert "rows.jsonl, line 1, column 'q' (id '00000000'): is null" in complaint
    assert "rows.jsonl, line 3, column 'q' (id '00000002'): is the number 3" in complaint
    assert "Traceback" not in complaint
