"""Programs looked at before they run: bytes, arithmetic, what goes over the links, and what is refused."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import clip, decoder64, prior
from dalle2_jax import flops, metrics, models, partition, preflight
from dalle2_jax.preflight import GIB, Collective


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
    found = preflight.collectives(compiled(lambda x: x * 2, ((8, 64), P("fsdp")), P()))
    assert found == {"all-gather": Collective(1, 8 * 64 * 4 * 3 / 4)}


def test_a_sum_over_chips_is_counted_and_once_a_turn_of_a_loop():
    def contract(x, w):
        return x @ w

    shapes = ((8, 64), P(None, ("data", "fsdp"))), ((64, 16), P(("data", "fsdp"), None))
    found = preflight.collectives(compiled(contract, *shapes, P()))
    assert found == {"all-reduce": Collective(1, 2 * 8 * 16 * 4 * 7 / 8)}

    def loop(x, w):
        def turn(carry, _):
            return jnp.tanh(carry @ w) @ jnp.ones((16, 64)), None

        return jax.lax.scan(turn, x, None, length=5)[0]

    looped = preflight.collectives(compiled(loop, *shapes, P(None, ("data", "fsdp"))))
    assert looped["all-reduce"].count == 5
    assert looped["all-reduce"].bytes == 5 * found["all-reduce"].bytes


def test_nothing_is_sent_where_all_is_whole():
    assert preflight.collectives(compiled(lambda x: x @ x.T, ((8, 64), P("data")), P("data"))) != {}
    assert preflight.collectives(compiled(lambda x: x * 2, ((8, 64), P("data")), P("data"))) == {}


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
    assert preflight.collectives(text) == {
        "all-gather": Collective(1, 32 * 32 * 2 * 3 / 4),
        "all-to-all": Collective(1, 32 * 32 * 2 * 7 / 8),
        "reduce-scatter": Collective(1, 16 * 8 * 4 * 3),
        "collective-permute": Collective(1, 16),
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
    assert preflight.scheduled_cycles(text) == (7 + 5 * 10, 0)
    counted = """
