"""LoRA: adapters alone are trained, and the engine computes with them, merged or not."""

from __future__ import annotations

import importlib.util
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from builders import small_data, small_module
from copris_testing import SomePrompts, reference_logprobs
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from simulated_fits import build, ledger
from some_rewards import ShareOfDigits
from torch import Tensor
from trajectories import trajectory
from transformers import AutoConfig, AutoModelForCausalLM

from copris_lightning import (
    CoprisModule,
    KLPenalty,
    LoRA,
    StalenessMonitor,
    VLLMEngine,
    VLLMServerEngine,
    WeightSync,
)
from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.estimator.corrections import Truncation
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.lora import without_adapters
from copris_lightning.weights.adapter import AdapterShape, adapter_shape, as_folder

CHOSEN = LoRA(rank=4, alpha=6.0, target_modules=["q_proj", "mlp.down_proj"])


def made(checkpoint: Path, lora: LoRA | None, **options: Any) -> CoprisModule:
    module = small_module(checkpoint, lora=lora, **options)
    module.configure_model()
    return module


def perturb(module: CoprisModule) -> None:
    """As if the adapters had been trained: B is no longer zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def micro_batch() -> MicroBatch:
    rng = random.Random(0)
    rows = []
    for i in range(3):
        tokens = [rng.randrange(2, 98) for _ in range(5 + 3 * i)]
        chunk = (0, tokens, [-4.0] * len(tokens))
        rows.append(trajectory(chunk, sample=i, prompt=(3, 4, 5), advantage=1.0 - i))
    return collate(rows, source="engine")


@pytest.fixture
def biased_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    config = AutoConfig.from_pretrained(tiny_checkpoint, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("lora", [LoRA(rank=8), CHOSEN], ids=["all", "some"])
@pytest.mark.parametrize(
    "checkpoint", ["tiny_checkpoint", "untied_checkpoint", "biased_checkpoint"]
)
def test_merged_weights_are_those_that_peft_merges(
    checkpoint: str, lora: LoRA, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(checkpoint)
    module = made(path, lora)
    perturb(module)
    ours = {name: tensor.clone() for name, tensor in module.named_weights()}
    plain = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    assert set(ours) == {name for name, _ in plain.named_parameters()}

    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.layers(plain), lora_dropout=0.0
    )
    wrapped = peft.get_peft_model(plain, config)
    state = {f"base_model.model.{n}": t for n, t in module.policy.model.state_dict().items()}
    wrapped.load_state_dict(state)
    theirs = dict(wrapped.merge_and_unload().named_parameters())
    untouched = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    changed = 0
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-6
        changed += not torch.equal(tensor, untouched[name])
    assert changed == len(config.target_modules)


@pytest.mark.parametrize("kl", [None, KLPenalty(0.1)], ids=["", "its own reference"])
def test_activations_may_be_computed_again(tiny_checkpoint: Path, kl: KLPenalty | None) -> None:
    """The layers' inputs are frozen, for which checkpointing has been seen to drop gradients."""
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        module = made(tiny_checkpoint, CHOSEN, kl=kl, gradient_checkpointing=recomputed)
        perturb(module)
        module.train()
        calls: list[int] = []
        norm = module.policy.model.base_model.layers[0].input_layernorm
        norm.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = micro_batch()
        terms = module.token_terms(batch)
        assert (terms.reference_logprobs is None) == (kl is None)
        module.policy_loss(batch, terms)[0].backward()
        assert len(calls) == 1 + recomputed + (kl is not None)
        trained = [p.grad for p in module.parameters() if p.requires_grad]
        gradients.append(torch.cat([g.flatten() for g in trained]))
    plain, again = gradients
    assert plain.norm() > 1e-3
    assert (plain - again).norm() <= 1e-6 * plain.norm()


def test_merging_is_done_in_fp32_and_rounded_once(tiny_checkpoint: Path) -> None:
    module = made(tiny_checkpoint, CHOSEN, dtype="bfloat16")
    perturb(module)
    state = module.policy.model.state_dict()
    assert {t.dtype for n, t in state.items() if "lora_" in n} == {torch.float32}
    name = "model.layers.1.self_attn.q_proj"
    a, b = (state[f"{name}.lora_{x}.default.weight"].double() for x in "AB")
    exact = state[f"{name}.base_layer.weight"].double() + 6.0 / 4 * (b @ a)
    merged = dict(module.named_weights())[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().bfloat16())


