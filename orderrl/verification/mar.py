"""Replay what the published MAR code computed, from the recorded inputs."""

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from orderrl.backbones.diffloss import GaussianDiffusion, respaced_timesteps
from orderrl.backbones.mar import MAR, MARConfig
from orderrl.verification.family import load_recorded
from orderrl.verification.fixture import Fixture

_DEFAULTS: dict[str, Any] = {"img_size": 256, "vae_stride": 16, "vae_embed_dim": 16}  # of the published constructor
_SAME_NAME = {item.name for item in fields(MARConfig)} - {"height", "width", "norm_eps"}
_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


def config_of(fixture: Fixture) -> MARConfig:
    """The model's shape from the published constructor's arguments, in their ranges; others take its defaults."""
    if fixture.constructor != "MAR":
        raise ValueError(f"{fixture.path}: constructor must be 'MAR', got {fixture.constructor!r}")
    arguments = _DEFAULTS | fixture.arguments
    side = int(arguments["img_size"]) // int(arguments["vae_stride"]) // int(arguments.get("patch_size", 1))
    shape = {name: arguments[name] for name in _SAME_NAME & arguments.keys()}
    if "num_sampling_steps" in shape:
        shape["num_sampling_steps"] = int(shape["num_sampling_steps"])
    stated = re.search(rf"eps ({_NUMBER})", str(fixture.description["config"].get("norm_layer", "")))
    if stated:
        shape["norm_eps"] = float(stated.group(1))
    return MARConfig(height=side, width=side, **shape)


@torch.no_grad()
def replay(fixture: Fixture) -> dict[str, Tensor]:
    """Every recorded output by name, computed by our model from the recorded weights and inputs."""
    model = load_recorded(MAR(config_of(fixture)), fixture)
    groups: list[tuple[str, Callable[[MAR, Fixture], dict[str, Tensor]]]] = [
        (r"tokens|enc|dec|dec_null", _transformer),
        (r"diff_\w+|x_t|forward_loss", _losses),
        (r"net_out|net_cfg_out", _network),
        (r"step_\w+", _steps),
        (r"(gen|train)_\w+|respaced_\d+", _schedules),
        (r"sample_\w+", _samples),
    ]
    computed: dict[str, Tensor] = {}
    for pattern, compute in groups:
        if any(re.fullmatch(pattern, name) for name in fixture.outputs):
            computed |= compute(model, fixture)
    return computed


def tolerances(fixture: Fixture) -> dict[str, float | Tensor]:
    """Tolerances that `numerics` states in words, for the outputs concerned; the others are `Fixture.tolerance`'s.

    Returns:
        By output name a number, or a tensor that broadcasts against the output where rows differ: the reverse step at
        the first index of the chain magnifies rounding.
    """
    stated: dict[str, float | Tensor] = {}
    for key, text in fixture.description.get("numerics", {}).items():
        general = re.match(_NUMBER, text) if isinstance(text, str) else None
        if not key.startswith("suggested_tolerance_") or general is None:
            continue
        subject = key.removeprefix("suggested_tolerance_")
        also = re.findall(r"and so (\w+)", text)
        for name in fixture.outputs:
            whole_kind = subject.endswith("_outputs") and name.startswith(subject.removesuffix("outputs"))
            if whole_kind or name == subject or name in also:
                stated[name] = float(general.group())
        for number, names in re.findall(rf"({_NUMBER}) for (\w+(?:(?:, | and )[a-z]\w*)*)", text):
            for name in set(re.split(r", | and ", names)) & fixture.outputs.keys():
                first = fixture.inputs["step_t"].cpu() == config_of(fixture).num_sampling_steps - 1  # (rows,)
                stated[name] = torch.where(first, float(number), float(general.group()))[:, None]
    return stated


def _transformer(model: MAR, fixture: Fixture) -> dict[str, Tensor]:
    """Tokens, encoder and decoder outputs."""
    tokens, visible, labels = _state(model, fixture)
    encoded = model.encode(tokens, visible, labels)
    no_class = torch.full_like(labels, model.config.class_num)
    return {
        "tokens": tokens,
        "enc": encoded,
        "dec": model.decode_positions(encoded, visible),
        "dec_null": model.conditions(tokens, visible, no_class),
    }