%cond.1 (q: u32[]) -> pred[] {
  %n = u32[]{:T(128)} constant(3)
  ROOT %l = pred[] compare(%q, %n), direction=LT
}
""" + text.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert preflight.scheduled_cycles(counted) == (7 + 3 * 10, 0)
    unknown = text.replace('"7"', f'"{2**64 - 1}"')
    assert preflight.scheduled_cycles(unknown) == (5 * 10, 1)
    assert preflight.scheduled_cycles(compiled(lambda x: x * 2, ((8, 64), P("data")), P("data"))) == (0, 0)


def test_the_clock_of_each_chip_goes_with_its_peak():
    cells = dict(v4=8 * 128**2, v5e=4 * 128**2, v5p=8 * 128**2, v6e=4 * 256**2)
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    assert cells.keys() == preflight.CHIPS.keys()
    for name, chip in preflight.CHIPS.items():
        assert 2 * cells[name] * chip.clock == pytest.approx(metrics.peak_flops(kinds[name]), rel=0.005)


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
    alone, both = reports["data"], preflight.inspect(config, clip_config=str(path))
    assert both.arguments - alone.arguments > 3 * numbers and both.parameters == alone.parameters
    assert both.model_flops > alone.model_flops
    wrong = plain(prior, model=dict(embed_dim=48))
    with pytest.raises(ValueError, match="has embeddings of 32 entries, the stage reads 48"):
        preflight.inspect(wrong, clip_config=str(path))


def test_drawing_is_looked_at_too():
    config = plain(prior, mesh=dict(data=8, fsdp=1, tensor=1))
    report, stage = preflight.inspect(config, sample=8), models.build_stage(config)
    assert report.program == "prior, drawing" and report.batch_size == 8
    one = flops.of_step(stage, stage.batch_spec(8)) / flops.TRAINING_PASSES
    steps = config["model"]["num_steps"]
    assert steps * one <= report.model_flops <= 4.2 * steps * one  # guided, two candidates
    with pytest.raises(ValueError, match="'clip' does not draw"):
        preflight.inspect(plain(clip), sample=8)
    with pytest.raises(ValueError, match="--sample=3 does not split over the mesh's 8"):
        preflight.inspect(plain(decoder64), sample=3)


# What is said


def report(**changes) -> preflight.Report:
    made = preflight.Report(
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
        code=0,
        memory=95 * GIB,
        model_flops=64 * 200 * 10**12,
        compiler_flops=270e12,
        seconds=1.0,
        untold=0,
        optimal_seconds=0.9,
        peak=459e12,
        collectives={"all-gather": Collective(300, 60e9)},
        link_seconds=0.1,
        compile_seconds=1000.0,
    )
    return dataclasses.replace(made, **changes)


def test_numbers_follow_from_each_other():
    found = report()
    assert found.total == 32 * GIB and found.advice() == []
    assert found.utilisation() == pytest.approx(200 / 459)
    assert found.utilisation(0.1) == pytest.approx(200 / 459 / 1.1)
    stored = json.loads(found.to_json())
    assert stored["utilisation_with_links"] == pytest.approx(200 / 459 / 1.1) and stored["total"] == 32 * GIB
    said = "\n".join(found.lines())
    for part in (
        "3.500B parameters",
        "32.00 GiB of 95: fits",
        "100.0 ms",
        "900.0 ms",
        "43.6%",
        "39.6%",
        "2048 examples/s",
    ):
        assert part in said, part
    assert "knows no time" not in said and "3 operations" in "\n".join(report(untold=3).lines())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (dict(temporaries=200 * GIB), "activations take most, of 32 examples a chip"),
        (dict(arguments=200 * GIB), "is split over every chip: take a larger topology"),
        (dict(arguments=200 * GIB, mesh=dict(data=64, fsdp=1, tensor=1)), "split it further"),
        (dict(link_seconds=2.0), "links take longer"),
    ],
)
def test_what_does_not_fit_gets_advice(changes, part):
    (sentence,) = report(**changes).advice()
    assert part in sentence
    assert ("DOES NOT FIT" in "\n".join(report(**changes).lines())) == ("links" not in part)


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:4", "v9:2x2x1", "v5p:axb", "2x2x1", "v5e:4x4x4", "v5p:8x8", "v5p:2x0x2"]
)
def test_a_topology_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="must be a version and its slice, such as v5p:4x4x4"):
        preflight.topology_devices(name)


def test_settings_that_do_not_fit_the_mesh_are_refused_before_compiling():
    with pytest.raises(ValueError, match=r"batch_size / grad_accum=6 does not split over the mesh's 8"):
        preflight.inspect(plain(decoder64, batch_size=6))
    with pytest.raises(ValueError, match="does not fit the 8 cpu device"):
        preflight.inspect(plain(decoder64, mesh=dict(data=3, fsdp=1, tensor=1)))
    with pytest.raises(ValueError, match="chanels is not a setting; did you mean model.channels"):
        preflight.inspect(plain(decoder64, model=dict(chanels=3)))


# The compiler of TPUs itself


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"needs libtpu: pip install 'dalle2_jax\[tpu\]'"):
        preflight.topology_devices("v5p:2x2x1")


def test_a_step_is_compiled_for_a_slice_that_is_not_there():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs needs libtpu: pip install 'dalle2_jax[tpu]'")
    config = plain(prior, mesh=dict(data=1, fsdp=4, tensor=1))
    found = preflight.inspect(config, "v5p:2x2x1")
    assert found.chips == 4 and found.device == "TPU v5" and found.memory == 95 * GIB
    assert 0 < found.total < GIB and found.seconds > 0 and 0 < found.utilisation() < 1
    assert found.collectives and found.link_seconds > 0