def test_weights_may_come_in_any_order_and_be_overwritten(tiny_checkpoint: Path) -> None:
    module = made(tiny_checkpoint, CHOSEN)
    perturb(module)
    expected = dict(module.named_weights())

    def shuffled() -> Any:
        pairs = [(n, t.detach().clone()) for n, t in module.policy.model.named_parameters()]
        random.Random(1).shuffle(pairs)
        for name, tensor in pairs:
            yield name, tensor
            if "lora_" in name or "base_layer" in name:
                tensor.fill_(torch.nan)

    merged = dict(CHOSEN.merged(shuffled()))
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_adapters_are_written_as_peft_reads_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = made(tiny_checkpoint, LoRA(4, 6.0, ["q_proj", "mlp.down_proj"], sync="adapter"))
    perturb(module)
    adapter = {name: tensor.contiguous() for name, tensor in module.named_weights()}
    save_file(adapter, tmp_path / "model.safetensors")
    shape = adapter_shape(adapter)
    assert shape == module.adapter == AdapterShape(4, ("down_proj", "q_proj"))
    assert as_folder(tmp_path / "model.safetensors", shape) == tmp_path
    assert adapter_shape(dict(module.policy.model.named_parameters())) is None
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    tokens = list(range(2, 40))
    expected = reference_logprobs(module.policy.model, tokens, 1)
    assert (reference_logprobs(theirs, tokens, 1) - expected).abs().max() < 1e-5


def test_adapters_begin_without_effect_and_can_be_left_out_later(tiny_checkpoint: Path) -> None:
    batch = micro_batch()
    with torch.no_grad():
        expected = made(tiny_checkpoint, None)(batch)
        module = made(tiny_checkpoint, LoRA())
        assert torch.equal(module(batch), expected)
        perturb(module)
        trained = module(batch)
        assert (trained - expected).abs().max() > 1e-2
        with without_adapters(module):
            assert torch.equal(module(batch), expected)
        assert torch.equal(module(batch), trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_alone_are_trained(tiny_checkpoint: Path, checkpointing: bool) -> None:
    module = made(tiny_checkpoint, CHOSEN, gradient_checkpointing=checkpointing)
    perturb(module)
    module.token_terms(micro_batch()).logprobs.sum().backward()
    names = {name for name, p in module.named_parameters() if p.grad is not None}
    assert len(names) == 2 * 2 * 2  # layers, targets, A and B
    assert all(".lora_" in name for name in names)
    assert all(module.get_parameter(name).grad.abs().max() > 0 for name in names)
    (group,) = module.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(module.get_parameter(n)) for n in names}


