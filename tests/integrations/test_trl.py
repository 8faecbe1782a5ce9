"""TRL's `SFTTrainer`: equal to a loop by hand, labels are heard, compressors saved and resumed."""

import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from safetensors.torch import load_file
from tests.tiny_checkpoints import picture
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from vispress import (
    CompressionCallback,
    compress_model,
    compression_loss,
    compression_report,
    parameter_groups,
    remove_compression,
    set_progress,
)
from vispress.errors import CompressionStateError
from vispress.trainer import CompressionTrainer

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
GENERATION = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'][0]['text'] }}</s>{% endgeneration %}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""As the tiny LLaVA's, and says which tokens are answers."""


class CompressedSFT(CompressionTrainer, SFTTrainer):
    """Both."""


def rows(form="prompt", count=8):
    """Questions of one picture, with answers of several lengths."""
    found = []
    for number in range(count):
        question = {"role": "user", "content": f"What is {number}?"}
        answer = {"role": "assistant", "content": "red" + number % 3 * "!"}
        given = {"prompt": [question], "completion": [answer]}
        given = given if form == "prompt" else {"messages": [question, answer]}
        found.append({"images": [picture(24, 24, number)]} | given)
    return Dataset.from_list(found).cast_column("images", List(Image()))


def load(folder, *, frozen=False):
    return AutoModelForImageTextToText.from_pretrained(folder).requires_grad_(not frozen)


def settings(out, **more):
    given = {
        "output_dir": str(out), "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True,
        "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        "logging_steps": 1, "max_length": None, "learning_rate": 1e-3, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "activation_checkpointing": True,
    }  # fmt: skip
    return SFTConfig(**(given | more))


def trainer(folder, model, out, *, kind=SFTTrainer, form="prompt", own=None, **more):
    """A trainer that keeps the batches it was given, in `seen`."""
    processor = AutoProcessor.from_pretrained(folder)
    if "assistant_only_loss" in more:
        processor.chat_template = GENERATION
    run = kind(
        model, settings(out, **more), train_dataset=rows(form), processing_class=processor,
        **(own or {}),
    )  # fmt: skip
    collate, run.seen = run.data_collator, []

    def keep(examples):
        run.seen.append(collate(examples))
        return run.seen[-1].copy()

    run.data_collator = keep
    return run


def batches_of(run):
    """Those of its steps; the loader is one ahead."""
    return run.seen[: run.state.global_step * run.args.gradient_accumulation_steps]


def by_hand(model, batches, *, lr=1e-3, modules_lr=1e-3, accumulation=1):
    """The same updates; losses, and what the last batch kept."""
    sgd = torch.optim.SGD(parameter_groups(model, lr=lr, modules_lr=modules_lr))
    model.train()
    losses = []
    for start in range(0, len(batches), accumulation):
        group = batches[start : start + accumulation]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
        sgd.zero_grad()
        for batch in group:
            with compression_loss(model) as extra:
                loss = model(**batch, use_cache=False, num_items_in_batch=items).loss
                (loss + extra() / accumulation).backward()
            losses.append(float(loss.detach()))
        kept = kept_of(model)
        sgd.step()
    return losses, kept


def kept_of(model):
    return [[image.kept for image in sample.images] for sample in compression_report(model).samples]


def kept_by_prompts(model, batch):
    """What prompts alone keep, one by one, their answers cut off."""
    found = []
    for row, labels in enumerate(batch["labels"]):
        end = int((labels != -100).nonzero()[0])
        alone = {name: batch[name][row : row + 1, :end] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            model(**alone, pixel_values=batch["pixel_values"][row : row + 1])
        found += kept_of(model)
    return found


def own(model):
    found = (item for item in model.named_parameters() if "vispress_modules" in item[0])
    return {name: p.detach().clone() for name, p in found if p.requires_grad}


@pytest.mark.parametrize(
    ("order", "family"),
    [("callback", "llava"), ("behind", "llava"), ("trainer", "llava"), ("trainer", "qwen2_5_vl")],
)
def test_steps_are_those_of_a_loop_by_hand(folders, tmp_path, order, family):
    """FastV ranks by the prompt's last token: an answer that it saw would rank in its place."""
    folder, model = folders[family], load(folders[family])
    fastv = {"method": "fastv", "keep_ratio": 0.5, "layer": 1}
    if order != "behind":
        compress_model(model, **fastv)
    kind = CompressedSFT if order == "trainer" else SFTTrainer
    callbacks = {"callbacks": [CompressionCallback()]} if order == "callback" else {}
    run = trainer(folder, model, tmp_path, kind=kind, own=callbacks)
    if order == "behind":
        compress_model(run.model, **fastv)
    run.train()
    assert len(batches_of(run)) == 2
    again = compress_model(load(folder), **fastv)
    losses, kept = by_hand(again, batches_of(run))
    logged = [float(entry["loss"]) for entry in run.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(losses, abs=1e-3)
    assert kept_of(model) == kept
    weights = dict(again.named_parameters())
    moved = 0
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-6)
        moved += not torch.equal(value, dict(load(folder).named_parameters())[name])
    assert moved > 50
    remove_compression(model)
    with torch.no_grad():
        uncompressed = float(load(folder)(**run.seen[0]).loss)
    assert uncompressed != pytest.approx(losses[0], abs=1e-2)


