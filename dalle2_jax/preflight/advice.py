"""Advice for a program that does not fit, or that waits for its links: flags that preflight accepts."""

import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from dalle2_jax.models.nets import layers
from dalle2_jax.preflight import chips
from dalle2_jax.preflight.report import Report
from dalle2_jax.train.plan import Plan, make_plan

Offers = list[list[dict[str, Any]]]  # lists of settings; the first of each list that is accepted is offered


@dataclasses.dataclass(frozen=True)
class Setup:
    """A program to inspect: config (plain JSON types), topology (None: the devices of this machine), number
    of examples to draw (None: a training step)."""

    config: dict
    topology: str | None = None
    sample: int | None = None

    def plan(self) -> Plan:
        """Its plan. Raises ValueError for settings that do not fit together; compiles nothing."""
        devices = chips.topology_devices(self.topology) if self.topology else None
        return make_plan(self.config, devices=devices, sample=self.sample)

    def changed(self, settings: Mapping[str, Any]) -> "Setup":
        """A copy with these flags, such as {'config.mesh.data': 1, 'topology': 'v5p:4x4x8'}."""
        changes: dict[str, Any] = {"config": copy.deepcopy(self.config)}
        for name, value in settings.items():
            *outer, last = name.split(".")
            functools.reduce(operator.getitem, outer, changes)[last] = value
        return dataclasses.replace(self, **changes)

    def first_accepted(self, alternatives: Iterable[Mapping[str, Any]]) -> str:
        """The first of the settings that make a valid plan, as flags; '' if none does."""
        for settings in alternatives:
            try:
                self.changed(settings).plan()
            except ValueError:
                continue
            return " ".join(f"--{name}={value}" for name, value in settings.items())
        return ""


def advise(report: Report, setup: Setup, slices: int = 1) -> tuple[str, ...]:
    """Sentences of advice: flags that are accepted, `or` between them. None for a program that fits and
    computes longer than its links need. slices: of the devices.
    """
    if report.fits is False:
        why, offers = (_offers_drawing if setup.sample else _offers_training)(report, setup, slices)
    elif setup.sample is None and (report.link_seconds or 0) > (report.seconds or math.inf):
        why, offers = "the links take longer than the arithmetic", _offers_links(report, setup)
    else:
        return ()
    found = [flag for flag in map(setup.first_accepted, offers) if flag]
    if found or report.fits is not False:
        return (": ".join([why, *([" or ".join(found)] if found else [])]),)
    return (f"{why}, and no setting helps: take chips with more memory, or more of them",)


def _offers_training(report: Report, setup: Setup, slices: int) -> tuple[str, Offers]:
    """(why a step does not fit, offers)."""
    config, mesh = setup.config, report.mesh
    split: dict[str, Any] = {"config.mesh.data": slices, "config.mesh.fsdp": -1}
    twice = {"config.mesh.tensor": 2 * mesh["tensor"]}
    larger: dict[str, Any] = {}
    if setup.topology:
        larger = {"topology": chips.resized(setup.topology, larger=True)}
    more_chips = [larger, larger | split, larger | split | twice] if larger else []
    if report.temporaries is not None and report.arguments > report.temporaries:
        if mesh["data"] > slices:
            return "the state takes most, and `data` repeats it", [[split]]
        return "the state takes most, and is split over every chip", [more_chips]
    size, accum = config["batch_size"], config["grad_accum"]
    each = size // accum // (mesh["data"] * mesh["fsdp"])
    remat = config["model"].get("remat", "none")
    remat = {True: "all", False: "none"}.get(remat, remat)
    stronger = layers.REMAT[layers.REMAT.index(remat) + 1 :] if remat in layers.REMAT else ()
    offers: Offers = [[{"config.model.remat": name}] for name in stronger]
    offers.append([{"config.grad_accum": n} for n in range(accum + 1, size + 1) if size % n == 0])
    if each == 1:  # an example can only be split inside its layers
        offers.append([split | twice | {"config.grad_accum": 2 * accum}])
    return f"activations take most, of {each} examples a chip", [*offers, more_chips]


def _offers_drawing(report: Report, setup: Setup, slices: int) -> tuple[str, Offers]:
    """As `_offers_training`; every chip has all parameters, so neither mesh nor more chips help."""
    needed = report.total or report.memory or 0
    one_each = {"config.mesh.data": -1, "config.mesh.fsdp": 1, "config.mesh.tensor": 1}
    roomier: list[dict[str, Any]] = []
    for version, chip in sorted(chips.CHIPS.items(), key=lambda item: item[1].memory):
        if setup.topology and chip.memory > needed:
            name = f"{version}:{'2x2x1' if chip.axes == 3 else '2x2'}"
            roomier += [{"topology": name}, {"topology": name} | one_each]
    if report.temporaries is not None and report.arguments > report.temporaries:
        return "the parameters take most, and every chip has all of them", [roomier]
    shards = report.mesh["data"] * report.mesh["fsdp"]
    each = report.batch_size // shards
    offers: Offers = [[{"sample": shards * (each // 2)}]] if each > 1 else []
    if setup.config["model"].get("dtype", "float32") == "float32":
        offers.append([{"config.model.dtype": "bfloat16"}])
    return f"activations take most, of {each} examples a chip", [*offers, roomier]


def _offers_links(report: Report, setup: Setup) -> Offers:
    """Offers that send fewer bytes over the links, as far as the memory allows."""
    needed = report.total or 0
    room = math.inf if report.memory is None else report.memory - needed
    offers: Offers = []
    if report.arguments <= room:
        offers.append([{"config.mesh.data": 2 * report.mesh["data"], "config.mesh.fsdp": -1}])
    if setup.topology and needed <= room:
        offers.append([{"topology": chips.resized(setup.topology, larger=False)}])
    return offers
