"""Programs looked at before they run: bytes, arithmetic, what goes over the links, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import clip, decoder64, prior
from configs.dalle1 import token_model
from dalle2_jax.models import flops, models
from dalle2_jax.preflight import __main__ as command
from dalle2_jax.preflight import chips, hlo, preflight
from dalle2_jax.preflight.advice import Setup, advise
from dalle2_jax.preflight.chips import GIB
from dalle2_jax.preflight.hlo import Collective
from dalle2_jax.preflight.report import Report
from dalle2_jax.runtime import metrics, partition
from tests.test_meshes import settings


def plain(recipe, **changes) -> dict:
    config = models.to_plain(recipe.get_config("debug"))
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    return config


# What goes over the links, in programs that XLA compiled for the eight devices of the tests


def compiled(function, *shapes_and_specs):
    mesh = partition.make_mesh(2, 4, 1)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes_and_specs[:-1]
    ]
    out = NamedSharding(mesh, shapes_and_specs[-1])
    return jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text()


def test_a_gather_is_counted():
    """[8, 64] float32 split by 4: a chip gets what the other three hold, and sends as much on."""
    found = hlo.collectives(compiled(lambda x: x * 2, ((8, 64), P("fsdp")), P()))
    assert found == {"all-gather": Collective(1, 8 * 64 * 4 * 3 / 4)}


def test_a_sum_over_chips_is_counted_and_once_a_turn_of_a_loop():
    def contract(x, w):
        return x @ w

    shapes = ((8, 64), P(None, ("data", "fsdp"))), ((64, 16), P(("data", "fsdp"), None))
    found = hlo.collectives(compiled(contract, *shapes, P()))
    assert found == {"all-reduce": Collective(1, 2 * 8 * 16 * 4 * 7 / 8)}

    def loop(x, w):
        def turn(carry, _):
            return jnp.tanh(carry @ w) @ jnp.ones((16, 64)), None

        return jax.lax.scan(turn, x, None, length=5)[0]

    looped = hlo.collectives(compiled(loop, *shapes, P(None, ("data", "fsdp"))))
    assert looped["all-reduce"].count == 5
    assert looped["all-reduce"].bytes == 5 * found["all-reduce"].bytes


def test_nothing_is_sent_where_all_is_whole():
    assert hlo.collectives(compiled(lambda x: x @ x.T, ((8, 64), P("data")), P("data"))) != {}
    assert hlo.collectives(compiled(lambda x: x * 2, ((8, 64), P("data")), P("data"))) == {}


def test_the_forms_that_tpus_write():
    text = """
%all-reduce-scatter.1 (input: f32[64,8]) -> f32[16,8] {
  %all-reduce.3 = f32[64,8]{1,0} all-reduce(%input), replica_groups=[16,4]<=[64], to_apply=%add
}

