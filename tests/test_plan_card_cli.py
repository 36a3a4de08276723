"""`octavo plan` for a card: the screen, the JSON, the command it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from octavo.budget import plan_checkpoint_on_card
from octavo.checkpoint import open_checkpoint
from octavo.cli.memory import plan_line, plan_to_json
from octavo.devices import DEVICES
from octavo.plan_card import CARD_PRECISIONS, make_card_plan
from octavo.shapes import SHAPES
from run_octavo import refused, run
from stores import make_source, quantise

GB, GIB = 10**9, 2**30
MIXTRAL, DENSE = SHAPES["mixtral-8x7b"], SHAPES["mistral-7b"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("card")
    source = make_source(home)
    for bits in ("4", "3"):
        quantise(source, home / bits, bits)
    return {bits: home / bits for bits in ("4", "3")}


def said(*args: object) -> dict[str, Any]:
    done = run("plan", *args, "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.parametrize(
    ("line", "fits", "command"),
    [
        (("h200",), True, "--device cuda --gpu-memory 141GB"),
        (("rtx-4090",), False, "--device cuda --gpu-memory 24GB --bits 4"),
        (("rtx-4090", "--gpu-memory", "22GiB", "--memory", "48GiB", "--context", "8192"), False,
         "--device cuda --gpu-memory 22GiB --bits 4 --memory 48GiB -o context=8192"),
        (("h100", "--bits", "16"), False, "--device cuda --gpu-memory 80GB"),
        (("h100", "--bits", "8"), True, "--device cuda --gpu-memory 80GB --bits 8"),
    ],
)  # fmt: skip
def test_the_screen_and_the_json_say_the_plan(line: tuple[str, ...], fits: bool, command: str) -> None:
    found = said("mixtral-8x7b", "--device", *line)
    device = DEVICES[line[0]]
    assert device.read is not None
    assert device.link is not None
    asked = int(line[line.index("--bits") + 1]) if "--bits" in line else None
    plan = make_card_plan(MIXTRAL, found["budget"], found["host_budget"], asked, found["context"])
    assert found["budget"] == (22 * GIB if "22GiB" in line else device.memory)
    assert found["host_budget"] == (48 * GIB if "48GiB" in line else None)
    assert found["plan"] == json.loads(json.dumps(plan_to_json(plan)))
    assert found["plan"]["card"]["total"] == plan.card.total
    assert (plan.placement is None) == fits
    assert [row["bits"] for row in found["precisions"]] == list(CARD_PRECISIONS)
    assert {row["bits"]: row["verdict"] for row in found["precisions"]}[plan.bits] == ("fits" if fits else "cached")
    ceilings = found["ceilings"]
    by_memory, by_link = plan.decode_tok_s(device.read, device.link)
    assert (ceilings["decode_tok_s_memory"], ceilings["decode_tok_s_link"]) == (by_memory, by_link)
    assert ceilings["decode_tok_s"] == min(by_memory, by_link or by_memory)
    assert found["command"] == f"octavo chat --model mistralai/Mixtral-8x7B-Instruct-v0.1 {command}"
    assert found["obstacle"] is None
    done = run("plan", "mixtral-8x7b", "--device", *line)
    lines = done.out.splitlines()
    assert len(lines) <= 24
    assert max(len(one) for one in lines if "octavo " not in one) <= 100
    assert lines[-1] == f"run      {found['command']}"
    told = " ".join(done.out.split())
    assert ("by the link from the host" in told) == (not fits)
    assert ("all 256 experts on the card" in told) == fits
    assert device.source in told


def test_what_does_not_go_together(folders: dict[str, Path]) -> None:
    refused(run("plan", "menny", "--gpu-memory", "1GB"), "--gpu-memory bounds a GPU", hint="--device cuda")
    refused(run("plan", "menny", "--device", "h200", "--trace", "x"), "--trace places experts for a CPU", hint="leave")
    refused(run("plan", folders["3"], "--device", "h200"), "has weights of 3 bits", hint="--device cpu")
    refused(run("plan", "menny", "--device", "h200", "--bits", "2"), "bits is 2", hint="--bits 4")
    refused(run("plan", "menny", "--device", "h200", "--gpu-memory", "lots"), "'lots' is no size", hint="24GiB")
    refused(run("plan", "menny", "--device", "h200", "--memory", "1MB"), "of the host's memory", hint="--memory")
    refused(run("plan", "mixtral-8x7b", "--device", "rtx-4060", "--gpu-memory", "1GB"), "too little", hint="smallest")


def test_a_gpu_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    found = said("mixtral-8x7b", "--device", "cuda", "--gpu-memory", "32GB", "--memory", "64GB")
    assert (found["budget"], found["plan"]["bits"], found["ceilings"]["decode_tok_s"]) == (32 * GB, 4, None)
    assert "unknown" in run("plan", "mixtral-8x7b", "--device", "cuda", "--gpu-memory", "32GB").out


def test_a_store_on_a_card(folders: dict[str, Path]) -> None:
    found = said(folders["4"], "--device", "rtx-4060")
    assert found["plan"]["precision"].startswith("store, ")
    assert found["plan"] == json.loads(
        json.dumps(plan_to_json(plan_checkpoint_on_card(open_checkpoint(folders["4"]), 8 * GB, free=8 * GB)))
    )
    assert found["command"].endswith("--device cuda --gpu-memory 8GB")
    assert [row["precision"] for row in found["precisions"]][1:] == ["16 bits", "8 bits", "4 bits"]


def test_a_plan_in_a_line() -> None:
    plan = make_card_plan(MIXTRAL, 24 * GB, batch=2)
    assert re.fullmatch(
        r"card 2\d\.\d GB of 24\.0 GB: 4 bits, \d+ of 256 experts on the card at a time, 256 in 24\.0 GB of the host's "
        r"memory; KV cache for 2 times 4,096 tokens 1\.1 GB",
        plan_line(plan),
    )
    assert "all 256 experts on the card; KV cache for 4,096" in plan_line(make_card_plan(MIXTRAL, 32 * GB))
    assert "4 bits, all on the card" in plan_line(make_card_plan(DENSE, 6 * GB, bits=4))
    assert plan_to_json(plan)["streamed_experts"] == 256 - plan.resident
