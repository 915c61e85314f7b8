"""Both written forms carry a change exactly, and what is not in the vocabulary is refused in one clear line."""

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_lab import interventions
from hydra_lab.interventions import (
    AblateExpert,
    ClampBeta,
    CutPath,
    EditValue,
    ForbidBlocks,
    ForceExperts,
    FreezeSlot,
    Intervention,
    MaskAddresses,
    PatchState,
    ReplaceAddress,
    RouteChunks,
    ScaleDecay,
    ScalePath,
    SelectBlocks,
    SwapAddresses,
    SwapSlots,
    TemperRouting,
    ZeroSlot,
    dump_interventions,
    from_dict,
    intervened,
    load_interventions,
    parse,
)
from hydra_lab.interventions.text import ACTIONS, ACTIONS_OF_ANY_PATH
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import PATHS
from tests.helpers import lively_model
from tests.interventions.vocabulary import STATE, VOCABULARY, name

numbers = st.integers(0, 10**6)
lists = st.lists(numbers, unique=True, max_size=5)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)
flags = st.booleans()


def state(head: int | None) -> st.SearchStrategy[list[Any]]:
    rows = st.lists(st.lists(floats, min_size=2, max_size=2), min_size=3, max_size=3)
    return rows if head is not None else st.lists(rows, min_size=1, max_size=2)


heads = st.none() | numbers
KINDS: dict[type[Intervention], dict[str, st.SearchStrategy[Any]]] = {
    CutPath: {"path": st.sampled_from(PATHS)},
    ScalePath: {"path": st.sampled_from(PATHS), "factor": floats},
    AblateExpert: {"expert": numbers, "renormalize": flags},
    ForceExperts: {"experts": st.lists(numbers, unique=True, min_size=1, max_size=3)},
    RouteChunks: {"experts": st.lists(lists, max_size=4)},
    TemperRouting: {"value": st.floats(1e-6, 1e6)},
    MaskAddresses: {"addresses": lists, "renormalize": flags},
    ReplaceAddress: {"source": numbers, "target": numbers},
    SwapAddresses: {"first": numbers, "second": numbers},
    ClampBeta: {"value": shares},
    EditValue: {"address": numbers, "value": st.lists(floats, min_size=1, max_size=6)},
    ZeroSlot: {"slot": numbers},
    FreezeSlot: {"slot": numbers, "from_chunk": numbers},
    SwapSlots: {"first": numbers, "second": numbers},
    ScaleDecay: {"head": numbers, "factor": st.floats(0, 1e6)},
    ForbidBlocks: {"blocks": lists},
    SelectBlocks: {"blocks": lists},
}


@st.composite
def changes(draw: st.DrawFn) -> Intervention:
    block: Any = draw(st.just("*") | st.integers(0, 99))
    kind = draw(st.sampled_from([*KINDS, PatchState]))
    if kind is PatchState:
        head = draw(heads)
        position, values = draw(numbers), draw(state(head))
        which = draw(st.sampled_from(["write", "read"]))
        return PatchState(block=block, position=position, state=values, head=head, kind=which)
    return kind(block=block, **{key: draw(strategy) for key, strategy in KINDS[kind].items()})


def test_every_kind_is_here_and_in_the_tests() -> None:
    offered = {each for kinds in ACTIONS.values() for each in kinds} | set(ACTIONS_OF_ANY_PATH)
    assert offered == {*KINDS, PatchState} == {type(each) for each in VOCABULARY}


@given(st.lists(changes(), min_size=1, max_size=3))
def test_text_and_json_carry_changes_exactly(wanted: list[Intervention]) -> None:
    texts = [str(change) for change in wanted]
    assert parse("; ".join(texts)) == tuple(wanted)
    assert [
        from_dict(json.loads(json.dumps(change.to_dict(), allow_nan=False))) for change in wanted
    ] == wanted
    assert [str(change) for change in parse(";".join(texts))] == texts
    assert [hash(change) for change in wanted] == [hash(change) for change in parse("; ".join(texts))]


