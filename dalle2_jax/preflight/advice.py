"""What to change where a program does not fit, or waits for its links: flags that would be accepted."""

import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping

from dalle2_jax.models.nets import layers
from dalle2_jax.preflight import chips
from dalle2_jax.preflight.report import Report
from dalle2_jax.train.plan import Plan, make_plan


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is looked at: a config (plain JSON types), a described slice (None: the devices of this machine),
    how many examples are drawn (None: a training step)."""

    config: dict
    topology: str | None = None
    sample: int | None = None

    def plan(self) -> Plan:
        """The plan of it. Raises ValueError for settings that cannot go together; nothing is compiled."""
        devices = chips.topology_devices(self.topology) if self.topology else None
        return make_plan(self.config, devices=devices, sample=self.sample)

    def changed(self, settings: Mapping[str, object]) -> "Asked":
        """The same with these flags, such as {'config.mesh.data': 1, 'topology': 'v5p:4x4x8'}."""
        config, own = copy.deepcopy(self.config), {}
        for name, value in settings.items():
            first, *inner = name.split(".")
            if inner:
                functools.reduce(operator.getitem, inner[:-1], config)[inner[-1]] = value
            else:
                own[first] = value
        return dataclasses.replace(self, config=config, **own)

    def first_accepted(self, alternatives: Iterable[Mapping[str, object]]) -> str:
        """The first of the settings that would not be refused, as flags; '' if all would be."""
        for settings in alternatives:
            try:
                self.changed(settings).plan()
            except ValueError:
                continue
            return " ".join(f"--{name}={value}" for name, value in settings.items())
        return ""


def advise(report: Report, asked: Asked, slices: int = 1) -> tuple[str, ...]:
    """What to change, a sentence each: flags that would be accepted, `or` between them. Nothing where a
    program fits and computes longer than its links need. slices: of the devices.
    """
    if report.fits is False:
        why, offers = (_offers_drawing if asked.sample else _offers_training)(report, asked, slices)
    elif asked.sample is None and (report.link_seconds or 0) > (report.seconds or math.inf):
        why, offers = "the links take longer than the arithmetic", _offers_links(report, asked)
    else:
        return ()
    found = [flag for flag in map(asked.first_accepted, offers) if flag]
    if found or report.fits is not False:
        return (": ".join([why, *([" or ".join(found)] if found else [])]),)
    return (f"{why}, and no setting helps: take chips with more memory, or more of them",)


def _offers_training(report: Report, asked: Asked, slices: int):
    """(why a step does not fit, lists of settings of which the first that is accepted is offered)."""
    config, mesh = asked.config, report.mesh
    whole = {"config.mesh.data": slices, "config.mesh.fsdp": -1}
    twice = {"config.mesh.tensor": 2 * mesh["tensor"]}
    larger = {"topology": chips.resized(asked.topology, larger=True)} if asked.topology else {}
    more_chips = [larger, larger | whole, larger | whole | twice] if larger else []
    if report.temporaries is not None and report.arguments > report.temporaries:
        if mesh["data"] > slices:
            return "the state takes most, and `data` repeats it", [[whole]]
        return "the state takes most, and is split over every chip", [more_chips]
    size, accum = config["batch_size"], config["grad_accum"]
    each = size // accum // (mesh["data"] * mesh["fsdp"])
    remat = config["model"].get("remat", "none")
    remat = {True: "all", False: "none"}.get(remat, remat)
    stronger = layers.REMAT[layers.REMAT.index(remat) + 1 :] if remat in layers.REMAT else ()
    offers = [[{"config.model.remat": what}] for what in stronger]
    offers.append([{"config.grad_accum": n} for n in range(accum + 1, size + 1) if size % n == 0])
    if each == 1:  # an example can only be split inside its layers
        offers.append([whole | twice | {"config.grad_accum": 2 * accum}])
    return f"activations take most, of {each} examples a chip", [*offers, more_chips]


def _offers_drawing(report: Report, asked: Asked, slices: int):
    """As `_offers_training`; parameters are whole on every chip, so neither mesh nor more chips help."""
    needed = report.memory if report.total is None else report.total
    one_each = {"config.mesh.data": -1, "config.mesh.fsdp": 1, "config.mesh.tensor": 1}
    roomier = []
    for version, chip in sorted(chips.CHIPS.items(), key=lambda item: item[1].memory):
        if asked.topology and chip.memory > needed:
            name = f"{version}:{'2x2x1' if chip.axes == 3 else '2x2'}"
            roomier += [{"topology": name}, {"topology": name} | one_each]
    if report.temporaries is not None and report.arguments > report.temporaries:
        return "the parameters take most, and every chip has all of them", [roomier]
    shards = report.mesh["data"] * report.mesh["fsdp"]
    each = asked.sample // shards
    offers = [[{"sample": shards * (each // 2)}]] if each > 1 else []
    if asked.config["model"].get("dtype", "float32") == "float32":
        offers.append([{"config.model.dtype": "bfloat16"}])
    return f"activations take most, of {each} examples a chip", [*offers, roomier]


def _offers_links(report: Report, asked: Asked):
    """Lists of settings with which fewer bytes go over the links, as far as there is memory for them."""
    room = math.inf if report.memory is None else report.memory - report.total
    offers = []
    if report.arguments <= room:
        offers.append([{"config.mesh.data": 2 * report.mesh["data"], "config.mesh.fsdp": -1}])
    if asked.topology and report.total <= room:
        offers.append([{"topology": chips.resized(asked.topology, larger=False)}])
    return offers
