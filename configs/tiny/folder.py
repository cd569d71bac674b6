"""Your own folder of pictures, twenty to a few thousand: captions -> 32 x 32, ten minutes on two cores.

python -m dalle2_jax.train --config=configs/tiny/folder.py --workdir=DIR --config.data.path=FOLDER

FOLDER has pictures with metadata.jsonl, metadata.csv or KEY.txt beside KEY.jpg, or a folder of pictures for
each class, whose name is then the caption. The decoder reads captions alone, as GLIDE's, so it needs no CLIP.
All pictures are trained on (a folder FOLDER/val, if there is one, is held out), and the last samples show
captions of the folder. Most of the arithmetic is at 8 x 8 and 16 x 16; at 32 x 32 there are 16 channels.
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=850, batch_size=32, learning_rate=2e-3)
    config.stage = "decoder"
    config.data.update(source="folder", path="", class_captions=True, max_bad_fraction=0.05)
    config.tokenizer.update(vocab_size=2048, context_length=40)
    config.model = dict(
        image_size=32,
        embed_dim=0,
        channels=32,
        channel_mult=(0.5, 1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(8,),
        head_dim=32,
        dropout=0.0,
        text=dict(vocab_size=2048, context_length=40, width=96, depth=2, num_heads=4),
        text_drop=0.15,
        objective="v",
        learned_variance=False,
        num_steps=50,
        method="ddim",
        guidance_scale=2.0,
        net=dict(resample="conv"),
    )
    config.optim.update(beta2=0.99, muon_learning_rate=0.02, final_fraction=0.1)
    config.eval_batches = 1
    config.sample_every = 425
    return config