def test_arrays_come_back_to_the_bit(tmp_path: Path) -> None:
    odd = torch.tensor([1e-45, -3.4028235e38, 0.1, -0.0, 1 / 3, 2.0**-126])
    change = EditValue(block=2, address=3, value=odd)
    dump_interventions([change, PatchState(block=1, position=15, state=STATE)], tmp_path / "changes.json")
    edit, patch = load_interventions(tmp_path / "changes.json")
    assert isinstance(edit, EditValue) and isinstance(patch, PatchState)
    assert torch.equal(torch.tensor(edit.value).view(torch.int32), odd.view(torch.int32))
    assert torch.equal(torch.tensor(patch.state), STATE)
    same = (odd.numpy(), odd.tolist(), odd.double(), np.asarray(odd, dtype=np.float64))
    assert {EditValue(block=2, address=3, value=each) for each in same} == {change}
    halves = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)
    assert EditValue(block=2, address=3, value=halves).value == (0.5, 0.25)


def test_a_file_may_be_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "changes.json"
    file.write_text(
        '["moe[0].ablate(expert=2); memory[*].cut()", {"path": "moe", "block": "*", "action": "cut"}]'
    )
    assert load_interventions(file) == parse("moe[0].ablate(expert=2); memory[*].cut(); moe[*].cut()")


def test_how_a_text_may_be_written() -> None:
    expected = (AblateExpert(block=3, expert=2, renormalize=False), CutPath(path="memory", block="*"))
    for text in (
        "moe[3].ablate(expert=2, renormalize=false); memory[*].cut()",
        " moe [ 3 ] . ablate ( renormalize = False,\n expert = 2, ) ;memory[*].cut( );",
    ):
        assert parse(text) == expected
    assert str(expected[0]) == "moe[3].ablate(expert=2, renormalize=false)"
    assert str(parse('ssm[0].patch(position=7, state=[[1]], head=null, kind="write")')[0]) == (
        "ssm[0].patch(position=7, state=[[1.0]])"
    )
    assert str(parse("moe[0].ablate(expert=2, renormalize=true)")[0]) == "moe[0].ablate(expert=2)"
    assert ForceExperts(block=0, expert=cast(Any, np.int64(2))) == ForceExperts(block=0, expert=2)


