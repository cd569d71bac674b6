"""The metrics, a module each, which lists them in METRICS: name -> `PictureMetric` or `ModelMetric`."""

import importlib
import pkgutil

from dalle2_jax.evaluate.metric import ModelMetric, PictureMetric

METRICS: dict[str, PictureMetric | ModelMetric] = {}
for _found in pkgutil.iter_modules(__path__):
    METRICS |= importlib.import_module(f"{__name__}.{_found.name}").METRICS

OF_PICTURES = {name: metric for name, metric in METRICS.items() if isinstance(metric, PictureMetric)}
OF_MODELS = {name: metric for name, metric in METRICS.items() if isinstance(metric, ModelMetric)}