ENTRY %main (a: bf16[32,8]) -> bf16[32,32] {
  %g = (bf16[32,8]{1,0}, bf16[32,32]{1,0:T(8)}) all-gather-start(%a), replica_groups=mesh['x'=4,'y'=2] {'x'}
  %d = bf16[32,32]{1,0} all-gather-done(%g)
  %f = f32[16,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %p = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}
  %one = f32[9]{0} all-reduce(%e), replica_groups={{0},{1}}, to_apply=%add
  ROOT %t = bf16[32,32]{1,0} all-to-all(%d), replica_groups={{0,1,2,3,4,5,6,7}}
}
"""
    assert hlo.collectives(text) == {
        "all-gather": Collective(1, 32 * 32 * 2 * 3 / 4),
        "all-to-all": Collective(1, 32 * 32 * 2 * 7 / 8),
        "reduce-scatter": Collective(1, 16 * 8 * 4 * 3),
        "collective-permute": Collective(1, 16),
    }


def test_asynchronous_forms_count_as_the_plain_ones():
    """XLA's own and, where an operation has none, that of any operation, ((operands), results, ...)."""
    plain = """
ENTRY %main (a: f32[8], b: f32[4]) -> f32[2] {
  %g = (f32[32]{0}, f32[16]{0}) all-gather(%a, %b), replica_groups={{0,1,2,3}}
  %r = (f32[8]{0}, f32[4]{0}, f32[2]{0}) all-reduce(%a, %b, %e), replica_groups={{0,1,2,3}}, to_apply=%add
  %q = f32[8]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  %c = (f32[8]{0}, f32[4]{0}) collective-permute(%a, %b), source_target_pairs={{0,1},{1,2}}
  %s = (f32[2]{0}, f32[1]{0}) reduce-scatter(%a, %b), replica_groups={{0,1,2,3}}, to_apply=%add
  %t = f32[8]{0} all-to-all(%a), replica_groups={{0,1,2,3}}
}
"""
    operands, two = "((f32[8]{0:T(8)}, f32[4]{0}), ", "(f32[8]{0}, f32[4]{0})"
    own = {
        "(f32[32]{0}, f32[16]{0}) all-gather": f"{operands}(f32[32]{{0}}, f32[16]{{0}})) all-gather-start",
        "f32[2]{0}) all-reduce": "f32[2]{0}) all-reduce-start",
        "f32[8]{0} all-reduce": "f32[8]{0} all-reduce-start",
        f"{two} collective": f"{operands}{two}, u32[]{{:S(2)}}, u32[]) collective",
        "collective-permute(": "collective-permute-start(",
        "(f32[2]{0}, f32[1]{0}) reduce-scatter": f"{operands}(f32[2], f32[1]), u32[]) reduce-scatter-start",
        "f32[8]{0} all-to-all": "((f32[8]{0}), f32[8]{0}, u32[]) all-to-all-start",
    }
    wrapped = own | {"f32[8]{0} all-reduce": "((f32[8]{0}), f32[8]{0}, s32[]) all-reduce-start"}
    for forms in (own, wrapped):
        text = plain
        for synchronous, asynchronous in forms.items():
            assert text.count(synchronous) == 1
            text = text.replace(synchronous, asynchronous)
        assert hlo.collectives(text) == hlo.collectives(plain)
    assert hlo.collectives(plain) == {
        "all-gather": Collective(1, 48 * 4 * 3 / 4),
        "all-reduce": Collective(2, 2 * (14 + 8) * 4 * 3 / 4),
        "collective-permute": Collective(1, 12 * 4),
        "reduce-scatter": Collective(1, 3 * 4 * 3),
        "all-to-all": Collective(1, 8 * 4 * 3 / 4),
    }


def test_cycles_are_added_up_and_once_a_turn_of_a_loop():
    text = """
%body.1 (p: f32[4]) -> f32[4] {
  ROOT %m = f32[4]{0} multiply(%p, %p), backend_config={"window_config":{"estimated_cycles":"10"}}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %c = f32[4]{0} copy(%a), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %w = f32[4] while(%c), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert hlo.scheduled_cycles(text) == (7 + 5 * 10, 0)
    counted = """
%cond.1 (q: u32[]) -> pred[] {
  %n = u32[]{:T(128)} constant(3)
  ROOT %l = pred[] compare(%q, %n), direction=LT
}
""" + text.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert hlo.scheduled_cycles(counted) == (7 + 3 * 10, 0)
    unknown = text.replace('"7"', f'"{2**64 - 1}"')
    assert hlo.scheduled_cycles(unknown) == (5 * 10, 1)
    assert hlo.scheduled_cycles(compiled(lambda x: x * 2, ((8, 64), P("data")), P("data"))) == (0, 0)


def test_the_clock_of_each_chip_goes_with_its_peak():
    clocks = dict(v4=1.05e9, v5e=1.50e9, v5p=1.75e9, v6e=1.75e9, tpu7x=2.2e9)  # Google's, but the last
    assert clocks.keys() == chips.CHIPS.keys()
    for name, chip in chips.CHIPS.items():
        assert chip.clock == pytest.approx(clocks[name], rel=0.005)
        assert {metrics.peak_flops(kind) for kind in chip.kinds} == {2 * chip.cells * chip.clock}


# Whole steps, on the devices of the tests


@pytest.fixture(scope="module")
def reports():
    """The prior's step over `fsdp` and over `data`."""
    ways = {"fsdp": dict(data=1, fsdp=8, tensor=1), "data": dict(data=8, fsdp=1, tensor=1)}
    return {name: preflight.inspect(plain(prior, mesh=mesh)) for name, mesh in ways.items()}