WRONG_TEXT: dict[str, str] = {
    "": "holds no intervention",
    " ; ": "holds no intervention",
    "moe": r"'moe' is not of the form path\[block\].action",
    "moe[0]": "is not of the form",
    "moe[-1].cut()": "is not of the form",
    "moe[0].cut": "is not of the form",
    "moe[0].cut() memory[2].cut()": "are not arguments",
    "mow[0].cut()": "path 'mow' is not one of ssm, attention, moe, workspace, memory",
    "moe[0].ablat(expert=1)": "moe has no action 'ablat'; it has ablate, force, route, temperature, cut, scale",
    "memory[0].ablate(expert=1)": "memory has no action 'ablate'; it has mask, replace, swap, beta, edit",
    "moe[0].ablate()": "moe.ablate needs expert",
    "memory[0].swap()": "memory.swap needs first and second",
    "moe[0].ablate(exprt=1)": "moe.ablate has no argument 'exprt'; it takes expert, renormalize",
    "moe[0].cut(factor=1)": "moe.cut has no argument 'factor'; it takes none",
    "moe[0].ablate(1)": r"\(1\) are not arguments",
    "moe[0].ablate(expert=1, expert=2)": "are not arguments",
    "moe[0].ablate(**{'expert': 1})": "are not arguments",
    "moe[0].ablate(expert=x)": "are not arguments",
    "moe[0].ablate(expert=__import__('os').getpid())": "are not arguments",
    "moe[0].ablate(expert=1)(expert=2)": "are not arguments",
    "moe[0].ablate(expert=(1)": "are not arguments",
    "moe[0].ablate(expert=" + "[" * 500 + ")": "are not arguments",
    "moe[0].ablate(expert=" + "-" * 50_000 + "1)": "are not arguments",
    "moe[0].ablate(expert=\0)": "are not arguments",
    "moe[0].ablate(expert=1.0)": "moe.ablate: expert must be a whole number from 0 up, got 1.0",
    "moe[0].ablate(expert=true)": "whole number from 0 up, got True",
    "moe[0].ablate(expert=-1)": "whole number from 0 up, got -1",
    "moe[0].ablate(expert=null)": "whole number from 0 up, got None",
    "moe[0].ablate(expert=1, renormalize=1)": "renormalize must be true or false, got 1",
    "moe[0].force()": "moe.force: give either expert or experts",
    "moe[0].force(expert=1, experts=[2])": "moe.force: give either expert or experts",
    "moe[0].force(experts=[])": "moe.force: give either expert or experts",
    "moe[0].force(experts=[1, 1])": "experts must not name one number twice",
    "moe[0].route(experts=[1])": "experts must be a list, got 1",
    "moe[0].temperature(value=0)": "value must be a number from 1e-06 to",
    "moe[0].temperature(value='hot')": "value must be a number, got 'hot'",
    "moe[0].scale(factor=1e39)": "factor must be a number from",
    "memory[0].beta(value=1.5)": "value must be a number from 0 to 1, got 1.5",
    "memory[0].mask(addresses={1})": r"addresses must be a list, got \{1\}",
    "memory[0].edit(address=1, value=[])": "value must be numbers with 1 axes",
    "memory[0].edit(address=1, value=[[1.0]])": "value must be numbers with 1 axes",
    "memory[0].edit(address=1, value=['a'])": "value must be numbers with 1 axes",
    "memory[0].edit(address=1, value=[1e39])": "value must hold finite numbers",
    "ssm[0].patch(position=7, state=[[1.0, 2.0], [3.0]])": "state must be numbers with 2 or 3 axes, all rows alike",
    "ssm[0].patch(position=7, state=[[1.0]], kind='peek')": "kind must be 'write' or 'read', got 'peek'",
    "ssm[0].scale_decay(head=0, factor=-1)": "factor must be a number from 0 to",
    "workspace[0].freeze(slot=0, from_chunk=-2)": "from_chunk must be a whole number",
}


