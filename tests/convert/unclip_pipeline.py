"""Karlo in small: diffusers' UnCLIPPipeline with random weights, for tests and comparisons."""

import json

import diffusers
import torch
import transformers

from tests.convert import clip_tokenizer

LENGTH, EMBED, SIDE, LARGE = 8, 32, 8, 16


def randomise(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "embedding" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def write(folder, *, embed=EMBED, length=LENGTH, side=SIDE, large=LARGE, heads=2, depth=2):
    """An UnCLIPPipeline with random weights, saved in a folder; several heads, scale and shift, added times.

    side, large: of the decoder's pictures and the upsampler's. heads, depth: of the prior.
    """
    from diffusers.pipelines.deprecated.unclip import text_proj

    torch.manual_seed(0)
    vocab = clip_tokenizer.write(folder / "tokenizer", length)
    text = transformers.CLIPTextConfig(
        hidden_size=embed,
        intermediate_size=4 * embed,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=embed,
        vocab_size=vocab,
        max_position_embeddings=length,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=0,
    )
    unets = dict(block_out_channels=(128, 256), layers_per_block=1, attention_head_dim=64)
    decoder = dict(
        sample_size=side,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=48,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    above = dict(
        sample_size=large,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        add_attention=False,
    )
    scheduler = diffusers.UnCLIPScheduler
    parts = dict(
        text_encoder=transformers.CLIPTextModelWithProjection(text),
        prior=diffusers.PriorTransformer(
            num_attention_heads=heads,
            attention_head_dim=16,
            num_layers=depth,
            embedding_dim=embed,
            num_embeddings=length,
        ),
        text_proj=text_proj.UnCLIPTextProjModel(
            clip_embeddings_dim=embed, time_embed_dim=512, cross_attention_dim=48
        ),
        decoder=diffusers.UNet2DConditionModel(**unets, **decoder),
        super_res_first=diffusers.UNet2DModel(**unets, **above),
        super_res_last=diffusers.UNet2DModel(**unets, **above),
    )
    parts = {name: randomise(model, seed) for seed, (name, model) in enumerate(parts.items())}
    with torch.no_grad():
        parts["prior"].clip_std.uniform_(0.5, 2.0)
    made = diffusers.UnCLIPPipeline(
        **parts,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        prior_scheduler=scheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        decoder_scheduler=scheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=scheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_proj"][0] = "unclip"  # as Karlo's own says
    (folder / "model_index.json").write_text(json.dumps(index))
    return made
