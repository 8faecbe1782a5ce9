"""The OpenAI server answers about a picture over loopback as vispress does on transformers."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from tests.serving.harness import NEW, on_transformers
from tests.serving.samples import scenes

TEMPLATE = "<s> {% for m in messages %}{{ m['content'] }}{% endfor %}"


@contextmanager
def server(folder, asked, log):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    template = folder / "plain.jinja"
    template.write_text(TEMPLATE)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "reference"),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "512"),
        *("--block-size", "32", "--num-gpu-blocks-override", "256", "--max-num-seqs", "8"),
        *("--chat-template", str(template), "--hf-overrides", json.dumps({"vispress": asked})),
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait(60)


def asked_about(prompt) -> dict:
    content = []
    for picture in prompt.images:
        png = io.BytesIO()
        picture.save(png, "png")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    text = prompt.text.replace("<image>", "").strip()
    content.append({"type": "text", "text": text})
    return {
        "model": "reference",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def test_a_picture_over_http(llava, tmp_path):
    folder, model, processor = llava
    asked = {"method": "cdpruner", "num_tokens": 18}
    prompts = scenes(processor)[:3]
    expected = on_transformers(model, processor, prompts, asked)
    with server(folder, asked, tmp_path / "log") as url:
        for prompt, wanted in zip(prompts, expected, strict=True):
            answer = post(url, asked_about(prompt))
            assert answer["choices"][0]["token_ids"] == wanted.ids
            assert answer["usage"]["prompt_tokens"] == wanted.length
