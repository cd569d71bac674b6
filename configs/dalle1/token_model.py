"""DALL-E 1's transformer, 12.3B parameters: 256 tokens of a caption, then 32 x 32 codes of 8192.

    python -m dalle2_jax.train --config=configs/dalle1/token_model.py --workdir=DIR
    --config.data.path=SHARDS --config.frozen.tokenizer=DVAE

The paper halves the learning rate five times, where the loss stops to fall; here it falls by a cosine to the
same end. The paper's average of .99 is taken every 25 updates. The paper also clips the second moment of
AdamW at 5; here it is not clipped. It crops near the centre, this recipe at the centre. `:debug` is the same
code in small.
"""

from dalle2_jax.configs import common

DEPTH = 64
# the last block is convolutional; of the others every fourth, from the second on, reads columns
KINDS = tuple("conv11" if i == DEPTH - 1 else "column" if i % 4 == 1 else "row" for i in range(DEPTH))


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.check_preset(preset, ("debug",))
    config = common.get_config()
    config.stage = "token_model"
    config.model = dict(
        grids=((32, 32),),
        num_codes=(8192,),
        text=dict(vocab_size=16_384, context_length=256),
        net=dict(width=3968, depth=DEPTH, num_heads=62, kinds=KINDS, scan_blocks=True),
        text_weight=1 / 8,
        remat="all",
        dtype="bfloat16",
    )
    config.frozen.tokenizer = ""  # workdir or model directory of the dVAE
    config.tokenizer.update(vocab_size=16_384, context_length=256)
    config.data.bpe_dropout = 0.1
    config.optim.update(learning_rate=4.5e-4, warmup_steps=5000, schedule="cosine", final_fraction=1 / 32)
    config.optim.update(beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, grad_clip=4.0)
    config.batch_size = 1024
    config.num_steps = 430_000
    config.ema_decay = 0.99 ** (1 / 25)
    config.mesh.update(data=1, fsdp=-1)
    if preset == "debug":
        common.debug(
            config,
            dict(
                grids=((4, 4),),
                num_codes=(32,),
                text=dict(vocab_size=512, context_length=32),
                net=dict(width=32, depth=2, num_heads=2, kinds=("row", "conv3"), scan_blocks=True),
            ),
        )
    return config