def test_bytes_are_those_of_the_state(reports):
    """Parameters, average and two moments in float32; over `fsdp` nearly an eighth of them."""
    stage = models.build_stage(plain(prior))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(stage)))
    whole, split = reports["data"], reports["fsdp"]
    assert whole.parameters == split.parameters == numbers
    assert 16 * numbers <= whole.arguments <= 16 * numbers * 1.05
    assert 2 * numbers <= split.arguments < 16 * numbers / 4
    for report in reports.values():
        assert report.chips == 8 and report.batch_size == 8
        assert 0.9 * report.outputs <= report.aliased <= min(report.outputs, report.arguments)
        assert report.total >= report.arguments + report.temporaries > report.temporaries > 0
        assert report.model_flops == flops.of_step(stage, stage.batch_spec(8))
        assert report.seconds is None and report.optimal_seconds is None and report.utilisation() is None
    # Copies of the parameters are kept equal by one sum of all gradients; pieces are gathered besides.
    gradients = whole.collectives["all-reduce"].bytes
    assert 0.95 * 2 * 4 * numbers * 7 / 8 <= gradients <= 2 * 4 * numbers  # null embeddings have none
    assert "all-gather" not in whole.collectives and split.collectives["all-gather"].bytes > 0


def test_the_frozen_clip_takes_part(reports, tmp_path):
    """Its parameters are arguments on every device, and its forward pass counts."""
    path = tmp_path / "clip.py"
    path.write_text("from configs import clip\n\n\ndef get_config():\n    return clip.get_config('debug')\n")
    config = plain(prior, mesh=dict(data=8, fsdp=1, tensor=1))
    of_clip = models.abstract_params(models.build_stage(plain(clip)))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(of_clip))
    alone, both = reports["data"], preflight.inspect(config, frozen={"clip": str(path)})
    assert both.arguments - alone.arguments > 3 * numbers and both.parameters == alone.parameters
    assert both.model_flops > alone.model_flops
    wrong = plain(prior, model=dict(embed_dim=48))
    with pytest.raises(ValueError, match="has embeddings of 32 entries, the stage reads 48"):
        preflight.inspect(wrong, frozen={"clip": str(path)})


def test_a_frozen_tokenizer_takes_part(tmp_path):
    """The step reads pictures in the place of codes; a tokenizer of other codes is refused."""
    config, path = plain(token_model, mesh=OVER_DATA), tmp_path / "tokenizer.py"
    path.write_text(
        "from configs.dalle1 import tiny_dvae\n\n\ndef get_config():\n    config = tiny_dvae.get_config()\n"
        "    config.model.image_size = 16\n    config.model.quantizer.num_codes = 32\n    return config\n"
    )
    whole = preflight.with_frozen(Setup(config).plan(), {"tokenizer": str(path)})
    assert {"codes", "tokenizer.image"} & {*whole.frozen.dataset_spec(8)} == {"tokenizer.image"}
    changed = plain(token_model, model=dict(num_codes=(31,)))
    with pytest.raises(ValueError, match=r"draws codes of num_codes \(31,\), .* has \(32,\)"):
        preflight.inspect(changed, frozen={"tokenizer": str(path)})
    with pytest.raises(ValueError, match="stage 'prior' reads nothing of tokenizer"):
        preflight.inspect(plain(prior), frozen={"tokenizer": str(path)})
    with pytest.raises(ValueError, match="leave --sample out"):
        preflight.inspect(config, sample=8, frozen={"tokenizer": str(path)})


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("pixelsnail", "dalle_mini")]


@pytest.mark.parametrize("kind", ["tokenizer", *SLOW])
def test_stages_of_codes_are_looked_at(kind):
    """A tokenizer's step, with the sums of its book over all devices; a step and the drawing of codes."""
    config = settings(kind) | {"batch_size": 8}
    config["mesh"] = config["mesh"] | OVER_DATA
    report, stage = preflight.inspect(config), models.build_stage(config)
    assert report.parameters == sum(x.size for x in jax.tree.leaves(models.abstract_params(stage)))
    assert report.model_flops == flops.of_step(stage, stage.batch_spec(8)) > 0
    assert report.collectives["all-reduce"].bytes > 4 * report.parameters
    if kind == "tokenizer":
        with pytest.raises(ValueError, match="'tokenizer' does not draw"):
            preflight.inspect(config, sample=8)
    else:
        assert preflight.inspect(config, sample=8).model_flops > 0


