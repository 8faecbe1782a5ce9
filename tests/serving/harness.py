"""An engine in this process, prompts, and what vispress keeps and answers on transformers."""

import gc
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import vispress
from vispress.config import from_mapping

NEW = 6
"""Tokens that are generated."""


@dataclass(frozen=True)
class Prompt:
    """A text with one mark for each picture or video."""

    text: str
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()


@dataclass
class Answer:
    """Greedy ids; kept raster indices of each picture, if it was encoded; prompt and cache."""

    ids: list[int]
    kept: list[list[int]] = field(default_factory=list)
    length: int = 0
    cached: int = 0


def told(processor: Any) -> bool:
    """Whether vLLM wants to be told the times of a video's frames."""
    return type(processor).__name__ in ("Qwen2_5_VLProcessor", "Qwen3VLProcessor")


def about(video: Any) -> dict[str, Any]:
    """All frames of a video, eight a second.

    At fewer, times outrun rows and columns; then vLLM lays what follows behind the last time and
    transformers behind the last row, compressed or not.
    """
    frames = list(range(len(video)))
    return {"total_num_frames": len(video), "fps": 8.0, "frames_indices": frames}


def on_transformers(
    model: Any, processor: Any, prompts: list[Prompt], asked: dict | None
) -> list[Answer]:
    """What the same compressor keeps and answers on transformers, prompt by prompt."""
    if asked is not None:
        rest = dict(asked)
        positions, config = rest.pop("positions", None), rest.pop("config", None)
        source = {"method": from_mapping(rest)} if config is None else {"config": config}
        vispress.compress_model(model, **source, positions=positions)
    try:
        return [_one(model, processor, prompt, asked is not None) for prompt in prompts]
    finally:
        if asked is not None:
            vispress.remove_compression(model)


@torch.no_grad()
def _one(model: Any, processor: Any, prompt: Prompt, compressed: bool) -> Answer:
    shown = {"images": list(prompt.images), "videos": list(prompt.videos)}
    shown = {name: items for name, items in shown.items() if items}
    if prompt.videos and told(processor):
        shown["video_metadata"] = [about(video) for video in prompt.videos]
    inputs = processor(text=[prompt.text], return_tensors="pt", **shown)
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    answer = Answer(out[0, length:].tolist(), length=length)
    if compressed and shown:
        images = vispress.compression_report(model).samples[0].images
        answer.kept = _by_picture(processor, images, prompt)
        answer.length -= sum(image.num_visual - image.num_kept for image in images)
    return answer


def _by_picture(processor: Any, images: Any, prompt: Prompt) -> list[list[int]]:
    """Kept indices of each picture or video: InternVL's are reported by tiles and frames."""
    if len(images) == len(prompt.images) + len(prompt.videos):
        return [list(image.kept) for image in images]
    tiles, kept = iter(images), []
    counts = {
        "<IMG_CONTEXT>": [
            len(processor.image_processor(images=[one])["pixel_values"]) for one in prompt.images
        ],
        "<video>": [len(one) for one in prompt.videos],
    }
    for mark in re.findall("|".join(counts), prompt.text):
        own, before = [], 0
        for _ in range(counts[mark].pop(0)):
            tile = next(tiles)
            own += [before + place for place in tile.kept]
            before += tile.num_visual
        kept.append(own)
    return kept


class Engine:
    """vLLM on a folder, with what it keeps written down."""

    def __init__(self, folder: Any, processor: Any, asked: dict | None, **settings: Any) -> None:
        from vllm import LLM

        given = {} if asked is None else {"hf_overrides": {"vispress": asked}}
        usual = {
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 16,
            "block_size": 32,
            "num_gpu_blocks_override": 256,
            "limit_mm_per_prompt": {"image": 5},
            "seed": 0,
        }
        self.llm = LLM(model=str(folder), **usual | given | settings)
        self.processor, self.seen = processor, []
        if asked is not None:
            self.llm.apply_model(self._listen)

    def _listen(self, model: Any) -> None:
        embed = model.vispress.embed

        def embedded(*arguments: Any) -> Any:
            kept = embed(*arguments)
            self.seen += [keep.tolist() for _, keep in kept]
            return kept

        model.vispress.embed = embedded

    def request(self, prompt: Prompt) -> dict[str, Any]:
        """What vLLM is given."""
        given = {"prompt_token_ids": self.processor.tokenizer(prompt.text)["input_ids"]}
        videos = [(one, about(one)) if told(self.processor) else one for one in prompt.videos]
        shown = {"image": list(prompt.images), "video": videos}
        if any(shown.values()):
            given["multi_modal_data"] = {name: items for name, items in shown.items() if items}
        return given

    def ask(self, prompts: list[Prompt], *, together: bool = False) -> list[Answer]:
        """Generate greedily, all prompts in one batch or one after another."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        requests = [self.request(prompt) for prompt in prompts]
        answers = []
        for part in [requests] if together else [[one] for one in requests]:
            before = len(self.seen)
            for out in self.llm.generate(part, greedy, use_tqdm=False):
                kept = [] if together else self.seen[before:]
                ids, length = list(out.outputs[0].token_ids), len(out.prompt_token_ids)
                answers.append(Answer(ids, kept, length, out.num_cached_tokens or 0))
        return answers

    def look(self, prompt: Prompt) -> tuple[int, list[str]]:
        """KV blocks of a prompt whose first token is there, and names of its pictures in caches."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
        self.llm.enqueue([self.request(prompt)], greedy, use_tqdm=False)
        self.llm.llm_engine.step()
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        ((name, request),) = scheduler.requests.items()
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(name)
        pictures = [feature.identifier for feature in request.mm_features]
        self.llm.wait_for_completion(use_tqdm=False)
        return len(blocks), pictures

    def close(self) -> None:
        """Give everything back."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def engine(folder: Any, processor: Any, asked: dict | None, **settings: Any):
    """An engine that is closed behind the block."""
    made = Engine(folder, processor, asked, **settings)
    try:
        yield made
    finally:
        made.close()


def check(made: Engine, prompts: list[Prompt], expected: list[Answer]) -> None:
    """Alone, in a batch and again: ids, kept sets and lengths as on transformers."""
    alone = made.ask(prompts)
    for prompt, own, wanted in zip(prompts, alone, expected, strict=True):
        # vLLM encodes the pictures of a prompt before its videos
        assert sorted(own.kept) == sorted(wanted.kept), prompt.text
        assert own.length == wanted.length, prompt.text
    for answers in (alone, made.ask(prompts, together=True), made.ask(prompts[::-1])[::-1]):
        assert [one.ids for one in answers] == [one.ids for one in expected]
