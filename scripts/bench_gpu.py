"""The efficiency tables on one GPU: LLaVA-1.5-7B shapes with random weights, nothing to download.

    python scripts/bench_gpu.py                       tables on standard output, rows in bench_gpu.json
    python scripts/bench_gpu.py --model llava_1_5_13b --budget-gb 24
    python scripts/bench_gpu.py --parts resident      only with all weights on the device
    python scripts/bench_gpu.py --dry-run             the same program on a toy model and a CPU, in about a minute

Needs torch, transformers and hydra-core, and this repository as source (no installation). Random weights cost what
trained ones do; an adaptive method's choices do not, so every method runs at a forced budget.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from omegaconf import OmegaConf

from corematching import build_method, files, kernels, load_model, registry
from corematching.cost.hardware import dtype_name, load_hardware
from corematching.efficiency.inputs import fixed_inputs
from corematching.efficiency.latency import CAPTURE_WARM_UPS, Spread, clock
from corematching.efficiency.offloaded import ffn_bytes, measure_offloaded, other_bytes, plan
from corematching.efficiency.peaks import Peaks, measure_peaks
from corematching.efficiency.rows import Protocol, measure, predicted_rows
from corematching.efficiency.table import run_table
from corematching.engine.compiled import generate
from corematching.engine.ffn import MaskedFFN, SlicedFFN, neuron_major
from corematching.errors import UserError
from corematching.methods.core import core_neurons, sentence_core_neurons, token_core_neurons
from corematching.models.families import family_of
from corematching.registry import group_names

SUBJECTS: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("dense", None, {}),
    ("fastv", 192, {"keep": 192}),
    ("fastv", 64, {"keep": 64}),
    ("core_tokens", 64, {"threshold": "keep", "keep": 64}),
    ("core_neurons", 0.2, {"keep": 0.2}),
    ("core_neurons", 0.4, {"keep": 0.4}),
    ("core_neurons", 0.6, {"keep": 0.6}),
    ("corematching", 192, {"threshold": "keep", "keep": 192}),
    ("corematching", 64, {"threshold": "keep", "keep": 64}),
)
LIMITED = (("dense", None), ("corematching", 64))
"""Methods also timed in the memory-limited regime, with at most MOST_LIMITED pairs: dense takes seconds per answer."""
MOST_LIMITED = 5
PARTS = ("resident", "limited")


class Session:
    """The model on the device, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        dry = options.dry_run
        self.options = options
        self.device = torch.device("cpu" if dry else "cuda")
        self.model, _ = load_model(
            options.model,
            weights="random",
            dtype="float32" if dry else options.dtype,
            device=self.device,
            num_layers=8 if dry else options.layers,
        )
        self.protocol = Protocol(
            output_tokens=(1, 4) if dry else tuple(options.output_tokens),
            repeats=1 if dry else options.repeats,
            engine="compiled",
        )
        self.full_depth = int(OmegaConf.load(registry.CONF / "model" / f"{options.model}.yaml").layers)
        self.inputs = fixed_inputs(self.model)
        self.dtype = dtype_name(self.model.dtype)
        self.peaks: Peaks = measure_peaks(self.device, self.model.dtype, tries=2 if dry else 7)
        self.records: list[dict[str, Any]] = []
        self.by_name: dict[tuple[str, Any, str], Any] = {}

    def add(self, name: str, keep: Any, bench: dict[str, Any]) -> None:
        config = {"method": {"name": name}}
        self.records.append({"labels": {"method": name, "keep": keep}, "config": config, "bench": bench})

    def save(self, **more: Any) -> None:
        """Write what is there so far, so that no crash or time limit loses it."""
        if self.options.dry_run:
            return
        depth = self.model.config.text_config.num_hidden_layers
        content = {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "model": {"name": self.options.model, "decoder_layers": depth, "weights": "random", "dtype": self.dtype},
            "budget_bytes": 1e9 * self.options.budget_gb,
            "peaks": vars(self.peaks),
            **more,
            "rows": self.records,
        }
        files.write(self.options.output, json.dumps(content, indent=1) + "\n")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (dry run)"


