"""VQGANs of taming-transformers: a Lightning checkpoint (last.ckpt), with a book or Gumbel codes.

Sizes follow from the tensors, for pictures of 256 x 256. The networks of the losses (`loss.*`) are left out:
training goes on with the likelihood alone.
"""

import re
from pathlib import Path

import numpy as np

from dalle2_jax.convert.tables import CONV, SAME, Imported, Layout, Row, read_stage
from dalle2_jax.convert.tensors import Tensors, open_tensors
from dalle2_jax.runtime import modeldir

HELP = "VQGAN of taming-transformers, a .ckpt file"
LICENCE = "MIT, those of taming-transformers; of other weights in this layout ask their makers"
IMAGE_SIZE = 256
# A Dense kernel [in, out] as a convolution [out, in, 1, 1].
POINT = Layout(lambda x, n: [x.T[..., None, None]], lambda xs: xs[0][..., 0, 0].T)
# our names -> theirs, one after the other
_NAMES = (
    (r"^net/", ""),
    (r"^decoder_out/", "decoder/conv_out/"),
    (r"^proj/", "quantize/proj/"),
    (r"/mid_res_0/", "/mid/block_1/"),
    (r"/mid_attn/", "/mid/attn_1/"),
    (r"/mid_res_1/", "/mid/block_2/"),
    (r"/(down|up)_(\d+)_res_(\d+)/", r"/\1/\2/block/\3/"),
    (r"/(down|up)_(\d+)_attn_(\d+)/", r"/\1/\2/attn/\3/"),
    (r"/down_(\d+)_down/", r"/down/\1/downsample/conv/"),
    (r"/up_(\d+)_up/", r"/up/\1/upsample/conv/"),
    (r"/skip/", "/nin_shortcut/"),
    (r"(attn/\d+|attn_1)/out/", r"\1/proj_out/"),
    (r"/(kernel|scale)$", "/weight"),
)


def rows(params) -> list[Row]:
    """The table of a tokenizer with net.kind='vqgan'."""
    found = []
    for name, leaf in modeldir.flatten(params).items():
        if name.startswith("stats/"):
            continue
        theirs = name
        for ours, pattern in _NAMES:
            theirs = re.sub(ours, pattern, theirs)
        if name == "book_0/embedding":
            theirs = f"quantize/{'embed' if 'proj' in params['net'] else 'embedding'}/weight"
        layout = {4: CONV, 2: POINT}.get(leaf.ndim, SAME) if name.endswith("kernel") else SAME
        found.append(Row(name, (theirs.replace("/", "."),), layout))
    return found


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The tokenizer in the file `source`."""
    tensors = open_tensors(source)
    return Imported({"tokenizer": read(tensors)}, None, [tensors], LICENCE)


def read(tensors: Tensors) -> tuple[dict, dict]:
    """(config, parameters) of a VQGAN's tensors."""
    levels: set[int] = set()
    blocks: set[int] = set()
    attending: set[int] = set()
    for name in tensors.shapes:
        if found := re.match(r"encoder\.down\.(\d+)\.(block|attn)\.(\d+)\.", name):
            level, part, block = int(found[1]), found[2], int(found[3])
            levels.add(level)
            (attending if part == "attn" else blocks).add(level if part == "attn" else block)
    channels = tensors.shape("encoder.conv_in.weight")[0]
    widths = [tensors.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in sorted(levels)]
    gumbel = "quantize.proj.weight" in tensors.shapes
    num_codes, width = tensors.shape(f"quantize.{'embed' if gumbel else 'embedding'}.weight")
    net = dict(
        kind="vqgan",
        channels=channels,
        channel_mult=[each // channels for each in widths],
        num_res_blocks=len(blocks),
        attention_resolutions=[IMAGE_SIZE // 2**level for level in sorted(attending)],
        z_channels=tensors.shape("encoder.conv_out.weight")[0],
    )
    # taming's weights of losses: of the KL a mean over positions, 5e-4, here a sum over a picture's values
    kl = 5e-4 * 3 * 4 ** (len(widths) - 1)
    of_gumbel = dict(kind="gumbel", tau=[1.0, 1.0, 1], beta=[kl, kl, 1], bias=False)
    quantizer = of_gumbel if gumbel else dict(kind="vq", decay=0.0)
    quantizer |= dict(num_codes=num_codes, width=width)
    model = dict(image_size=IMAGE_SIZE, net=net, quantizer=quantizer, likelihood="l1")
    config = {"stage": "tokenizer", "model": model}
    leaves = tokenizer_statistics(num_codes)
    return read_stage(config, rows, tensors, leaves=leaves, ignored=r"loss\..*")


def tokenizer_statistics(num_codes: int) -> dict:
    """The leaves of a tokenizer's statistics that weights of others lack: the use of its codes."""
    return {"stats/since_0": np.zeros(num_codes, np.float32)}