def test_the_prompt_decides_and_not_the_answer(folders, tmp_path):
    model = compress_model(load(folders["llava"]), method="fastv", keep_ratio=0.5, layer=1)
    run = trainer(folders["llava"], model, tmp_path, kind=CompressedSFT, learning_rate=0.0)
    run.train()
    (*_, batch), kept = batches_of(run), kept_of(model)
    model.eval()
    assert kept == kept_by_prompts(model, batch)
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "labels"})
    assert kept_of(model) != kept, "the comparison cannot fail"


@pytest.mark.parametrize("alone", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_losses_show_no_answer_either(folders, tmp_path, alone):
    model = compress_model(load(folders["llava"]), method="fastv", keep_ratio=0.5, layer=1)
    run = trainer(folders["llava"], model, tmp_path, kind=CompressedSFT, learning_rate=0.0, **alone)
    kept = []
    model.model.register_forward_hook(lambda *_: kept.append(kept_of(model)))
    run.train()
    found, batches = list(kept), batches_of(run)
    assert len(found) % len(batches) == 0  # label smoothing runs twice a step
    model.eval()
    for number, each in enumerate(found):
        assert each == kept_by_prompts(model, batches[number * len(batches) // len(found)])


def test_evaluation_ahead_of_training(folders, tmp_path):
    model = compress_model(load(folders["llava"]), method="fastv", keep_ratio=0.5, layer=1)
    run = trainer(folders["llava"], model, tmp_path, kind=CompressedSFT)
    found = run.evaluate(rows(count=2))["eval_loss"]
    (batch,) = run.seen
    with torch.no_grad():
        assert found == pytest.approx(float(model(**batch).loss), abs=1e-4)
    plain = SFTTrainer(
        compress_model(load(folders["llava"]), method="fastv", keep_ratio=0.5),
        settings(tmp_path), train_dataset=rows(),
        processing_class=AutoProcessor.from_pretrained(folders["llava"]),
    )  # fmt: skip
    with pytest.raises(CompressionStateError, match=r"replaced after.*TRL's.*CompressionCallback"):
        plain.evaluate(rows(count=2))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_methods_losses_and_rates_are_those_of_a_loop_by_hand(folders, tmp_path, accumulation):
    gamma = {"method": "gamma_mod", "loss_weight": 30.0}
    model = compress_model(load(folders["llava"]), **gamma)
    before = own(model)
    run = trainer(
        folders["llava"], model, tmp_path, kind=CompressedSFT, own={"modules_lr": 0.1},
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    run.train()
    again = compress_model(load(folders["llava"]), **gamma)
    by_hand(again, batches_of(run), modules_lr=0.1, accumulation=accumulation)
    assert any(not torch.equal(value, before[name]) for name, value in own(model).items())
    for name, value in own(again).items():
        torch.testing.assert_close(own(model)[name], value, rtol=1e-4, atol=1e-6)
    logs = [entry for entry in run.state.log_history if "loss/gamma_mod" in entry]
    assert len(logs) == 2
    assert all(0 < entry["mean_keep_ratio"] < 1 for entry in logs)


def soft_by_hand(model, batches, *, modules_lr, moves=True):
    """The published recipe: a frozen model, a cosine, a weight that grows; what methods added."""
    model.train()
    sgd = torch.optim.SGD(own_parameters(model), lr=modules_lr)
    added, masks = [], []
    for step, batch in enumerate(batches):
        if moves:
            set_progress(model, step / len(batches))
        sgd.param_groups[0]["lr"] = modules_lr * (1 + math.cos(math.pi * step / len(batches))) / 2
        with compression_loss(model) as extra:
            items = int((batch["labels"][:, 1:] != -100).sum())
            loss = model(**batch, use_cache=False, num_items_in_batch=items).loss + extra()
        added.append(extra.by_name["vision_selector"])
        masks.append(kept_of(model))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return added, masks


def own_parameters(model):
    return [p for name, p in model.named_parameters() if "vispress_modules" in name]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_vision_selector_is_trained_as_published(folders, tmp_path, family):
    """Soft in training, hard behind it; its own loss is added, at a weight that grows."""
    folder, selector = folders[family], {"method": "vision_selector", "keep_ratio": 0.2}

    def start():
        torch.manual_seed(0)  # for the scorer
        return compress_model(load(folder, frozen=True), **selector)

    model = start()
    before = own(model)
    run = trainer(
        folder, model, tmp_path, kind=CompressedSFT, own={"modules_lr": 0.3}, max_steps=4,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    run.train()
    assert len(batches_of(run)) == 4
    again, still = start(), start()
    added, masks = soft_by_hand(again, batches_of(run), modules_lr=0.3)
    unmoved, _ = soft_by_hand(still, batches_of(run), modules_lr=0.3, moves=False)
    logged = [entry["loss/vision_selector"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(added, abs=1e-5)
    # the first update is the same, and a quarter of the way from 0.1 to 2 is 0.575
    assert added[1] / unmoved[1] == pytest.approx(5.75, rel=1e-3)
    for name, value in own(again).items():
        torch.testing.assert_close(own(model)[name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, before[name]) for name, value in own(model).items())
    distance = [(own(model)[name] - value).abs().max() for name, value in own(still).items()]
    assert max(distance) > 1e-4, "the comparison cannot fail"
    weights = dict(load(folder).named_parameters())
    trained = dict(model.named_parameters())
    assert all(torch.equal(trained[name], value) for name, value in weights.items())
    size = [[len(image) for image in images] for images in masks[0]]
    model.eval()
    with torch.no_grad():
        model(**batches_of(run)[0])
    assert kept_of(model) != masks[0]
    for hard, whole in zip(kept_of(model), size, strict=True):
        assert [len(image) for image in hard] == [int(0.2 * number) for number in whole]


def test_a_checkpoint_brings_the_compressor_back(folders, tmp_path):
    def start():
        model = compress_model(load(folders["llava"], frozen=True), method="pmod", keep_ratio=0.5)
        more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        callbacks = {"callbacks": [CompressionCallback()]}
        return model, trainer(folders["llava"], model, tmp_path, own=callbacks, **more)

    model, run = start()
    before = own(model)
    run.train()
    after = own(model)
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "compressor" / "modules.safetensors").exists()
    assert not any("vispress" in name for name in load_file(checkpoint / "model.safetensors"))
    model, run = start()
    run.train(resume_from_checkpoint=str(checkpoint))
    assert len(run.seen) < 6, "the first steps are not done again"
    for name, value in own(model).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=0)


def test_lora_that_the_trainer_adds(folders, tmp_path):
    """Routers are saved with the adapter."""
    model = compress_model(load(folders["llava"]), method="pmod", keep_ratio=0.5)
    lora = LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"])
    lora.modules_to_save = ["vispress_modules"]
    run = trainer(
        folders["llava"], model, tmp_path, kind=CompressedSFT,
        own={"peft_config": lora, "modules_lr": 0.1},
    )  # fmt: skip
    before = own(run.model)
    run.train()
    after = own(run.model)
    assert before
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_loss_on_answers_alone_in_whole_conversations(folders, tmp_path):
    """By default TRL has labels on everything in messages, visual tokens too: that is warned of."""
    folder, fastv = folders["llava"], {"method": "fastv", "keep_ratio": 0.5, "layer": 1}
    model = compress_model(load(folder), **fastv)
    run = trainer(
        folder, model, tmp_path, kind=CompressedSFT, form="messages", assistant_only_loss=True
    )
    run.train()
    losses, kept = by_hand(compress_model(load(folder), **fastv), batches_of(run))
    logged = [float(entry["loss"]) for entry in run.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(losses, abs=1e-3)
    assert kept_of(model) == kept
    assert {len(one) for images in kept for one in images} == {18}
    whole = compress_model(load(folder), **fastv)
    run = trainer(folder, whole, tmp_path, kind=CompressedSFT, form="messages")
    with pytest.warns(UserWarning, match="labels are on visual tokens.*assistant_only_loss"):
        run.train()
    assert {len(one) for images in kept_of(whole) for one in images} == {36}


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_trl_packs_no_pictures(folders, tmp_path, option):
    """Once it does, packed rows of pictures want tests of their own here."""
    model = compress_model(load(folders["llava"]), method="fastv", keep_ratio=0.5)
    with pytest.raises(ValueError, match="not supported for vision datasets"):
        trainer(folders["llava"], model, tmp_path, **{option: True})


def test_the_section_of_the_docs_runs(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text(encoding="utf-8").split("\n## With TRL\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names = {
        "model": load(folders["llava"]), "dataset": rows(),
        "processor": AutoProcessor.from_pretrained(folders["llava"]),
        "args": settings(tmp_path, save_strategy="steps", save_steps=2),
    }  # fmt: skip
    exec(code, names)
    assert names["trainer"].state.global_step == 2
    assert 0 < compression_report(names["model"]).mean_keep_ratio < 1
    assert (tmp_path / "checkpoint-2" / "compressor" / "vispress.json").exists()