def test_drawing_is_looked_at_too():
    config = plain(decoder64, mesh=dict(data=8, fsdp=1, tensor=1))
    report, stage = preflight.inspect(config, sample=8), models.build_stage(config)
    assert report.program == "decoder, drawing" and report.batch_size == 8
    one = flops.of_step(stage, stage.batch_spec(8)) / flops.TRAINING_PASSES
    steps = config["model"]["num_steps"]
    assert steps * one <= report.model_flops <= 2.1 * steps * one  # guided; the caption is read once
    with pytest.raises(ValueError, match="'clip' does not draw"):
        preflight.inspect(plain(clip), sample=8)
    with pytest.raises(ValueError, match="--sample=3 does not split over the mesh's 8"):
        preflight.inspect(plain(decoder64), sample=3)


# What is said


def report(**changes) -> Report:
    made = Report(
        program="decoder, a training step",
        chips=64,
        device="TPU v5",
        mesh=dict(data=1, fsdp=64, tensor=1),
        batch_size=2048,
        parameters=3_500_000_000,
        arguments=2 * GIB,
        outputs=2 * GIB,
        temporaries=30 * GIB,
        aliased=2 * GIB,
        memory=95 * GIB,
        model_flops=64 * 200 * 10**12,
        compiler_flops=270e12,
        seconds=1.0,
        optimal_seconds=0.9,
        peak=459e12,
        collectives={"all-gather": Collective(300, 60e9)},
        link_seconds=0.1,
        compile_seconds=1000.0,
    )
    return dataclasses.replace(made, **changes)


def test_numbers_follow_from_each_other():
    found = report(advice=("do this",))
    assert found.total == 32 * GIB and found.fits and report(memory=None).fits is None
    assert found.utilisation() == pytest.approx(200 / 459)
    assert found.utilisation(0.1) == pytest.approx(200 / 459 / 1.1)
    stored = json.loads(found.to_json())
    assert stored["utilisation_with_links"] == pytest.approx(200 / 459 / 1.1) and stored["total"] == 32 * GIB
    assert stored["fits"] is True and stored["advice"] == ["do this"]
    said = "\n".join(found.lines())
    for part in (
        "3.500B parameters",
        "32.00 GiB of 95: fits",
        "100.0 ms",
        "900.0 ms",
        "43.6%",
        "39.6%",
        "2048 examples/s",
        "! do this",
    ):
        assert part in said, part
    assert "without an estimate" not in said
    assert "3 operations without an estimate" in "\n".join(report(without_estimate=3).lines())
    assert "DOES NOT FIT" in "\n".join(report(temporaries=94 * GIB).lines())


def advice(setup: Setup, slices: int = 1, **changes) -> tuple[str, list[dict]]:
    """(the one sentence about a program with such a report, the settings in it, each tried out)."""
    mesh = setup.plan().mesh
    size = setup.sample or setup.config["batch_size"]
    found = report(mesh=dict(mesh.shape), chips=mesh.size, batch_size=size, **changes)
    (sentence,) = advise(found, setup, slices)
    offers = []
    for part in sentence.partition(": --")[2] and sentence.partition(": ")[2].split(" or "):
        settings = dict(re.fullmatch(r"--(\S+?)=(\S+)", flag).groups() for flag in part.split())
        offers.append({n: int(v) if re.fullmatch(r"-?\d+", v) else v for n, v in settings.items()})
        setup.changed(offers[-1]).plan()  # raises ValueError where it would be refused
    return sentence, offers


ACTIVATIONS, STATE = dict(temporaries=200 * GIB), dict(arguments=200 * GIB)
SPLIT = {"config.mesh.data": 1, "config.mesh.fsdp": -1}
OVER_DATA = dict(data=8, fsdp=1, tensor=1)