def check_kernel(session: Session) -> dict[str, float]:
    """The decode FFN over chosen neurons against its definition, at the model's own width."""
    model, device = session.model, session.device
    mlp = family_of(model.config).decoder(model).layers[0].mlp
    width, hidden = mlp.gate_proj.weight.shape
    index = torch.randperm(width, device=device)[: int(0.4 * width)].sort().values
    x = torch.randn(1, 1, hidden, device=device, dtype=model.dtype)
    restore = neuron_major(mlp)
    with torch.inference_mode():
        wanted, got = MaskedFFN(mlp, index[None])(x).float(), SlicedFFN(mlp, index)(x).float()
        path = "rows read in place" if kernels.usable(mlp, x) else "rows gathered"
    restore()
    error = float((wanted - got).abs().max() / wanted.abs().max())
    print(f"core-neuron FFN ({path}): largest relative error {error:.1e}")
    if error > 0.05:
        raise SystemExit("the core-neuron FFN is wrong on this device: no timing is worth having")
    return {"relative_error": error}


def check_choice(session: Session) -> None:
    """Core neurons as the kernel finds them against the sorting definition, at the model's own width."""
    width = session.model.config.text_config.intermediate_size
    activations = torch.randn(1, 139, width, device=session.device, dtype=session.model.dtype)
    valid = torch.ones(1, 139, dtype=torch.bool, device=session.device)
    count = int(0.4 * width)
    wanted = sentence_core_neurons(token_core_neurons(activations, 0.2), valid, count)
    if not torch.equal(core_neurons(activations, valid, 0.2, count), wanted):
        raise SystemExit("core neurons are chosen wrongly on this device: no timing is worth having")


def check_engines(session: Session) -> dict[str, int]:
    """Greedy tokens on which eager and compiled decoding agree, per method.

    With random weights and 16-bit kernels of different shapes, near ties may fall differently; float32 must agree.
    """
    length, agreed = 4 if session.device.type == "cpu" else 32, {}
    for name, keep, parameters in SUBJECTS:
        with build_method(name, **parameters)(session.model):
            eager = generate(session.model, session.inputs, length)[0]
            for _ in range(CAPTURE_WARM_UPS + 1):  # the last one replays everything
                compiled = generate(session.model, session.inputs, length, "compiled")[0]
        differ = (eager != compiled).nonzero()
        agreed[f"{name} {keep}"] = int(differ[0]) if len(differ) else length
    print(f"tokens until eager and compiled part ({length} = never): {agreed}")
    if session.dtype == "float32" and set(agreed.values()) != {length}:
        raise SystemExit("compiled decoding answers differently from eager in float32")
    return agreed


def resident(session: Session) -> None:
    """Every method with all weights on the device, dense in turns with it; and the roofline model's word on it."""
    for name, keep, parameters in SUBJECTS:
        print(f"  {name} {keep} ...", flush=True)
        measured = measure(
            session.model,
            build_method("dense"),
            build_method(name, **parameters),
            session.inputs,
            session.protocol,
            session.peaks,
        )
        session.by_name[name, keep, "resident"] = measured
        for bench in measured.rows.values():
            session.add(name, keep, bench)
        session.save()


def limited(session: Session, budget: float) -> None:
    """The same under a device memory budget that dense does not fit into."""
    protocol = replace(session.protocol, repeats=min(session.protocol.repeats, MOST_LIMITED))
    for name, keep in LIMITED:
        parameters = next(p for other, k, p in SUBJECTS if (other, k) == (name, keep))
        method, longest = build_method(name, **parameters), max(session.protocol.output_tokens)
        whole = plan(session.model, method, budget, session.inputs["input_ids"].shape[1], longest)
        print(f"  {name} {keep}: {whole} FFNs resident under {budget / 1e9:.3g} GB ...", flush=True)
        measured = measure_offloaded(session.model, method, session.inputs, protocol, session.peaks, budget)
        session.by_name[name, keep, "offloaded"] = measured
        for bench in measured.rows.values():
            session.add(name, keep, bench)
        session.save()


def predictions(session: Session) -> None:
    """Rows for the cards of ``conf/hardware``, from the traces just measured."""
    for profile in group_names("hardware"):
        if profile == "this":
            continue
        hardware = load_hardware(profile)
        for name, keep in LIMITED:
            measured, lengths = session.by_name[name, keep, "resident"], session.protocol.output_tokens
            dense = measured.pair.dense[-1].trace
            try:
                found = predicted_rows(
                    session.model.config, measured.trace, dense, lengths, hardware, session.full_depth
                )
                for bench in found.rows.values():
                    session.add(name, keep, bench)
            except UserError as error:
                print(f"  no prediction for {name} {keep} on {hardware.name}: {error}")
    session.save()


