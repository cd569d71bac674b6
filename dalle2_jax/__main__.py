"""python -m dalle2_jax: lists the commands."""

COMMANDS = {
    "train": "train one stage, or go on with it",
    "generate": "captions to pictures",
    "edit": "pictures to pictures: variations, paths, inpainting, inversion",
    "evaluate": "measure a model directory, or pictures: FID, CLIP score and more",
    "embed": "compute the CLIP embeddings of a dataset, to train from",
    "convert": "make a model directory of workdirs or of weights of others; and out again",
    "preflight": "compile a training step for devices that are not there: memory and time",
    "benchmark": "measure how fast a stage is on this machine",
    "studio": "a page in the browser to draw and edit with",
}

if __name__ == "__main__":
    print("python -m dalle2_jax.COMMAND --help: its flags\n")
    for name, text in COMMANDS.items():
        print(f"  {name:10} {text}")