@pytest.mark.parametrize(
    ("recipe", "changes", "where", "offered"),
    [
        (prior, dict(mesh=OVER_DATA), STATE, [SPLIT]),
        (clip, dict(mesh=dict(data=4, fsdp=1, tensor=2)), STATE, [SPLIT]),
        (
            prior,
            dict(batch_size=48, model=dict(remat="none")),
            ACTIVATIONS,
            [{"config.model.remat": "products"}, {"config.model.remat": "all"}, {"config.grad_accum": 2}],
        ),
        (decoder64, dict(batch_size=48, grad_accum=2, model=dict(remat=True)), ACTIVATIONS, [dict(grad=3)]),
        (
            prior,
            dict(batch_size=16, grad_accum=2, mesh=OVER_DATA, model=dict(remat="all")),
            ACTIVATIONS,
            [SPLIT | {"config.mesh.tensor": 2, "config.grad_accum": 4}],
        ),
        # its loss cannot be accumulated
        (
            clip,
            dict(batch_size=16, model=dict(remat="products")),
            ACTIVATIONS,
            [{"config.model.remat": "all"}],
        ),
        (clip, dict(batch_size=16, model=dict(remat="all")), ACTIVATIONS, []),
        (prior, dict(mesh=dict(data=1, fsdp=8, tensor=1)), STATE, []),
        (prior, dict(mesh=dict(data=1, fsdp=8, tensor=1)), dict(link_seconds=2.0), [dict(data=2)]),
    ],
)
def test_advice_for_a_step_is_what_would_be_accepted(recipe, changes, where, offered):
    short = {"grad": "config.grad_accum", "data": "config.mesh.data"}
    offered = [{short.get(name, name): value for name, value in one.items()} for one in offered]
    offered = [
        one | {"config.mesh.fsdp": -1} if one.keys() == {"config.mesh.data"} else one for one in offered
    ]
    sentence, found = advice(Setup(plain(recipe, **changes)), **where)
    assert found == offered
    assert ("no setting helps: take chips with more memory" in sentence) == (not offered)


def test_advice_for_drawing_does_not_speak_of_training():
    """Parameters are whole on every chip: fewer at a time, a shorter type."""
    setup = Setup(plain(prior, mesh=OVER_DATA, model=dict(dtype="float32")), sample=24)
    assert advice(setup, **ACTIVATIONS)[1] == [{"sample": 8}, {"config.model.dtype": "bfloat16"}]
    one_each = Setup(plain(prior, model=dict(dtype="bfloat16")), sample=8)
    assert "no setting helps" in advice(one_each, **ACTIVATIONS)[0]
    assert "every chip has all of them, and no setting helps" in advice(setup, **STATE)[0]
    slow = report(mesh=OVER_DATA, link_seconds=2.0)
    assert advise(slow, setup) == () and len(advise(slow, Setup(setup.config))) == 1


def test_advice_of_links_leaves_room_for_what_they_saved():
    setup = Setup(plain(prior, mesh=dict(data=1, fsdp=8, tensor=1)))
    assert advice(setup, link_seconds=2.0, arguments=40 * GIB) == (
        "the links take longer than the arithmetic",
        [],
    )


def test_with_a_topology_advice_names_another():
    needs_libtpu()
    config = plain(prior, batch_size=8, mesh=dict(data=1, fsdp=4, tensor=1), model=dict(remat="all"))
    setup = Setup(config, "v5e:2x2")
    larger = {"topology": "v5e:2x4"}
    assert advice(setup, **STATE)[1] == [larger | SPLIT]  # fsdp=4 has no place for the other chips
    assert advice(setup, **ACTIVATIONS)[1] == [{"config.grad_accum": 2}, larger | SPLIT]
    one_each = Setup(plain(prior, batch_size=4, mesh=dict(data=1, fsdp=-1)), "v5e:2x2")
    assert advice(one_each, **STATE)[1] == [larger | SPLIT | {"config.mesh.tensor": 2}]
    assert advice(Setup(plain(prior), "v5e:2x4"), link_seconds=2.0)[1][-1] == {"topology": "v5e:2x2"}
    draws = Setup(plain(prior, mesh=dict(data=4, fsdp=1, tensor=1)), "v5e:2x2", sample=4)
    assert advice(draws, arguments=20 * GIB, temporaries=GIB, memory=16 * GIB)[1] == [
        {"topology": "v4:2x2x1"}
    ]


REFUSALS = {
    "the total memory required for HLO temporaries (24.50G) exceeds available HBM (15.75G).": (24.5, 15.75),
    "Ran out of memory in memory space hbm. Used 24.13G of 15.75G hbm. Exceeded by 8.38G.": (24.13, 15.75),
    "Ran out of memory.": (None, None),
}


@pytest.fixture
def refusing(monkeypatch):
    """A function that makes every compilation fail with a message."""

    def refuse(message: str):
        def compile(self, *_, **__):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(jax.stages.Lowered, "compile", compile)

    return refuse