def _state(model: MAR, fixture: Fixture) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (M, N, C), visible (M, N), labels (M,) of the recorded images."""
    inputs = fixture.inputs
    return model.patchify(inputs["latents"]), inputs["mask"] == 0, inputs["labels"]


def _losses(model: MAR, fixture: Fixture) -> dict[str, Tensor]:
    """Diffusion loss of every token, and the masked mean over all tokens and repetitions."""
    inputs = fixture.inputs
    tokens, visible, labels = _state(model, fixture)
    z = model.conditions(tokens, visible, labels)
    mse, vb = model.diffloss.losses(z, tokens, inputs["t"], inputs["noise"])
    computed = {
        "diff_loss": mse + vb,
        "diff_mse": mse,
        "diff_vb": vb,
        "x_t": model.diffloss.train_diffusion.noised(tokens, inputs["t"], inputs["noise"]),
    }
    if "forward_loss" in fixture.outputs:
        noise = inputs["fl_noise"].view(-1, *tokens.shape)  # (repetitions, M, N, C)
        t = inputs["fl_t"].view(noise.shape[:-1])
        losses, hidden = model.token_losses(z, tokens, t, noise), (~visible).expand(t.shape)
        computed["forward_loss"] = (losses * hidden).sum().view(1) / hidden.sum()
    return computed


def _network(model: MAR, fixture: Fixture) -> dict[str, Tensor]:
    """Outputs of the denoising network, plain and guided."""
    x, t, conditions = (fixture.inputs[f"net_{name}"] for name in ("x", "t", "c"))
    net = model.diffloss.net
    computed = {"net_out": net(x, t, conditions)}
    if "net_cfg_out" in fixture.outputs:
        half, guidance = len(x) // 2, fixture.argument("net_cfg_out", "cfg_scale")
        guided = net.guided(x[:half], t[:half], conditions[:half], conditions[half:], guidance)
        computed["net_cfg_out"] = guided.flatten(0, 1)
    return computed


def _steps(model: MAR, fixture: Fixture) -> dict[str, Tensor]:
    """Single reverse steps of the sampling process."""
    t, x, conditions, noise = (fixture.inputs[f"step_{name}"] for name in ("t", "x", "c", "noise"))
    process = model.diffloss.gen_diffusion
    output = model.diffloss.net(x, process.timestep_map[t], conditions)
    computed = {f"step_{name}": value for name, value in process.reverse(output, x, t)._asdict().items()}
    if "step_sample" in fixture.outputs:
        temperature = fixture.argument("step_sample", "temperature", 1.0)
        computed["step_sample"] = process.step(output, x, t, noise, temperature)
    return computed


def _schedules(model: MAR, fixture: Fixture) -> dict[str, Tensor]:
    """Constants of the sampling and the training process, and the steps kept for other numbers of steps."""
    processes: dict[str, GaussianDiffusion] = {
        "gen": model.diffloss.gen_diffusion,
        "train": model.diffloss.train_diffusion,
    }
    computed = {}
    for name in fixture.outputs:
        kind, _, constant = name.partition("_")
        if kind in processes and isinstance(getattr(processes[kind], constant, None), Tensor):
            computed[name] = getattr(processes[kind], constant)
        elif kind == "respaced" and constant.isdecimal():
            computed[name] = torch.tensor(respaced_timesteps(int(constant)))
    return computed


def _samples(model: MAR, fixture: Fixture) -> dict[str, Tensor]:
    """Whole images, and what each iteration of the sampler did, for every set of sampling arguments."""
    inputs, computed = fixture.inputs, {}
    for letter, arguments in fixture.description["sampling_arguments"].items():
        prefix = f"sample_{letter}"

        def noise(iteration: int, images: Tensor, positions: Tensor, prefix: str = prefix) -> tuple[Tensor, Tensor]:
            recorded = f"{prefix}_iter{iteration}"
            return inputs[f"{recorded}_init_noise"], inputs[f"{recorded}_step_noise"]

        steps = list(model.sampling_iterations(inputs["labels"], inputs["sample_orders"], noise, **arguments))
        computed[f"{prefix}_latents"] = model.unpatchify(steps[-1].tokens)
        computed[f"{prefix}_mask_len"] = torch.tensor([step.num_hidden for step in steps])
        computed[f"{prefix}_cfg_iter"] = torch.tensor([step.guidance for step in steps], dtype=torch.float32)
        computed[f"{prefix}_n_pred"] = torch.tensor([len(step.drawn) for step in steps])
        for number, step in enumerate(steps):
            rows = [step.conditions] if step.unconditional is None else [step.conditions, step.unconditional]
            computed[f"{prefix}_iter{number}_z"] = torch.cat(rows)
            computed[f"{prefix}_iter{number}_out"] = step.drawn
    return computed