@pytest.mark.parametrize("text", WRONG_TEXT, ids=lambda text: text[:50])
def test_what_is_not_in_the_vocabulary(text: str) -> None:
    with pytest.raises(ValueError, match=WRONG_TEXT[text]) as caught:
        parse(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


WRONG_VALUES: list[tuple[Any, str]] = [
    ({"path": "moe", "action": "cut"}, "an object with path, block, action and arguments"),
    (
        {"path": "moe", "block": 0, "action": "cut", "extra": 1},
        "an object with path, block, action and arguments",
    ),
    ("text", "an object with path"),
    ({"path": "moe", "block": 0, "action": "cut", "arguments": []}, "arguments must be an object"),
    ({"path": ["moe"], "block": 0, "action": "cut"}, r"path \['moe'\] is not one of"),
    ({"path": "moe", "block": 0, "action": {}}, r"moe has no action \{\}"),
    ({"path": "moe", "block": "all", "action": "cut"}, "block must be a whole number from 0 up, got 'all'"),
    ({"path": "moe", "block": True, "action": "cut"}, "block must be a whole number from 0 up, got True"),
    (
        {"path": "moe", "block": 0, "action": "scale", "arguments": {"factor": float("nan")}},
        "factor must be a number",
    ),
]


@pytest.mark.parametrize(("values", "words"), WRONG_VALUES)
def test_what_json_must_not_hold(values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_dict(values)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "it holds no list"),
        ("[", "Expecting value"),
        ("[1]", "an object with path"),
        ('["moe[0].fly()"]', "moe has no action 'fly'"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_what_a_file_must_not_hold(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "changes.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"changes.json is not a JSON list of interventions: .*{words}"):
        load_interventions(file)
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"latin\.json is not a JSON list"):
        load_interventions(tmp_path / "latin.json")
    with pytest.raises(FileNotFoundError):
        load_interventions(tmp_path / "nosuch.json")


NOT_IN_THIS_MODEL: dict[str, str] = {
    "moe[1].cut()": r"moe.cut: block 1 has no moe path; blocks \[0, 2\] have one",
    "memory[9].beta(value=1)": r"memory.beta: block 9 has no memory path; blocks \[2\] have one",
    "moe[0].ablate(expert=4)": "moe.ablate: expert 4 is out of range: 0 to 3 in this model",
    "moe[*].force(expert=4)": "moe.force: expert 4 is out of range",
    "moe[0].force(experts=[0, 1, 2])": r"a chunk of this model uses at most 2 experts, got \[0, 1, 2\]",
    "moe[0].route(experts=[[0], [1, 7]])": "moe.route: expert 7 is out of range",
    "memory[2].mask(addresses=[3, 64])": "memory.mask: address 64 is out of range: 0 to 63 in this model",
    "memory[2].replace(source=0, target=64)": "address 64 is out of range",
    "memory[2].swap(first=64, second=0)": "address 64 is out of range",
    "memory[2].edit(address=64, value=[0.0])": "address 64 is out of range",
    "memory[2].edit(address=0, value=[0.0])": "value has 1 numbers, a row of this model 32",
    "workspace[1].zero(slot=5)": "workspace.zero: slot 5 is out of range: 0 to 4 in this model",
    "workspace[1].freeze(slot=5)": "slot 5 is out of range",
    "workspace[1].swap(first=0, second=5)": "slot 5 is out of range",
    "ssm[0].scale_decay(head=4, factor=1)": "ssm.scale_decay: head 4 is out of range: 0 to 3 in this model",
    "ssm[0].patch(position=8, state=[[0.0]])": "position 8 is not the last of a chunk of 8 tokens; near it: 7 and 15",
    "ssm[0].patch(position=3, state=[[0.0]])": "position 3 is not the last of a chunk of 8 tokens; near it: 7",
    "ssm[0].patch(position=7, state=[[0.0]])": r"state has shape \[1, 1\], that of all heads is \[4, 16, 16\]",
    "ssm[0].patch(position=7, state=[[0.0]], head=0)": r"state has shape \[1, 1\], that of one head is \[16, 16\]",
    "ssm[0].patch(position=7, state=[[0.0]], head=4)": "head 4 is out of range",
    "attention[1].select(blocks=[1, 2, 3])": r"selects at most 2 blocks, got \[1, 2, 3\]",
}


@pytest.mark.parametrize("text", NOT_IN_THIS_MODEL)
def test_what_this_model_does_not_have(model: HydraForCausalLM, text: str) -> None:
    with pytest.raises(ValueError, match=NOT_IN_THIS_MODEL[text]):
        with intervened(model, text):
            raise AssertionError("the context opened")


def test_a_path_that_no_block_has() -> None:
    with pytest.raises(ValueError, match="no block of this model has a memory path"):
        with intervened(lively_model(memory_layers=[]), "memory[*].cut()"):
            raise AssertionError("the context opened")


def test_what_is_neither_a_text_nor_a_change(model: HydraForCausalLM) -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match="an Intervention or a text, got int"):
        with intervened(model, wrong):
            raise AssertionError("the context opened")


def test_the_vocabulary_of_the_docstring_is_the_one_that_is_read() -> None:
    listed = set(re.findall(r"\.(\w+)\([^)]*\)\s+(\w+):", interventions.__doc__ or ""))
    offered = {(each.action, each.__name__) for kinds in ACTIONS.values() for each in kinds}
    offered |= {(each.action, each.__name__) for each in ACTIONS_OF_ANY_PATH}
    assert listed == offered


@pytest.mark.parametrize("change", VOCABULARY, ids=name)
def test_the_tests_own_vocabulary_round_trips(change: Intervention) -> None:
    assert parse(str(change)) == (change,) == (from_dict(change.to_dict()),)