@pytest.mark.parametrize("message", REFUSALS)
def test_what_the_compiler_refuses_is_a_report(refusing, message):
    refusing(f"INTERNAL: while compiling: RESOURCE_EXHAUSTED: {message}\nmore")
    used, available = REFUSALS[message]
    config = plain(prior, batch_size=32, mesh=OVER_DATA, model=dict(remat="none"))
    found = preflight.inspect(config)
    assert found.fits is False and found.refusal == message and "--config.model.remat=all" in found.advice[0]
    assert found.total == (None if used is None else int(used * GIB))
    assert found.memory == (chips.memory_of(jax.devices()[0]) if used is None else int(available * GIB))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(models.build_stage(config))))
    assert 16 * numbers <= found.arguments <= 16 * numbers * 1.05
    assert found.model_flops > 0 and found.seconds is None and found.collectives == {}
    said = "\n".join(found.lines())
    assert "DOES NOT FIT" in said and message in said and ("? GiB" in said) == (used is None)
    assert json.loads(found.to_json())["fits"] is False


def test_other_failures_of_the_compiler_are_not_taken_for_it(refusing):
    refusing("INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        preflight.inspect(plain(prior))


# The command


def run(monkeypatch, config: dict, **given) -> int:
    """The status of the command with these flags."""
    values = (
        dict(topology=None, clip=None, frozen=None, sample=None, json=None, hlo=None, debug=False) | given
    )
    monkeypatch.setattr(command, "FLAGS", types.SimpleNamespace(config=config, **values))
    try:
        command.main(["preflight"])
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_status_says_whether_it_fits(monkeypatch, refusing, tmp_path, capsys):
    config = plain(prior, mesh=OVER_DATA)
    files = dict(json=str(tmp_path / "report.json"), hlo=str(tmp_path / "program.txt"))
    assert run(monkeypatch, config, **files) == 0
    assert "compiled in" in capsys.readouterr().out
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["fits"] is True and stored["program"] == "prior, a training step"
    assert "HloModule" in (tmp_path / "program.txt").read_text()
    monkeypatch.setattr(chips, "memory_of", lambda device: stored["total"] - 1)
    assert run(monkeypatch, config, json=files["json"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    refusing("RESOURCE_EXHAUSTED: Used 3.00G of 2.00G hbm.")
    assert run(monkeypatch, config, json=files["json"]) == 1
    assert "3.00 GiB of 2: DOES NOT FIT" in capsys.readouterr().out
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["fits"] is False and stored["total"] == 3 * GIB and stored["advice"]


@pytest.mark.parametrize(
    ("changes", "flags", "why"),
    [
        (dict(batch_size=6), {}, "does not split over the mesh's 8"),
        ({}, dict(sample=3), "--sample=3 does not split"),
        ({}, dict(topology="v5p:4"), "must be a version and its slice"),
        ({}, dict(clip="no/clip.py"), "no/clip.py"),
        ({}, dict(frozen=["tokenizer"]), "--frozen=tokenizer must be NAME=CONFIG"),
    ],
)
def test_settings_that_cannot_be_have_status_2(monkeypatch, capsys, changes, flags, why):
    assert run(monkeypatch, plain(prior, **changes), **flags) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: ") and why in said.err and not said.out


def test_the_flags_reach_the_command():
    command = [sys.executable, "-m", "dalle2_jax.preflight", "--config=configs/prior.py:debug"]
    said = subprocess.run([*command, "--config.batch_size=7"], capture_output=True, text=True, timeout=120)
    assert said.returncode == 2 and "batch_size / grad_accum=7 does not split" in said.stderr


# What it is of


def test_devices_are_known_by_their_kind():
    for version, kind in {
        "v4": "TPU v4",
        "v5e": "TPU v5 lite",
        "v5p": "TPU v5",
        "v6e": "TPU v6 lite",
        "tpu7x": "TPU7x",
    }.items():
        assert chips.chip_of(types.SimpleNamespace(device_kind=kind)) is chips.CHIPS[version]
    assert chips.chip_of(jax.devices()[0]) is None
    gpu = types.SimpleNamespace(platform="gpu", device_kind="H100", memory_stats=lambda: {"bytes_limit": 7})
    assert chips.memory_of(gpu) == 7
    silent = types.SimpleNamespace(platform="tpu", device_kind="TPU v5", memory_stats=lambda: None)
    assert chips.memory_of(silent) == 95 * GIB


def test_a_cpu_device_has_its_part_of_the_machine(monkeypatch, tmp_path):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = jax.devices()[0]
    assert 0 < chips.memory_of(device) <= machine / 8
    monkeypatch.setattr(chips.Path, "read_text", lambda self: "8000000\n")
    assert chips.memory_of(device) == 1e6
    monkeypatch.setattr(chips.Path, "read_text", lambda self: "max\n")
    assert chips.memory_of(device) == machine / 8


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:4", "v9:2x2x1", "v5p:axb", "2x2x1", "v5e:4x4x4", "v5p:8x8", "v5p:2x0x2"]
)
def test_a_topology_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="must be a version and its slice, such as v5p:4x4x4"):
        chips.topology_devices(name)


def test_a_slice_larger_than_there_are_is_refused():
    with pytest.raises(ValueError, match="a slice of v5e has at most 256 chips"):
        chips.topology_devices("v5e:16x32")


def test_settings_that_do_not_fit_the_mesh_are_refused_before_compiling():
    with pytest.raises(ValueError, match=r"batch_size / grad_accum=6 does not split over the mesh's 8"):
        preflight.inspect(plain(decoder64, batch_size=6))
    with pytest.raises(ValueError, match="does not fit the 8 cpu device"):
        preflight.inspect(plain(decoder64, mesh=dict(data=3, fsdp=1, tensor=1)))
    with pytest.raises(ValueError, match="chanels is not a setting; did you mean model.channels"):
        preflight.inspect(plain(decoder64, model=dict(chanels=3)))


# The compiler of TPUs itself


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"needs libtpu: pip install 'dalle2_jax\[tpu\]'"):
        chips.topology_devices("v5p:2x2x1")