def test_the_policy_without_adapters_is_the_reference(tiny_checkpoint: Path) -> None:
    module = made(tiny_checkpoint, CHOSEN, kl=KLPenalty(0.1))
    perturb(module)
    module.on_fit_start()
    assert module._reference == []
    terms = module.token_terms(micro_batch())
    with torch.no_grad():
        expected = made(tiny_checkpoint, None)(micro_batch())
    assert torch.equal(terms.reference_logprobs, expected)
    assert not terms.reference_logprobs.requires_grad
    module.estimator(terms).loss.sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_a_simulated_fit_trains_the_adapters_and_resumes(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = {"lora": CHOSEN, "kl": KLPenalty(0.1)}
    torch.manual_seed(3)
    uncut, module, data, _ = build(tiny_checkpoint, tmp_path / "uncut", model=model)
    uncut.fit(module, data)
    expected = dict(module.named_weights())
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    moved = {n for n, p in plain.named_parameters() if not torch.equal(p, expected[n])}
    assert moved == {f"{name}.weight" for name in CHOSEN.layers(plain)}

    torch.manual_seed(3)
    keep = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=3, save_top_k=-1)
    first, module, data, _ = build(
        tiny_checkpoint,
        tmp_path / "cut",
        model=model,
        max_steps=3,
        enable_checkpointing=True,
        callbacks=[keep],
    )
    first.fit(module, data)
    torch.manual_seed(4)  # other adapters, which the checkpoint replaces
    second, module, data, log = build(tiny_checkpoint, tmp_path / "cut", model=model)
    second.fit(module, data, ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert log[0] == "sync 3"
    assert [r["response"] for r in ledger(tmp_path / "cut")] == [
        r["response"] for r in ledger(tmp_path / "uncut")
    ]
    for name, tensor in module.named_weights():
        assert torch.allclose(tensor, expected[name], atol=1e-6)


def test_a_checkpoint_can_be_saved_for_other_programs(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer, module, data, _ = build(
        tiny_checkpoint,
        tmp_path,
        model={"lora": CHOSEN},
        max_steps=1,
        enable_checkpointing=True,
        callbacks=[keep],
    )
    trainer.fit(module, data)
    # As docs/lora.md has it.
    loaded = made(tiny_checkpoint, CHOSEN)
    loaded.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    model.load_state_dict(dict(loaded.named_weights()), strict=False)
    model.save_pretrained(tmp_path / "trained")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype="float32")
    tokens = list(range(2, 40))
    ours = reference_logprobs(module.policy.model, tokens, 1)
    assert (reference_logprobs(saved, tokens, 1) - ours).abs().max() < 1e-5


class Scores(L.Callback):
    """Scores one sequence on the engine after every sync, and with the merged weights."""

    SEQUENCE = tuple(range(2, 40))

    def __init__(self, checkpoint: Path) -> None:
        self.plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()
        self.scores: list[Tensor] = []
        self.errors: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        data = trainer.datamodule
        (score,) = data.session.call(data.engine.score([self.SEQUENCE]))
        merged = dict(CHOSEN.merged(pl_module.policy.model.named_parameters()))
        self.plain.load_state_dict(merged, strict=False)
        expected = reference_logprobs(self.plain, list(self.SEQUENCE), 1)
        self.scores.append(torch.tensor(score))
        self.errors.append(float((expected - self.scores[-1]).abs().max()))


@pytest.mark.engines
@pytest.mark.parametrize("sync", ["merge", "adapter"])
def test_the_engine_computes_with_the_trained_adapters(
    sync: str, tiny_checkpoint: Path, cpu_engine_args: dict[str, Any], tmp_path: Path
) -> None:
    engine = VLLMEngine(cpu_engine_args)
    module = small_module(
        tiny_checkpoint,
        lora=LoRA(CHOSEN.rank, CHOSEN.alpha, CHOSEN.target_modules, sync=sync),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        corrections=[Truncation(apply=False)],  # asks for the engine's log-probs, too
    )
    data = small_data(
        tiny_checkpoint, engine, prompts=SomePrompts(), reward=ShareOfDigits(), cap=20
    )
    weight_sync, scores = WeightSync(parity_sequences=8), Scores(tiny_checkpoint)
    monitor = StalenessMonitor()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[weight_sync, monitor, scores],
    )
    trainer.fit(module, data)
    assert weight_sync.version == 4
    assert weight_sync.worst_parity < 1e-4
    assert max(scores.errors) < 1e-4
    changes = [float((a - b).abs().max()) for a, b in pairwise(scores.scores)]
    assert min(changes) > 1e-2
    # Sampled tokens bore the log-probs of the weights of their version all along.
    assert float(trainer.callback_metrics["kl/mismatch"]) < 1e-6
    assert float(trainer.callback_metrics["staleness/lag_max"]) > 0


@pytest.mark.parametrize(
    ("engine", "rank", "message"),
    [
        (VLLMServerEngine(["http://127.0.0.1:1"]), 8, "servers take whole weights only"),
        (VLLMEngine(), 513, r"rank 512 at most, not of 513; lower lora\.rank"),
    ],
)
def test_engines_refuse_adapters_that_they_cannot_take(
    engine: Any, rank: int, message: str, tiny_checkpoint: Path
) -> None:
    module = CoprisModule(str(tiny_checkpoint), lora=LoRA(rank, sync="adapter"))
    spec = EngineSpec(str(tiny_checkpoint), 4, 64, vocab_size=98, adapter=module.adapter)
    with pytest.raises(ConfigurationError, match=message):
        engine.validate(spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank=0 must be at least 1"),
        ({"alpha": 0.0}, r"alpha=0\.0 must be a number above 0"),
        ({"sync": "both"}, r"sync='both' must be merge or adapter"),
        ({"target_modules": []}, r"lora\.target_modules=\[\] names no layer"),
        (
            {"target_modules": ["q_proj", "v_porj"]},
            r"lora\.target_modules: no linear .* with 'v_porj' .* has down_proj, .*, v_proj$",
        ),
        ({"target_modules": ["lm_head"]}, r"no linear layer's name ends with 'lm_head' \(the head"),
        ({"target_modules": ["embed_tokens"]}, r"no linear layer's name ends with 'embed_tokens'"),
        ({"target_modules": ["proj"]}, r"no linear layer's name ends with 'proj'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_loaded(
    settings: dict[str, Any], message: str, untied_checkpoint: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CoprisModule(str(untied_checkpoint), lora=LoRA(**settings))


def test_without_peft_the_extra_is_named(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"peft is not installed; .* the extra \"lora\""):
        CoprisModule(str(tiny_checkpoint), lora=LoRA())


def test_quantized_weights_are_refused(tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigurationError, match="weights are quantized"):
        LoRA().check(model)