def targets(session: Session) -> list[str]:
    """The targets that what was measured speaks to."""
    longest, found = max(session.protocol.output_tokens), []
    if (ours := session.by_name.get(("corematching", 64, "resident"))) is not None:
        dense = session.by_name["dense", None, "resident"].rows[longest]
        vision = _vision_seconds(session)
        whole, pruned = ([run.prefill - vision for run in runs] for runs in (ours.pair.dense, ours.pair.method))
        language = Spread.of([a / b for a, b in zip(whole, pruned, strict=True)])
        decode = ours.pair.decode_speedup(longest)
        found += [
            f"dense compiled decode: {100 * dense['bandwidth_share']:.0f} % of the measured bandwidth"
            f"{_of_the_data_sheet(session, dense)} (target >= 65 %)",
            f"CoreMatching decode, resident: {decode.median:.2f} x dense, IQR {decode.iqr:.2f} (target >= 1.5)",
            f"prefill at keep 64, language model: {language.median:.2f} x dense, IQR {language.iqr:.2f} "
            "(target >= 2.5)",
        ]
    if (ours := session.by_name.get(("corematching", 64, "offloaded"))) is not None:
        row, speedup = ours.rows[longest], ours.pair.speedup(longest)
        found.append(
            f"{row['regime']}, {longest} tokens end to end: {speedup.median:.2f} x dense, IQR {speedup.iqr:.2f}; "
            f"{row['engine']} against {row['dense_engine']} dense (target >= 8 with 12 GB)"
        )
    return found


def _of_the_data_sheet(session: Session, row: dict[str, Any]) -> str:
    """Share of the public bandwidth of the profile whose name fits the card's, if one does."""
    name = device_name(session.device).upper()
    for profile in group_names("hardware"):
        if profile.replace("_", " ").upper() in name:
            share = 1e9 * row["decode_gb_per_s"] / load_hardware(profile).bandwidth
            return f", {100 * share:.0f} % of {load_hardware(profile).name}'s public one"
    return ""


def _vision_seconds(session: Session) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(6):
            start = clock(session.device)
            session.model.model.get_image_features(session.inputs["pixel_values"])
            times.append(clock(session.device) - start)
    return Spread.of(times[1:]).median


def toy_budget(session: Session) -> float:
    """For the dry run: room for four FFNs in five, so that the memory-limited code has work to do."""
    model = session.model
    depth = model.config.text_config.num_hidden_layers
    prompt, longest = session.inputs["input_ids"].shape[1], max(session.protocol.output_tokens)
    return other_bytes(model, prompt, longest) + 0.8 * depth * ffn_bytes(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava_1_5_7b", help="a conf/model name with an architecture")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, help="decoder layers (default: all)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output-tokens", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--budget-gb", type=float, default=12.0, help="device memory of the memory-limited regime")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"))
    parser.add_argument(
        "--dry-run", action="store_true", help="toy model on the CPU: checks the program, not the speed"
    )
    options = parser.parse_args()
    if options.dry_run:
        options.model = "tiny"
    elif not torch.cuda.is_available():
        parser.error("no GPU found; --dry-run checks the program on a CPU")
    try:
        run(options)
    except UserError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    """Everything, in order; the correctness checks come first."""
    session = Session(options)
    depth = session.model.config.text_config.num_hidden_layers
    print(
        f"{device_name(session.device)}, torch {torch.__version__}, {options.model}: {depth} decoder layers, random "
        f"weights, {session.dtype}, {session.inputs['input_ids'].shape[1]} prompt tokens"
    )
    peaks = session.peaks
    print(
        f"peaks: copy {peaks.copy_bandwidth / 1e9:.0f} GB/s, read {peaks.read_bandwidth / 1e9:.0f} GB/s, "
        f"matrix product {peaks.flops / 1e12:.3g} TFLOP/s"
    )
    check_choice(session)
    checks = {**check_kernel(session), "agreement": check_engines(session)}
    if "resident" in options.parts:
        resident(session)
    if "limited" in options.parts:
        limited(session, toy_budget(session) if options.dry_run else 1e9 * options.budget_gb)
    if "resident" in options.parts:
        predictions(session)
    reached = targets(session)
    if depth < session.full_depth:
        reached.insert(
            0, f"of a slice, {depth} of {session.full_depth} decoder layers; the targets are for all of them:"
        )
    print(run_table(session.records).markdown())
    print("\n".join(reached))
    if options.dry_run:
        print("dry run complete: the program works; its numbers mean nothing")
        return
    session.save(checks=checks, targets=reached)
    print(f"rows: {options.output}")


if __name__ == "__main__":
    main()