def needs_libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs needs libtpu: pip install 'dalle2_jax[tpu]'")


def test_a_step_is_compiled_for_a_slice_that_is_not_there():
    needs_libtpu()
    config = plain(prior, mesh=dict(data=1, fsdp=4, tensor=1))
    found = preflight.inspect(config, "v5p:2x2x1")
    assert found.chips == 4 and found.device == "TPU v5" and found.memory == 95 * GIB
    assert 0 < found.total < GIB and found.seconds > 0 and 0 < found.utilisation() < 1
    assert found.collectives and found.link_seconds > 0


def test_a_chip_has_its_devices():
    needs_libtpu()
    for version, chip in chips.CHIPS.items():
        devices = chips.topology_devices(f"{version}:{'2x2x1' if chip.axes == 3 else '2x2'}")
        assert len(devices) == 4 * chip.devices and chips.chip_of(devices[0]) is chip
        assert chips.memory_of(devices[0]) == chip.memory


def test_the_devices_of_this_machine_get_what_described_ones_get(monkeypatch):
    """Described devices in the place of a TPU host's own."""
    needs_libtpu()
    config = plain(prior, mesh=dict(data=1, fsdp=4, tensor=1))
    described = chips.topology_devices("v5e:2x2")
    monkeypatch.setattr(jax, "devices", lambda *_: described)
    found = preflight.inspect(config)
    assert found.device == "TPU v5 lite" and found.memory == 16 * GIB
    assert found.seconds > 0 and found.link_seconds > 0 and 0 < found.utilisation() < 1


def test_the_compilers_own_refusal_is_read():
    needs_libtpu()
    config = plain(prior, batch_size=2**25, mesh=dict(data=1, fsdp=4, tensor=1))
    found = preflight.inspect(config, "v5e:2x2")
    assert found.fits is False and found.refusal and 15 * GIB < found.memory <= 16 * GIB < found.total
    assert "--config.grad_accum=2" in found.advice[0]


@pytest.mark.slow
def test_a_sampler_is_compiled_for_a_slice_that_is_not_there():
    needs_libtpu()
    for recipe in (prior, decoder64):
        config = plain(recipe, mesh=dict(data=4, fsdp=1, tensor=1))
        found = preflight.inspect(config, "v5e:2x2", sample=8)
        assert found.program.endswith("drawing") and found.batch_size == 8 and found.fits
        numbers = sum(x.size for x in jax.tree.leaves(models.abstract_params(models.build_stage(config))))
        assert found.arguments > 4 * numbers  # whole on every chip
        assert found.seconds > 0 and 0 < found.utilisation() < 1
