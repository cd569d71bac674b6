"""The stages: CLIP, prior, decoder, upsamplers. One file each, with `build(**config)` and a frozen dataclass.

All that training knows of a stage is

    batch_spec(batch_size) -> shapes and types of the fields that `loss` reads
    init(key, batch) -> params
    loss(params, key, batch, *, train=True) -> (scalar, dict of scalars)
    sample(params, keys, batch, ...) -> array          (CLIP has encode_image and encode_text instead)
    draws = 'image'                                    (with sample: the field of a batch that it makes)
    project(params) -> params                          (optional: applied after every update)
    observe(params, observed) -> params                (optional: notes what the loss 'observed', every step)
    fit_rows, fit(params, batches) -> params, scalars  (optional: statistics of the data, before training)
    measure(params, key, batch) -> statistics          (optional: of the trained network, after training)

and generating of its keyword arguments for `sample`: the dict `sampling` has their defaults. Statistics are
the leaves of params['stats']: stored with the parameters in float32, without gradient and weight decay.

A stage holds networks and settings, never parameters.
"""

from collections.abc import Collection, Mapping

from dalle2_jax.runtime.names import nearest


def check_settings(
    settings: Mapping, required: Collection[str], optional: Collection[str], what: str
) -> None:
    """Raise ValueError where the sub-config `what` has an unknown key (naming the nearest) or lacks one."""
    known = (*required, *optional)
    for name in settings:
        if name not in known:
            near = nearest(name, known, show=str)
            hint = f"did you mean {what}.{near}?" if near else f"it has {', '.join(sorted(known))}"
            raise ValueError(f"{what}.{name} is not a setting; {hint}")
    missing = [name for name in required if name not in settings]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(f'{what}.{name}' for name in missing)}")
