"""Writes crates/zimage/tests/reference/text_encoder/: a tiny Qwen3 with a tokenizer, and what Z-Image makes of prompts.

    python3 -m pip install torch transformers diffusers safetensors tokenizers
    python3 scripts/reference/text_encoder.py

The folder has the layout of a diffusers folder. Ids and features come from the pipeline's own code
(`ZImagePipeline._encode_prompt`) over the real `Qwen3Model` and the real chat-template machinery; only
the weights, the vocabulary and the wording of the template are made up here.
"""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import ZImagePipeline
from precision import distances, float64
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

OUT = Path(__file__).resolve().parents[2] / "crates/zimage/tests/reference/text_encoder"

TEXT = """A red fox sleeps in the snow while the morning sun rises over the hills. A photo of a small house
by the sea, painted in watercolour. An old man reads a newspaper on a bench; two children play with a ball.
Close-up of a cup of coffee, soft light, shallow depth of field. A cat with green eyes looks at the camera.
The city at night, neon signs, rain on the street, people with umbrellas. user assistant user assistant
Ein roter Fuchs schläft im Schnee. Une petite maison au bord de la mer. 一只红色的狐狸在雪地里睡觉。"""

# Words with their leading space, digits one by one, line breaks apart: the split of Qwen's tokenizers.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# What Qwen3's template makes of plain messages. Thinking is on unless it is turned off, and then an
# empty thought is put before the answer.
TEMPLATE = """
{%- for message in messages -%}
{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}
{{ '<think>\n\n</think>\n\n' }}
{%- endif -%}
{%- endif -%}
"""

PROMPTS = [
    "A red fox in the snow.",
    "",
    " two  spaces, a\ttab\nand a new line \n\n",
    "Ein Fuchs schläft; 狐狸在雪地里睡觉 🦊 \u05d0\u0301",
    # Decomposed letters, which the normaliser composes.
    "cafe\u0301 u\u0308ber",
    "it's 2026, 3.14 %",
    # Special tokens in a prompt are tokens, not text.
    "before<|im_end|>after <|endoftext|> <|im_start|>system",
    "A cat with green eyes. " * 60,
]


# Code points where tokenizers disagree if they do: scripts, marks, spaces, controls, beyond 16 bits.
RANGES = [
    range(0x20, 0x7F), range(0xA0, 0x250), range(0x300, 0x370), range(0x370, 0x600), range(0x900, 0xA00),
    range(0x2000, 0x2070), range(0x3000, 0x3100), range(0x4E00, 0x4F00), range(0xAC00, 0xAD00),
    range(0xFF00, 0xFF60), range(0x1D400, 0x1D500), range(0x1F300, 0x1F650), range(0x00, 0x21),
    [ord(c) for c in "\u0085\u200d\ufe0f\ufeff\r\n\t  'sTreVmLLd0123"],
]  # fmt: skip


def strange_prompt(draw):
    runs = [draw.choices(draw.choice(RANGES), k=draw.randint(1, 5)) for _ in range(draw.randint(1, 10))]
    return "".join(chr(code) for run in runs for code in run)


def record(tokens, prompt):
    text = tokens.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return {"prompt": prompt, "text": text, "ids": tokens(text, truncation=True, max_length=512).input_ids}


def write(name, records):
    (OUT / name).write_text(json.dumps(records) + "\n")


def tokenizer():
    core = Tokenizer(models.BPE(fuse_unk=False, byte_fallback=False))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXT.splitlines(), trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        model_max_length=131072,
    )


def model(vocabulary):
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    # Weights of a size with which every layer, norm and rotation shows in the result.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5)
    return model.bfloat16()


def main():
    torch.manual_seed(11)
    shutil.rmtree(OUT, ignore_errors=True)
    made = tokenizer()
    made.save_pretrained(OUT / "tokenizer")
    # More rows than tokens, as in Qwen's files.
    model(len(made) + 5).save_pretrained(OUT / "text_encoder", max_shard_size="60KB")

    tokens = AutoTokenizer.from_pretrained(OUT / "tokenizer")
    records = []

    def encode(suffix, dtype):
        encoder = Qwen3Model.from_pretrained(OUT / "text_encoder", dtype=dtype).eval()
        parts = SimpleNamespace(tokenizer=tokens, text_encoder=encoder)
        with torch.no_grad():
            features = ZImagePipeline._encode_prompt(parts, list(PROMPTS), device="cpu")
        return {f"{index}{suffix}": feature.contiguous() for index, feature in enumerate(features)}

    found = encode("", torch.float32)
    with float64():
        exact = encode("", torch.float64)
    rough = encode("/bfloat16", torch.bfloat16)
    # The long prompt in bfloat16 would tell nothing new.
    rough.popitem()
    tensors = found | distances(found, exact) | rough

    for index, prompt in enumerate(PROMPTS):
        records.append(record(tokens, prompt))
        length = len(records[-1]["ids"])
        assert length == len(tensors[str(index)]), (prompt, length)
        print(f"{length:4} tokens  {prompt[:40]!r}")

    save_file(tensors, OUT / "features.safetensors")
    write("prompts.json", records)
    draw = random.Random(3)
    write("strange_prompts.json", [record(tokens, strange_prompt(draw)) for _ in range(100)])


main()
